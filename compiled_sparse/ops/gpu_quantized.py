"""The quantised kernel op on GPUs, imported on first use."""

from __future__ import annotations

from torch import Tensor

from compiled_sparse.errors import DeviceError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops import gpu
from compiled_sparse.ops.quantization import DTYPES
from compiled_sparse.ops.quantization import FLOAT8
from compiled_sparse.ops.quantization import FLOAT16
from compiled_sparse.ops.quantization import key_mean
from compiled_sparse.ops.quantization import value_scales


def quantized_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_counts: Tensor,
    key_mask: Tensor | None,
    q_layout: BlockLayout,
    kv_layout: BlockLayout,
    scale: float,
    values: str,
    outputs: tuple[Tensor, Tensor],
) -> None:
    """Attend in eight bits from every query block to its listed key blocks.

    Args:
        q: As in `compiled_sparse.ops.gpu.block_sparse_forward`, like all arguments not described
            here.
        k: See `q`.
        v: See `q`.
        block_indices: See `q`.
        block_counts: See `q`.
        key_mask: See `q`.
        q_layout: See `q`.
        kv_layout: See `q`.
        scale: See `q`.
        values: "auto", "float8" or "float16".
        outputs: Where to write the output, like q with last stride 1, and the natural log-sum-exp
            [B, Hq, Lq], contiguous.

    Raises:
        DeviceError: if float8 is demanded of a GPU that has none.
    """
    from compiled_sparse.kernels import quantized_attention
    from compiled_sparse.kernels.launch import on_device_of

    with on_device_of(q):
        values = resolve(values, quantized_attention.has_float8())
        if not q.numel():
            return
        mean = key_mean(k, key_mask)
        multiplier, v_scale = value_scales(v, key_mask, values)
        lists = (block_indices, block_counts)
        call = gpu.kernel_call(q, k, v, lists, key_mask, q_layout, kv_layout, scale)
        heads = quantized_attention.Heads(
            mean.contiguous(), multiplier.contiguous(), v_scale.contiguous(), DTYPES[values]
        )
        quantized_attention.quantized_forward(call, heads, *outputs)


def resolve(values: str, has_float8: bool) -> str:
    """Return what values are held in on a chip with or without products of float8.

    Raises:
        DeviceError: if float8 is demanded of a chip without.
    """
    if values == FLOAT8 and not has_float8:
        raise DeviceError(
            "this GPU has no matrix instructions for float8_e4m3fn",
            got=f"values={FLOAT8!r}",
            expected=f"'auto' or {FLOAT16!r} before sm_89 and on AMD's GPUs",
            next_step=f"leave values out, or pass {FLOAT16!r}",
        )
    if values == FLOAT16 or not has_float8:
        return FLOAT16
    return FLOAT8
