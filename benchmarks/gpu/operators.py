"""The registered ops under `opcheck`, and `cs.attention` beside `cs.reference.attention`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import compiled_sparse as cs
from benchmarks.gpu.reference import GRADIENTS
from benchmarks.gpu.reference import Problem
from benchmarks.gpu.reference import check_errors
from benchmarks.gpu.reference import plain
from benchmarks.gpu.settings import CaseFunction
from benchmarks.gpu.settings import Settings
from compiled_sparse.reference.attention import token_mask

GRID, TILE, WINDOW = (5, 9, 10), (4, 4, 4), (1, 3, 1)
TEXT = cs.Text(before=7, after=77)


def cases(settings: Settings) -> dict[str, CaseFunction]:
    """Return the checks of this section by name."""
    device = torch.device(settings.device)
    functions: dict[str, CaseFunction] = {
        f"opcheck {name}{', key mask' * masked}": functools.partial(_opcheck, name, masked, device)
        for name in ("block_sparse_attention", "sta")
        for masked in (False, True)
    }
    functions["opcheck block_sparse_attention_backward"] = functools.partial(
        _opcheck_backward, device
    )
    for dtype in (torch.float32, torch.bfloat16):
        for masked in (False, True):
            name = f"STA {str(dtype).removeprefix('torch.')}{', key mask' * masked}"
            functions[name] = functools.partial(_sta, dtype, masked, device)
    return functions


def _inputs(
    device: torch.device, dtype: torch.dtype = torch.float32, head_dim: int = 64
) -> list[Tensor]:
    length = torch.Size(GRID).numel() + TEXT.before + TEXT.after
    generator = torch.Generator(device).manual_seed(0)
    shape = (2, 2, length, head_dim)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3)]


def _key_mask(length: int, device: torch.device) -> Tensor:
    valid = torch.ones(2, length, dtype=torch.bool, device=device)
    valid[1, -40:] = False
    return valid


def _arguments(masked: bool, device: torch.device) -> tuple[Any, ...]:
    """Return the positional arguments of the kernel op; q, k and v require gradients."""
    q, k, v = (each.bfloat16().requires_grad_() for each in _inputs(device, head_dim=32))
    lists = torch.ops.compiled_sparse.sta_block_lists(
        GRID, TILE, WINDOW, TEXT.before, TEXT.after, device
    )
    mask = _key_mask(q.shape[2], device) if masked else None
    return q, k, v, *lists, mask, GRID, TILE, TILE, TEXT.before, TEXT.after, None


def _opcheck(name: str, masked: bool, device: torch.device) -> dict[str, Any]:
    arguments = _arguments(masked, device)
    if name == "sta":
        arguments = (*arguments[:3], arguments[5], GRID, TILE, WINDOW, *arguments[9:])
    operator = getattr(torch.ops.compiled_sparse, name).default
    return {"opcheck": torch.library.opcheck(operator, arguments)}


def _opcheck_backward(device: torch.device) -> dict[str, Any]:
    q, k, v, *rest = _arguments(True, device)
    tensors = tuple(each.detach() for each in (q, k, v))
    out, lse = torch.ops.compiled_sparse.block_sparse_attention(*tensors, *rest)
    operator = torch.ops.compiled_sparse.block_sparse_attention_backward.default
    gradients = (torch.randn_like(out), torch.randn_like(lse))
    arguments = (*gradients, *tensors, out, lse, *rest)
    return {"opcheck": torch.library.opcheck(operator, arguments)}


def _sta(dtype: torch.dtype, masked: bool, device: torch.device) -> dict[str, Any]:
    """Compare sliding tile attention, and its gradients, with its reference in float64."""
    inputs = _inputs(device, dtype)
    length = inputs[0].shape[2]
    mask = _key_mask(length, device) if masked else None
    weight = torch.randn_like(inputs[0])
    config = cs.STA(window_thw=WINDOW, tile_thw=TILE)

    def run(attention: Any, compute: torch.dtype) -> dict[str, Tensor]:
        leaves = [each.detach().to(compute, copy=True).requires_grad_() for each in inputs]
        keywords = {"grid_thw": GRID, "text": TEXT, "key_mask": mask, "return_lse": True}
        out, lse = attention(*leaves, config, **keywords)
        gradients = torch.autograd.grad(out, leaves, weight.to(compute))
        named = dict(zip(GRADIENTS, gradients, strict=True))
        return {"out": out.detach(), "lse": lse.detach(), **named}

    visible = token_mask(config, slice(None), length, length, GRID, TEXT, device)
    if mask is not None:
        visible = visible & mask[:, None, None, :]
    no_gradient = torch.zeros(weight.shape[:-1], device=device)
    scale = float(weight.shape[-1]) ** -0.5
    problem = Problem(*inputs, visible, weight, no_gradient, scale)
    truth = run(cs.reference.attention, torch.float64)
    errors = check_errors(run(cs.attention, dtype), truth, list(plain(problem)))
    return {"errors_over_plain": {name: round(ratio, 3) for name, ratio in errors.items()}}
