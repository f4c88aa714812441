"""Triton kernels, imported only by the CUDA implementations of the ops. This release has none."""

from __future__ import annotations
