"""Quantised attention beside its emulation: what is rounded, and everything that is not."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.settings import CaseFunction
from benchmarks.gpu.settings import Settings
from compiled_sparse import ops
from compiled_sparse.layout import BlockLayout
from compiled_sparse.reference.blocks import block_of_token
from compiled_sparse.reference.quantized import quantized_attention_over_blocks

Extents = tuple[int, ...]

GRIDS: tuple[tuple[Extents, Extents, Extents], ...] = (
    ((1000,), (128,), (64,)),
    ((1000,), (64,), (128,)),
    ((5, 9, 10), (4, 4, 4), (3, 5, 4)),
    ((7, 9, 17), (6, 8, 8), (2, 8, 8)),
)
QUICK_GRIDS = (((3, 9, 5), (2, 4, 4), (2, 2, 4)),)
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
TEXT = (7, 30)
SHARE_OF_ROUNDING = 0.5
"""How far from the emulation a result may be, in distances of the emulation from exactness.

Neighbours in eight bits are far apart: an exponential that differs in its last bit may round to
either, and blocks of several chunks are rounded beside other maxima.
"""

LSE_TOLERANCE = 2e-2
UNIFORM_TOLERANCE = 1e-3


def cases(settings: Settings) -> dict[str, CaseFunction]:
    """Return the checks by name."""
    device = torch.device(settings.device)
    grids = QUICK_GRIDS if settings.quick else GRIDS
    dtypes = DTYPES[:1] if settings.quick else DTYPES
    functions: dict[str, CaseFunction] = {}
    for layout, dtype, masked in itertools.product(grids, dtypes, (False, True)):
        for values, head_dim in (("auto", 128), ("float16", 64)):
            name = f"quantised {layout} {str(dtype).removeprefix('torch.')} {values}"
            name += ", key mask" if masked else ""
            functions[name] = functools.partial(
                _check, layout, dtype, masked, values, head_dim, device
            )
    functions["quantised, equal weights"] = functools.partial(_check_values, grids[0], device)
    return functions


def _check(
    extents: tuple[Extents, Extents, Extents],
    dtype: torch.dtype,
    masked: bool,
    values: str,
    head_dim: int,
    device: torch.device,
) -> dict[str, Any]:
    layouts = _layouts(extents)
    tensors, shown = _inputs(layouts[0].num_tokens, head_dim, dtype, masked, device)
    lists = _lists(layouts, device)
    out, lse = _op(layouts, tensors, lists, shown, values)
    held = "float16" if values == "float16" or not _has_float8(device) else "float8"
    wanted, wanted_lse = quantized_attention_over_blocks(
        *tensors, *layouts, *lists, key_mask=shown, values=held
    )
    exact = _exact(layouts, tensors, lists, shown)
    rounding = float((wanted.double() - exact).norm())
    off = float((out.double() - wanted.double()).norm()) / rounding
    assert off <= SHARE_OF_ROUNDING, f"out: {off:.2f} of the distance of the emulation"
    assert torch.equal(lse.isinf(), wanted_lse.isinf()), "lse: infinities differ"
    seen = wanted_lse.isfinite()
    lse_off = float((lse - wanted_lse)[seen].abs().max())
    assert lse_off <= LSE_TOLERANCE, f"lse: off by {lse_off:.1e}"
    assert out.transpose(1, 2).is_contiguous(), "out: not BLHD memory"
    again = _op(layouts, tensors, lists, shown, values)
    assert torch.equal(out, again[0]), "two equal calls differ"
    return {"off_over_rounding": off, "lse_off": lse_off}


def _check_values(
    extents: tuple[Extents, Extents, Extents], device: torch.device
) -> dict[str, Any]:
    """Check the values' quantiser: with queries of zero no weight is rounded."""
    layouts = _layouts(extents)
    (q, k, v), _ = _inputs(layouts[0].num_tokens, 64, torch.float32, False, device)
    tensors, lists = (q * 0, k, v), _lists(layouts, device)
    out, _ = _op(layouts, tensors, lists, None, "auto")
    held = "float8" if _has_float8(device) else "float16"
    wanted, _ = quantized_attention_over_blocks(*tensors, *layouts, *lists, values=held)
    off = float((out - wanted).norm() / wanted.norm())
    assert off <= UNIFORM_TOLERANCE, f"out: relative error {off:.1e}"
    return {"relative_error": off}


def _has_float8(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def _layouts(extents: tuple[Extents, Extents, Extents]) -> tuple[BlockLayout, BlockLayout]:
    grid, q_tile, kv_tile = extents
    return BlockLayout(grid, q_tile, *TEXT), BlockLayout(grid, kv_tile, *TEXT)


def _inputs(
    length: int, head_dim: int, dtype: torch.dtype, masked: bool, device: torch.device
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """Random q of four heads, k and v of two, far from zero in some channels; NaN where hidden."""
    generator = torch.Generator(device).manual_seed(0)

    def random(heads: int) -> Tensor:
        shape = (2, length, heads, head_dim)
        return torch.randn(shape, generator=generator, device=device).transpose(1, 2)

    q, k, v = random(4), random(2), random(2)
    k[..., ::16] += 8
    v[..., ::8] *= 30
    shown = None
    if masked:
        shown = torch.rand(2, length, generator=generator, device=device) < 0.8
        hidden = ~shown[:, None, :, None]
        k, v = (each.masked_fill(hidden, float("nan")) for each in (k, v))
    return (q.to(dtype), k.to(dtype), v.to(dtype)), shown


def _lists(layouts: tuple[BlockLayout, BlockLayout], device: torch.device) -> tuple[Tensor, Tensor]:
    rows, blocks = (layout.num_blocks for layout in layouts)
    generator = torch.Generator(device).manual_seed(1)
    order = torch.rand(2, 4, rows, blocks, generator=generator, device=device).argsort(-1).int()
    counts = torch.randint(0, blocks + 1, (2, 4, rows), generator=generator, device=device)
    counts[..., 0], counts[..., -1] = 0, blocks
    return order, counts.int()


def _op(
    layouts: tuple[BlockLayout, BlockLayout],
    tensors: tuple[Tensor, Tensor, Tensor],
    lists: tuple[Tensor, Tensor],
    shown: Tensor | None,
    values: Any,
) -> tuple[Tensor, Tensor]:
    return ops.quantized_block_sparse_attention(
        *tensors,
        *lists,
        grid=layouts[0].grid,
        q_tile=layouts[0].tile,
        kv_tile=layouts[1].tile,
        key_mask=shown,
        text_before=TEXT[0],
        text_after=TEXT[1],
        values=values,
    )


def _exact(
    layouts: tuple[BlockLayout, BlockLayout],
    tensors: tuple[Tensor, Tensor, Tensor],
    lists: tuple[Tensor, Tensor],
    shown: Tensor | None,
) -> Tensor:
    """Attention in float64, without any rounding."""
    indices, counts = lists
    q_block, k_block = (block_of_token(layout).to(indices.device) for layout in layouts)
    blocks = layouts[1].num_blocks
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    seen = indices.new_zeros((*indices.shape[:-1], blocks + 1), dtype=torch.bool)
    seen.scatter_(-1, indices.long().masked_fill(~used, blocks), value=True)
    mask = seen[..., q_block, :][..., k_block]
    q, k, v = (each.double() for each in tensors)
    if shown is not None:
        mask = mask & shown[:, None, None]
        k, v = (each.masked_fill(~shown[:, None, :, None], 0.0) for each in (k, v))
    k, v = (each.repeat_interleave(2, dim=1) for each in (k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ v
