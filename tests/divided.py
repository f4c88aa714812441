"""A model of which each process has a part of the tokens, beside the same model on one process."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sharded import NO_TEXT
from sharded import shard_of
from torch import Tensor
from torch import distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity
from torch.profiler import profile

import compiled_sparse as cs
from compiled_sparse.attach import Handle

EXCHANGE = "_c10d_functional::all_to_all_single"
_COLLECTIVES = (
    "all_to_all_single",
    "all_gather_into_tensor",
    "all_reduce",
    "reduce_scatter_tensor",
)


class Attention(nn.Module):
    """Self-attention as models have it."""

    def __init__(self, heads: int, key_heads: int, head_dim: int, width: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.counts = heads, key_heads, key_heads
        self.to_q = nn.Linear(width, heads * head_dim)
        self.to_k, self.to_v = (nn.Linear(width, key_heads * head_dim) for _ in range(2))
        self.to_out = nn.Linear(heads * head_dim, width)

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend among all tokens."""
        layers = self.to_q, self.to_k, self.to_v
        q, k, v = (
            layer(hidden_states).unflatten(-1, (count, -1)).transpose(1, 2)
            for layer, count in zip(layers, self.counts, strict=True)
        )
        is_grouped = self.counts[0] != self.counts[1]
        out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=is_grouped)
        return self.to_out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention with what stands around it."""

    def __init__(self, width: int, **sizes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn1 = Attention(width=width, **sizes)

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Add what is attended to."""
        return hidden_states + self.attn1(self.norm(hidden_states), mask)


class Model(nn.Module):
    """Two blocks."""

    def __init__(self, width: int = 24, **sizes: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, **sizes) for _ in range(2))

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run both."""
        for block in self.blocks:
            hidden_states = block(hidden_states, mask)
        return hidden_states


@dataclass(frozen=True, kw_only=True)
class Case:
    """What to compute.

    Args:
        policy: The policy.
        grid: Token grid of the whole video.
        text: Text on all ranks.
        heads: Query heads.
        key_heads: Key heads; 0 for as many.
        head_dim: Their size.
        attach: Whether the policy is given to `cs.attach`, with gates and projections.
        training: Whether gradients are compared.
        masked: Whether some of the text is padding.
        inner: The inner compiler.
        step: Denoising step.
        ring: Whether keys go round instead of heads being divided.
    """

    policy: Any
    grid: tuple[int, ...] = (4, 6, 5)
    text: cs.Text = NO_TEXT
    heads: int = 4
    key_heads: int = 0
    head_dim: int = 8
    attach: bool = False
    training: bool = True
    masked: bool = False
    inner: str = "aot_eager"
    step: int | None = None
    ring: bool = False

    @property
    def num_video(self) -> int:
        """Tokens of the video."""
        return self.grid[0] * self.grid[1] * self.grid[2]


@dataclass(frozen=True)
class Found:
    """How far several processes are from one.

    Args:
        errors: By name, the largest difference relative to the largest value.
        sparse: How many calls of the divided model are sparse.
        exchanges: All-to-alls of one run forward.
        others: Other collectives of it.
    """

    errors: dict[str, float]
    sparse: int
    exchanges: int
    others: int


def compare(cases: list[Case]) -> list[dict[str, Any]]:
    """Compute each case in this process alone and with the others, in every process."""
    return [vars(_compared(case)) for case in cases]


def _compared(case: Case) -> Found:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    length = case.num_video + case.text.before + case.text.after
    whole = torch.randn(2, length, 24)
    weight = torch.randn(2, length, 24)
    mask = _mask(case, length)
    single = [_run(case, _model(case), whole, weight, mask, mesh=None) if rank == 0 else None]
    distributed.broadcast_object_list(single)
    (alone,) = single
    parts = [_part(each, case, rank, size) for each in (whole, weight)]
    parts[1] = _counted_once(parts[1], case, rank)
    own_mask = None if mask is None else _part(mask.transpose(1, 3)[..., 0], case, rank, size)
    own_mask = None if own_mask is None else own_mask.transpose(1, 2)[:, None]
    torch._dynamo.reset()
    name = "ring" if case.ring else "ulysses"
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=(name,))
    divided = _run(case, _model(case), *parts, own_mask, mesh=mesh)
    errors = _errors(case, alone, divided, rank, size)
    return Found(errors, *divided["counts"])


def _mask(case: Case, length: int) -> Tensor | None:
    if not case.masked:
        return None
    mask = torch.ones(2, 1, 1, length, dtype=torch.bool)
    mask[1, ..., -2:] = False
    return mask


def _part(tensor: Tensor, case: Case, rank: int, size: int) -> Tensor:
    return shard_of(tensor[:, None], rank, size, case.text)[:, 0]


def _counted_once(weight: Tensor, case: Case, rank: int) -> Tensor:
    """Text is on all ranks: only the first one's counts in the loss."""
    weight = weight.clone()
    if rank > 0:
        weight[:, : case.text.before] = 0
        weight[:, weight.shape[1] - case.text.after :] = 0
    return weight


def _model(case: Case) -> Model:
    torch.manual_seed(1)
    key_heads = case.key_heads or case.heads
    return Model(heads=case.heads, key_heads=key_heads, head_dim=case.head_dim)


def _attached(case: Case, model: Model) -> Handle | None:
    if not case.attach:
        return None
    handle = cs.attach(model, case.policy, modules="blocks.*.attn1")
    torch.manual_seed(2)
    with torch.no_grad():
        for path in (*handle.gates, *handle.projections):
            for parameter in model.get_submodule(path).parameters():
                parameter.normal_(0.0, 0.3)
    return handle


def _run(
    case: Case, model: Model, x: Tensor, weight: Tensor, mask: Tensor | None, mesh: Any
) -> dict[str, Any]:
    _attached(case, model)
    policy = {} if case.attach else {"policy": case.policy}
    options = {**policy, "inner": case.inner, "strict": case.policy != "dense"}
    compiled: Any = torch.compile(
        model, backend="compiled_sparse", fullgraph=True, options=options, dynamic=False
    )
    x = x.clone().requires_grad_(case.training)
    with _said(case, mesh), torch.set_grad_enabled(case.training):
        compiled(x, mask)
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            out = compiled(x, mask)
        grads = {}
        if case.training:
            (out * weight).sum().backward()
            grads = {name: each.grad for name, each in model.named_parameters()}
    names = [each.key for each in recorded.key_averages() for _ in range(each.count)]
    collectives = [name for name in names if name.split("::")[-1] in _COLLECTIVES]
    functional = [name for name in collectives if name.startswith("_c10d_functional::")]
    exchanges = functional.count(EXCHANGE)
    sparse = sum(
        name.startswith("compiled_sparse::") and "_sparse_attention" in name for name in names
    )
    counts = (sparse, exchanges, len(functional) - exchanges)
    return {"out": out.detach(), "x": x.grad, "grads": grads, "counts": counts}


def _said(case: Case, mesh: Any) -> AbstractContextManager[None]:
    return cs.metadata(grid_thw=case.grid, text=case.text, mesh=mesh, step=case.step)


def _errors(
    case: Case, single: dict[str, Any], divided: dict[str, Any], rank: int, size: int
) -> dict[str, float]:
    errors = {
        "out": _error(divided["out"], _part(single["out"], case, rank, size), case, rank, size)
    }
    if not case.training:
        return errors
    expected = _part(single["x"], case, rank, size)
    given = divided["x"].clone()
    for rows in (slice(0, case.text.before), slice(given.shape[1] - case.text.after, None)):
        text = given[:, rows].contiguous()
        distributed.all_reduce(text)
        given[:, rows] = text
    errors["x"] = _error(given, expected, case, rank, size)
    # Of all of them: the gradient of a bias of keys is nothing but rounding.
    largest = max(float(grad.abs().max()) for grad in single["grads"].values())
    for name, grad in divided["grads"].items():
        distributed.all_reduce(grad)
        errors[name] = float((grad - single["grads"][name]).abs().max()) / largest
    return errors


def _error(given: Tensor, expected: Tensor, case: Case, rank: int, size: int) -> float:
    """The largest difference at rows that are no padding."""
    run = -(-case.num_video // size)
    real = max(0, min(run, case.num_video - rank * run))
    rows = torch.ones(given.shape[1], dtype=torch.bool)
    rows[case.text.before + real : case.text.before + run] = False
    difference = (given - expected)[:, rows]
    return float(difference.abs().max() / expected.abs().max()) if rows.any() else 0.0
