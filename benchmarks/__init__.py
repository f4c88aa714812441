"""Benchmarks: every figure this project states, measured beside its peers in one run."""

from __future__ import annotations
