"""The kernel op in eight bits: attention over listed pairs of blocks, forward only.

Lists, layouts and outputs are those of `block_sparse_attention`. SageAttention 2
(arXiv 2411.10958) describes the numbers; `compiled_sparse.reference.quantized` defines them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from typing import Final
from typing import Literal
from typing import NoReturn

import torch
from torch import Tensor

from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import DtypeError
from compiled_sparse.errors import ForwardOnlyError
from compiled_sparse.errors import ShapeError
from compiled_sparse.ops import cpu
from compiled_sparse.ops import gpu_quantized
from compiled_sparse.ops.checks import check_lists
from compiled_sparse.ops.checks import check_shapes
from compiled_sparse.ops.checks import check_tensors
from compiled_sparse.ops.checks import resolve_layouts
from compiled_sparse.ops.library import LIBRARY
from compiled_sparse.ops.library import NAMESPACE
from compiled_sparse.ops.plan import block_tokens
from compiled_sparse.ops.quantization import FLOAT8
from compiled_sparse.ops.quantization import FLOAT16
from compiled_sparse.ops.routing import uses_gpu_kernels
from compiled_sparse.ops.tensors import empty_outputs
from compiled_sparse.ops.tensors import resolve_scale

NAME: Final = "quantized_block_sparse_attention"
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS: Final = (64, 128)
AUTO: Final = "auto"
VALUES: Final = (AUTO, FLOAT8, FLOAT16)

LIBRARY.define(
    f"{NAME}(Tensor q, Tensor k, Tensor v, Tensor block_indices, Tensor block_counts, "
    "Tensor? key_mask, SymInt[] grid, int[] q_tile, int[] kv_tile, SymInt text_before, "
    "SymInt text_after, float? scale, str values) -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.needs_exact_strides,),
)


def quantized_block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_counts: Tensor,
    *,
    grid: Sequence[int],
    q_tile: Sequence[int],
    kv_tile: Sequence[int],
    key_mask: Tensor | None = None,
    text_before: int = 0,
    text_after: int = 0,
    scale: float | None = None,
    values: Literal["auto", "float8", "float16"] = AUTO,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query block over its listed key blocks, in eight bits.

    Queries, and keys less the mean of the visible ones, are rounded to int8 with one scale per
    block; values and softmax weights to float8_e4m3fn or float16, values with one scale per
    channel. Sums are float32 (the published kernel for sm_89 and newer may add in float16). Weights
    are rounded beside the largest score met so far along the list, block by block; the GPU kernels
    and the native CPU kernel take large blocks in parts. Forward only.

    Args:
        q: [batch, query heads, query length, head_dim]; float32, bfloat16 or float16; head_dim is
            64 or 128.
        k: [batch, key heads, key length, head_dim]; query heads is a multiple of key heads.
        v: like `k`.
        block_indices: int32 [batch or 1, query heads or 1, query blocks, K]: key blocks of each
            query block, without repetition.
        block_counts: int32 [batch or 1, query heads or 1, query blocks]: how many leading entries
            of a row are valid, 0 to K.
        grid: Token grid of the queries, one to three axes. With one axis the key length is free.
        q_tile: Tile sides for query blocks.
        kv_tile: Tile sides for key blocks.
        key_mask: bool [batch, key length], True where the key is attended.
        text_before: Text tokens in front of the grid, in queries and keys.
        text_after: Text tokens behind the grid, in queries and keys.
        scale: Softmax scale; None means `head_dim ** -0.5`.
        values: What values and weights are rounded to: "float8", "float16", or "auto" for float8
            but on GPUs without matrix instructions for it (before sm_89, and AMD's).

    Returns:
        `out` [batch, query heads, query length, head_dim] of v's dtype, a transposed view of
        [batch, length, heads, head_dim] memory, and `lse`, the natural log-sum-exp of the scaled
        scores, float32 [batch, query heads, query length]. A query without a visible key gives 0
        and -inf.

    Raises:
        ForwardOnlyError: if gradients are enabled and q, k or v requires one.
        ConfigError: if `values` is none of the three.
        ShapeError: if shapes do not fit each other, or the head size has no kernel.
        DtypeError: if dtypes are unsupported or differ.
        LayoutError: if grid and text do not add up to the lengths.
        BlockListError: if a list is out of range; checked as in `block_sparse_attention`.
        DeviceError: if the tensors are on different devices, or the GPU has no float8.
    """
    op = torch.ops.compiled_sparse.quantized_block_sparse_attention
    outputs: tuple[Tensor, Tensor] = op(
        q,
        k,
        v,
        block_indices,
        block_counts,
        key_mask,
        list(grid),
        list(q_tile),
        list(kv_tile),
        text_before,
        text_after,
        scale,
        values,
    )
    return outputs


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_counts: Tensor,
    key_mask: Tensor | None,
    grid: list[int],
    q_tile: list[int],
    kv_tile: list[int],
    text_before: int,
    text_after: int,
    scale: float | None,
    values: str,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, key_mask, (block_indices, block_counts), values)
    check_shapes(q, k, v, key_mask)
    _check_head_dim(q)
    layouts = resolve_layouts(q, k, grid, q_tile, kv_tile, text_before, text_after)
    check_lists(block_indices, block_counts, q, *layouts)
    arguments = (q, k, v, block_indices, block_counts, key_mask)
    scale = resolve_scale(scale, q)
    if uses_gpu_kernels(q):
        outputs = empty_outputs(q)
        gpu_quantized.quantized_forward(*arguments, *layouts, scale, values, outputs)
        return outputs
    q_tokens, kv_tokens = map(block_tokens, layouts)
    values = FLOAT8 if values == AUTO else values
    return cpu.quantized_forward(*arguments, q_tokens, kv_tokens, scale, values)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    block_lists: tuple[Tensor, Tensor],
    values: str,
) -> None:
    """Check what does not depend on sizes: valid for fake tensors too, adds no guard."""
    check_tensors(q, k, v, key_mask, block_lists)
    if q.dtype not in DTYPES:
        raise DtypeError(
            "quantised attention does not take this dtype",
            got=str(q.dtype),
            expected="one of " + ", ".join(map(str, DTYPES)),
            next_step="cast q, k and v, or use block_sparse_attention",
        )
    if values not in VALUES:
        raise ConfigError(
            "values is no way to hold values",
            got=repr(values),
            expected="one of " + ", ".join(map(repr, VALUES)),
            next_step=f"leave it out, or pass {AUTO!r}",
        )


def _check_head_dim(q: Tensor) -> None:
    if q.shape[-1] not in HEAD_DIMS:
        raise ShapeError(
            "quantised attention does not take this head size",
            got=f"head_dim {q.shape[-1]}",
            expected="one of " + ", ".join(map(str, HEAD_DIMS)),
            next_step="use SLA(...) or block_sparse_attention for these calls",
        )


def _fake(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, block_counts: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, rest[0], (block_indices, block_counts), rest[-1])
    return empty_outputs(q)


def _no_gradient(*args: Any, **kwargs: Any) -> NoReturn:
    """Called at the forward, and only where gradients are wanted."""
    raise ForwardOnlyError(
        "quantised attention cannot be differentiated",
        got="gradients enabled, and an input that requires one",
        expected="a call under torch.no_grad(), or inputs without requires_grad",
        next_step="use SLA(...) for training, or torch.no_grad()",
    )


for _device in ("CPU", "CUDA"):
    LIBRARY.impl(NAME, _forward, _device)
torch.library.register_fake(f"{NAMESPACE}::{NAME}", _fake, lib=LIBRARY)
torch.library.register_autograd(
    f"{NAMESPACE}::{NAME}", _no_gradient, setup_context=_no_gradient, lib=LIBRARY
)
