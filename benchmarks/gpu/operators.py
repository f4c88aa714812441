"""The registered ops under `opcheck`, and `cs.attention` beside `cs.reference.attention`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import compiled_sparse as cs
from benchmarks.gpu import chunks
from benchmarks.gpu import quantized
from benchmarks.gpu.reference import GRADIENTS
from benchmarks.gpu.reference import Problem
from benchmarks.gpu.reference import check_errors
from benchmarks.gpu.reference import plain
from benchmarks.gpu.settings import CaseFunction
from benchmarks.gpu.settings import Settings
from compiled_sparse.config import MechanismConfig
from compiled_sparse.reference.attention import token_mask

TILE, WINDOW = (4, 4, 4), (1, 3, 1)
GRID, QUICK_GRID = (5, 9, 10), (3, 9, 5)
TEXT = cs.Text(before=7, after=77)
LOW, FULL = torch.bfloat16, torch.float32
SELECTING = {
    "VSA": cs.VSA(sparsity=0.6, tile_thw=TILE),
    "SLA": cs.SLA(topk_ratio=0.4, block_q=64, block_k=32),
    "SLA on boxes": cs.SLA(topk_ratio=0.4, block_q=(4, 8, 4), block_k=TILE),
    "SageSLA": cs.SageSLA(topk_ratio=0.4, block_q=64, block_k=32),
    "VMoBA, temporal": cs.VMoBA(temporal_chunk_size=1.5, spatial_layer=0, st_layer=0),
    "VMoBA, spatial": cs.VMoBA(
        spatial_chunk_size=(4, 4),
        spatial_topk=3,
        moba_select_mode="topk",
        temporal_layer=0,
        st_layer=0,
    ),
    "VMoBA, spatio-temporal, groups": cs.VMoBA(
        st_chunk_size=TILE,
        moba_threshold=0.4,
        moba_threshold_type="head_global",
        temporal_layer=0,
        spatial_layer=0,
    ),
}
SELECTING_TOLERANCES = {LOW: (2e-2, 5e-2), FULL: (1e-4, 1e-4)}
"""Relative errors of output and gradients beside the reference in the same dtype."""

Grid = tuple[int, int, int]


def cases(settings: Settings) -> dict[str, CaseFunction]:
    """Return the checks of this section by name."""
    device = torch.device(settings.device)
    grid = QUICK_GRID if settings.quick else GRID
    functions: dict[str, CaseFunction] = {
        "opcheck block_sparse_attention_backward": functools.partial(
            _opcheck_backward, grid, device
        )
    }
    for masked in (True,) if settings.quick else (True, False):
        suffix = ", key mask" if masked else ""
        for name in ("block_sparse_attention", "sta"):
            check = functools.partial(_opcheck, name, grid, masked, device)
            functions[f"opcheck {name}{suffix}"] = check
        for dtype in (LOW, FULL):
            name = f"STA {str(dtype).removeprefix('torch.')}{suffix}"
            functions[name] = functools.partial(_sta, grid, dtype, masked, device)
            for title, config in SELECTING.items():
                check = functools.partial(_selecting, config, grid, dtype, masked, device)
                functions[name.replace("STA", title)] = check
    for dtype in (LOW, FULL):
        name = f"tile_mean and top_k_blocks {str(dtype).removeprefix('torch.')}"
        functions[name] = functools.partial(_selection, grid, dtype, device)
    functions["opcheck quantized_block_sparse_attention"] = functools.partial(
        _opcheck_quantized, grid, device
    )
    return functions | chunks.cases(settings) | quantized.cases(settings)


def _selection(grid: Grid, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Compare means of blocks, and lists of the highest scores, with those of the CPU."""
    x, y, _ = _inputs(grid, device, dtype, 64)
    layout = {"grid": grid, "tile": TILE, "text_before": TEXT.before, "text_after": TEXT.after}
    means, others = (cs.ops.tile_mean(each, **layout) for each in (x, y))
    expected = cs.ops.tile_mean(x.cpu().double(), **layout)
    error = (means.cpu().double() - expected).abs()
    budget = torch.finfo(dtype).eps / 2 * expected.abs() + 1e-6
    assert bool((error <= budget).all()), f"mean off by {float((error - budget).max()):.3e}"
    scores = (means @ others.mT).contiguous()
    scores[..., ::3] = scores[..., :1]  # ties
    for k in (1, 5, torch.tensor(3, device=device)):
        most = {} if isinstance(k, int) else {"max_k": 7}
        lists = cs.ops.top_k_blocks(scores, k, **most)
        wanted = cs.ops.top_k_blocks(scores.cpu(), k if isinstance(k, int) else k.cpu(), **most)
        for list_, want in zip(lists, wanted, strict=True):
            assert torch.equal(list_.cpu(), want), f"lists differ at k = {int(k)}"
    return {"largest_error": float(error.max())}


def _inputs(grid: Grid, device: torch.device, dtype: torch.dtype, head_dim: int) -> list[Tensor]:
    length = torch.Size(grid).numel() + TEXT.before + TEXT.after
    generator = torch.Generator(device).manual_seed(0)
    shape = (2, 2, length, head_dim)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3)]


def _key_mask(length: int, device: torch.device) -> Tensor:
    valid = torch.ones(2, length, dtype=torch.bool, device=device)
    valid[1, -40:] = False
    return valid


def _arguments(grid: Grid, masked: bool, device: torch.device) -> tuple[Any, ...]:
    """Return the positional arguments of the kernel op; q, k and v require gradients."""
    q, k, v = (each.requires_grad_() for each in _inputs(grid, device, LOW, 32))
    text = (TEXT.before, TEXT.after)
    lists = torch.ops.compiled_sparse.sta_block_lists(grid, TILE, WINDOW, *text, device)
    mask = _key_mask(q.shape[2], device) if masked else None
    return q, k, v, *lists, mask, grid, TILE, TILE, *text, None


def _opcheck(name: str, grid: Grid, masked: bool, device: torch.device) -> dict[str, Any]:
    q, k, v, _, _, mask, *_, before, after, scale = arguments = _arguments(grid, masked, device)
    if name == "sta":
        arguments = (q, k, v, mask, grid, TILE, WINDOW, before, after, scale)
    operator = getattr(torch.ops.compiled_sparse, name).default
    return {"opcheck": torch.library.opcheck(operator, arguments)}


def _opcheck_quantized(grid: Grid, device: torch.device) -> dict[str, Any]:
    _, _, _, *rest = _arguments(grid, True, device)
    tensors = _inputs(grid, device, LOW, 64)
    operator = torch.ops.compiled_sparse.quantized_block_sparse_attention.default
    return {"opcheck": torch.library.opcheck(operator, (*tensors, *rest, "auto"))}


def _opcheck_backward(grid: Grid, device: torch.device) -> dict[str, Any]:
    q, k, v, *rest = _arguments(grid, True, device)
    tensors = tuple(each.detach() for each in (q, k, v))
    out, lse = torch.ops.compiled_sparse.block_sparse_attention(*tensors, *rest)
    operator = torch.ops.compiled_sparse.block_sparse_attention_backward.default
    gradients = (torch.randn_like(out), torch.randn_like(lse))
    arguments = (*gradients, *tensors, out, lse, *rest)
    return {"opcheck": torch.library.opcheck(operator, arguments)}


def _sta(grid: Grid, dtype: torch.dtype, masked: bool, device: torch.device) -> dict[str, Any]:
    """Compare sliding tile attention, and its gradients, with its reference in float64."""
    inputs = _inputs(grid, device, dtype, 64)
    length = inputs[0].shape[2]
    mask = _key_mask(length, device) if masked else None
    weight = torch.randn_like(inputs[0])
    config = cs.STA(window_thw=WINDOW, tile_thw=TILE)

    def run(attention: Any, compute: torch.dtype) -> dict[str, Tensor]:
        leaves = [each.to(compute, copy=True).requires_grad_() for each in inputs]
        keywords = {"grid_thw": grid, "text": TEXT, "key_mask": mask, "return_lse": True}
        out, lse = attention(*leaves, config, **keywords)
        gradients = torch.autograd.grad(out, leaves, weight.to(compute))
        named = dict(zip(GRADIENTS, gradients, strict=True))
        return {"out": out.detach(), "lse": lse.detach(), **named}

    visible = token_mask(config, slice(None), length, length, grid, TEXT, device)
    if mask is not None:
        visible = visible & mask[:, None, None, :]
    no_gradient = torch.zeros(weight.shape[:-1], device=device)
    scale = float(weight.shape[-1]) ** -0.5
    problem = Problem(*inputs, visible, weight, no_gradient, scale)
    truth = run(cs.reference.attention, torch.float64)
    errors = check_errors(run(cs.attention, dtype), truth, list(plain(problem)))
    return {"errors_over_plain": {name: round(ratio, 3) for name, ratio in errors.items()}}


def _selecting(
    config: MechanismConfig, grid: Grid, dtype: torch.dtype, masked: bool, device: torch.device
) -> dict[str, Any]:
    """Compare all branches, and all gradients, with the reference, which selects in this dtype."""
    # Quarters: their sums are exact in any order, so that both select the same blocks.
    q, k, v = ((4 * each).round() / 4 for each in _inputs(grid, device, dtype, 64))
    if isinstance(config, cs.VMoBA):
        # Means of any number of keys are not exact; a product with one channel is rounded once.
        q = q.masked_fill(torch.arange(64, device=device) != q[..., :1].abs() * 4, 0.0)
    learned = _learned(config, q)
    inputs = {"q": q, "k": k, "v": v, **learned}
    mask = _key_mask(q.shape[2], device) if masked else None
    weight = torch.randn_like(q)
    has_backward = not isinstance(config, cs.SageSLA)

    def run(attention: Any) -> dict[str, Tensor]:
        leaves = {n: each.clone().requires_grad_(has_backward) for n, each in inputs.items()}
        named = {name: leaves[name] for name in learned}
        if "weight" in named:
            named = {"proj": (named["weight"], named["bias"])}
        layout = {"grid_thw": grid, "text": TEXT, "key_mask": mask}
        out = attention(leaves["q"], leaves["k"], leaves["v"], config, **named, **layout)
        if not has_backward:
            return {"out": out}
        gradients = torch.autograd.grad(out, list(leaves.values()), weight)
        return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}

    actual, expected = run(cs.attention), run(cs.reference.attention)
    errors = {
        name: float((actual[name].double() - each.double()).norm() / each.double().norm())
        for name, each in expected.items()
    }
    forward, backward = SELECTING_TOLERANCES[dtype]
    for name, error in errors.items():
        limit = forward if name == "out" else backward
        assert error <= limit, f"{name}: relative error {error:.2e}, at most {limit:.0e}"
    return {"relative_errors": errors}


def _learned(config: MechanismConfig, q: Tensor) -> dict[str, Tensor]:
    """Return the learned tensors of a mechanism, none of them zero."""
    if isinstance(config, cs.VSA):
        return {"gate": torch.randn_like(q)}
    if isinstance(config, cs.VMoBA):
        return {}
    size = q.shape[-1]
    weight = torch.randn(size, size, device=q.device) / size**0.5
    return {"weight": weight, "bias": torch.randn(size, device=q.device)}
