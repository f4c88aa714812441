"""Compile every kernel variant for chips that are not here, and read what the compiler made of it.

python -m benchmarks.audit [--chips sm_90 gfx942] [--quick] [--output FILE]

Nothing runs: Triton compiles for any chip without one, and its package brings a disassembler.
"""

from __future__ import annotations
