"""Triton kernels, imported only where an op runs on a GPU: docs/gpu.md says what was verified."""

from __future__ import annotations
