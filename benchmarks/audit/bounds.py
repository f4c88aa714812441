"""What every kernel must keep to on every chip; a test fails where one does not."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.audit.machine_code import Usage

SHARED_BYTES = {
    "sm_80": 166_912,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
"""The most that one program may have, from the vendors' programming guides."""

REGISTERS = 65_536
MATRIX_KERNELS = (
    "attention_forward",
    "attention_forward_boxes",
    "attention_backward_queries",
    "attention_backward_keys",
    "chunk_attention_forward",
    "chunk_attention_backward_queries",
    "chunk_attention_backward_keys",
)
MATRIX_KIND = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}
"""The instruction that reaches the chip's rate; HMMA on the others."""

QUANTIZED_KERNEL = "attention_forward_quantized"
QUANTIZED_KINDS = {
    "sm_80": ("IMMA", "HMMA"),
    "sm_89": ("IMMA", "QMMA"),
    "sm_90": ("IGMMA", "QGMMA"),
    "sm_100": ("IMMA", "UTCQMMA"),
    "sm_120": ("IMMA", "QMMA"),
    "gfx942": ("MFMA",),
}
"""Of the products of int8, and of those of float8 (float16 where the chip has none)."""


def violations(
    kernel: str, chip: str, used: Usage, *, warps: int, matrix: bool, wide_rows: bool
) -> Iterator[str]:
    """Yield what is wrong with a compiled kernel.

    Args:
        kernel: Its name.
        chip: Such as `sm_90`.
        used: What its machine code uses.
        warps: Warps per program.
        matrix: Whether its dtype has matrix instructions.
        wide_rows: Whether programs own 64 rows or more, as the widest instructions need.
    """
    if used.spilled:
        yield f"{used.spilled} spilled"
    if used.shared > SHARED_BYTES[chip]:
        yield f"{used.shared} bytes of shared memory, {SHARED_BYTES[chip]} exist"
    if chip.startswith("sm_") and used.registers * warps * 32 > REGISTERS:
        yield f"{used.registers} registers for {warps} warps, {REGISTERS} exist"
    if kernel not in (*MATRIX_KERNELS, QUANTIZED_KERNEL) or not matrix:
        return
    kinds: tuple[str, ...] = (MATRIX_KIND.get(chip, "HMMA"),)
    if kernel == QUANTIZED_KERNEL:
        kinds = QUANTIZED_KINDS[chip]
    for wanted in kinds if wide_rows or chip.startswith("gfx") else ("MMA",):
        if wanted not in used.matrix_kind:
            yield f"no {wanted} instruction"
    if kernel == "attention_forward_boxes" and not used.bulk_loads:
        yield "no load by the bulk copy engine"
    if chip.startswith("sm_") and not used.async_copies + used.bulk_loads:
        yield "rows pass through registers on their way to shared memory"
