"""Compile a model, and replay it eagerly with exactly the calls replaced that became sparse."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from builders.base import Builder
from builders.base import Case
from builders.base import Grid
from builders.base import Truth
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import compiled_sparse as cs
from compiled_sparse.reference.attention import token_mask
from compiled_sparse.report import Decision

SDPA = F.scaled_dot_product_attention
TOLERANCE = 1e-5
_NOISE_DRAWS = 8
_NAMES = (
    "query",
    "key",
    "value",
    "attn_mask",
    "dropout_p",
    "is_causal",
    "scale",
    "enable_gqa",
)


def narrow(num_axes: int) -> cs.STA:
    """Return the narrowest window, so that one misplaced token changes the output."""
    window = {3: (1, 1, 1), 2: (1, 1), 1: (1,)}[num_axes]
    return cs.STA(window_thw=window, tile_thw={3: (2, 3, 2), 2: (2, 3), 1: (4,)}[num_axes])


def spanning(num_axes: int) -> cs.STA:
    """Return a window that spans any grid, cut into the same tiles as the narrow one."""
    return cs.STA(window_thw=(99,) * num_axes, tile_thw=narrow(num_axes).tile_thw)


class calls(TorchFunctionMode):  # noqa: N801 - used like a function: with calls(...)
    """Count eager attention calls, and hand each to `instead(index, arguments)`.

    Args:
        instead: Returns the call's result, or None to leave the call alone.
    """

    def __init__(self, instead: Callable[[int, dict[str, Any]], Tensor | None]) -> None:
        super().__init__()
        self.instead = instead
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Intercept attention calls; see the class."""
        kwargs = kwargs or {}
        if func is not SDPA:
            return func(*args, **kwargs)
        self.count += 1
        result = self.instead(self.count - 1, {**dict(zip(_NAMES, args, strict=False)), **kwargs})
        return func(*args, **kwargs) if result is None else result


def masked_attention(call: dict[str, Any], site: Decision, config: cs.STA) -> Tensor:
    """Return what one call gives where only the pairs that its layout allows are attended.

    The model's own mask is applied as it is, whatever the compiler recognised in it. Computed in
    float64, so that differences are those of what is compared with it.
    """
    q, k, v = (call[name].double() for name in ("query", "key", "value"))
    assert not call.get("is_causal")
    assert not call.get("dropout_p")
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    length, text = q.shape[2], cs.Text(before=site.text_before, after=site.text_after)
    allowed = token_mask(config, slice(0, length), length, length, site.grid_thw, text)
    scale = call.get("scale") or q.shape[3] ** -0.5
    scores, mask = scale * (q @ k.transpose(2, 3)), call.get("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        scores = scores + mask
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
    out = weights.masked_fill(~allowed.any(dim=-1, keepdim=True), 0.0) @ v
    return out.to(call["query"].dtype)


def replay(case: Case, sites: Sequence[Decision | None], config: cs.STA) -> Tensor:
    """Run a model eagerly with its i-th attention call replaced where `sites[i]` is a site."""

    def instead(index: int, call: dict[str, Any]) -> Tensor | None:
        site = sites[index]
        return None if site is None else masked_attention(call, site, config)

    with calls(instead) as mode:
        result = outputs(case)
    assert mode.count == len(sites), f"{mode.count} calls eagerly, {len(sites)} compiled"
    return result


def rounding_noise(case: Case, sites: Sequence[Decision | None], config: cs.STA) -> float:
    """Return how far the outputs move if every attention output is off by one rounding.

    That is a unit in the last place of its largest value, in the dtype the model attends in: some
    models attend in bfloat16 whatever their weights are, some round again further on.
    """
    generator = torch.Generator().manual_seed(0)

    def instead(index: int, call: dict[str, Any]) -> Tensor:
        site = sites[index] if sites else None
        out = SDPA(**call) if site is None else masked_attention(call, site, config)
        unit = torch.finfo(out.dtype).eps * out.abs().max()
        return out + unit * torch.randn(out.shape, generator=generator).to(out.dtype)

    expected = replay(case, sites, config) if sites else outputs(case)
    moved = []
    for _ in range(_NOISE_DRAWS):
        with calls(instead):
            moved.append(relative_error(outputs(case), expected))
    return max(moved)


def tolerance(case: Case, sites: Sequence[Decision | None], config: cs.STA, error: float) -> float:
    """Return the largest error that rounding explains; what costs time only if need be.

    Two ways to compute the same may differ by what each is off float64.
    """
    if error < TOLERANCE:
        return TOLERANCE
    noise = max(TOLERANCE, 2 * rounding_noise(case, sites, config))
    return noise if error < noise else max(noise, 2 * plain_error(case))


def plain_error(case: Case) -> float:
    """Return how far the eager dense model itself is from its outputs in float64."""
    inputs = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.inputs.items()
    }
    exact = outputs(Case(copy.deepcopy(case.model).double(), inputs))
    return relative_error(outputs(case).double(), exact)


def outputs(case: Case, run: Callable[..., Any] | None = None) -> Tensor:
    """Call a model, or what was compiled from it, and return all its outputs in one vector."""
    result = (case.model if run is None else run)(**case.inputs)
    tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return torch.cat([tensor.flatten() for tensor in tensors])


def eager_calls(case: Case) -> list[dict[str, Any]]:
    """Return the arguments of every attention call of an eager run."""
    seen: list[dict[str, Any]] = []
    with calls(lambda _index, call: seen.append(call)):
        outputs(case)
    return seen


@contextmanager
def decisions() -> Iterator[list[Decision]]:
    """Collect what the backend decides in the order in which it compiles."""
    found: list[Decision] = []
    logger = logging.getLogger("compiled_sparse")
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: found.extend(  # type: ignore[method-assign]
        value for value in record.args or () if isinstance(value, Decision)
    )
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def num_graphs() -> int:
    """Return how many graphs Dynamo has compiled since it was reset."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@dataclass
class Compiled:
    """One compiled run of a model.

    Args:
        output: All outputs in one vector.
        sites: The decision for each attention call of each graph, as they were compiled.
        executed: For each attention call that was really executed, whether it was sparse; graphs
            may be shared among layers, and what Dynamo gives up on runs without being compiled.
        graphs: Number of graphs.
    """

    output: Tensor
    sites: list[Decision]
    executed: list[bool]
    graphs: int


def compile_and_run(case: Case, policy: cs.STA | None) -> Compiled:
    """Compile a model by our backend, or by plain `eager` without a policy, and run it once."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"policy": policy, "inner": "eager"}
    ours = {"backend": "compiled_sparse", "options": options}
    compiled = torch.compile(case.model, **({"backend": "eager"} if policy is None else ours))
    with decisions() as sites:
        output = outputs(case, compiled)
    graphs = num_graphs()
    return Compiled(output, sites, executed_calls(case, compiled), graphs)


_SPARSE, _DENSE = "compiled_sparse::sta", "aten::scaled_dot_product_attention"


def executed_calls(case: Case, run: Callable[..., Any]) -> list[bool]:
    """Return, for each attention call in the order of execution, whether it is our operation.

    Calls that `nn.MultiheadAttention` makes inside are left out: no graph shows them.
    """
    found = _profiled(lambda: outputs(case, run))
    shapes = [tuple(call["query"].shape) for call in eager_calls(case)]
    if len(found) == len(shapes):
        return [name == _SPARSE for name, _ in found]
    eager = [shape for _, shape in _profiled(lambda: outputs(case))]
    hidden, position = set(), 0
    for index, shape in enumerate(eager):
        if position < len(shapes) and shape == shapes[position]:
            position += 1
        else:
            hidden.add(index)
    return [name == _SPARSE for index, (name, _) in enumerate(found) if index not in hidden]


def _profiled(run: Callable[[], Any]) -> list[tuple[str, tuple[int, ...]]]:
    """Return name and shape of the queries of each attention call, in the order of execution."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        run()
    events = [event for event in profile.events() if event.name in (_SPARSE, _DENSE)]
    outer = [event for event in events if not _is_inside(event, _SPARSE)]
    outer.sort(key=lambda event: event.time_range.start)
    return [(event.name, tuple(event.input_shapes[0])) for event in outer]


def _is_inside(event: Any, name: str) -> bool:
    parent = event.cpu_parent
    return parent is not None and (parent.name == name or _is_inside(parent, name))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest error over the largest expected value."""
    return float((actual - expected).abs().max() / expected.abs().max())


def stated_layout(site: Decision) -> tuple[Truth, Grid | None]:
    """Return the layout in the form in which builders state theirs."""
    return Truth("video", site.text_before, site.text_after), site.grid_thw


def sdpa_sites(sites: Sequence[Decision]) -> list[Decision]:
    """Return the decisions about `scaled_dot_product_attention`."""
    return [site for site in sites if site.reason != "other_attention"]


def sites_of_calls(
    run: Compiled, truths: Sequence[Truth], grid: Grid
) -> tuple[list[Decision | None], list[str]]:
    """Find the decision behind each executed call, and what is wrong about the layouts.

    Args:
        run: A compiled run.
        truths: The truth about each call.
        grid: The true grid.

    Returns:
        For each executed call its decision, None for a dense one; and one line per wrong layout.
        Where graphs are shared, any decision with the true layout will do.
    """
    if len(run.executed) != len(truths):
        return [], [f"{len(run.executed)} calls were executed, {len(truths)} expected"]
    sites = sdpa_sites(run.sites)
    is_one_to_one = [site.is_sparse for site in sites] == run.executed
    found: list[Decision | None] = []
    wrong = []
    for index, (is_sparse, truth) in enumerate(zip(run.executed, truths, strict=True)):
        candidates = [sites[index]] if is_one_to_one else sites
        matching = [s for s in candidates if s.is_sparse and stated_layout(s) == (truth, grid)]
        found.append(matching[0] if is_sparse and matching else None)
        if is_sparse and not matching:
            stated = [str(stated_layout(s)) for s in candidates if s.is_sparse]
            wrong.append(f"call {index} is {truth} on {grid}, not {' or '.join(stated)}")
    return found, wrong


def true_sites(truths: Sequence[Truth], grid: Grid) -> list[Decision | None]:
    """Return the decisions that make every call over the whole grid sparse, and no other."""
    return [
        Decision(
            path="",
            kind="",
            decision="sparse",
            grid_thw=grid,
            text_before=truth.before,
            text_after=truth.after,
        )
        if truth.kind == "video"
        else None
        for truth in truths
    ]


def truths(builder: Builder, batch: int = 1, grid: Grid | None = None) -> tuple[Truth, ...]:
    """Return the truth about each call."""
    return builder.sites(grid or builder.grid, batch)


def build(builder: Builder, batch: int = 1, grid: Grid | None = None) -> Case:
    """Build a model with the same weights and inputs each time."""
    torch.manual_seed(0)
    return builder.build(grid or builder.grid, batch)
