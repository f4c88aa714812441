"""`make gpu-check`: is the GPU path right, and how fast is it; one command, one JSON record."""

from __future__ import annotations
