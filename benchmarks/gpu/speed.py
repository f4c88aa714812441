"""Time of the kernel beside dense attention and flex_attention; sampled rows are checked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bounds import BACKWARD_FACTOR
from benchmarks.gpu.bounds import bound
from benchmarks.gpu.environment import device_name
from benchmarks.gpu.environment import peaks
from benchmarks.gpu.peers import Attend
from benchmarks.gpu.peers import Clock
from benchmarks.gpu.peers import Dense
from benchmarks.gpu.peers import TileOrder
from benchmarks.gpu.peers import fastest_dense
from benchmarks.gpu.peers import first_line
from benchmarks.gpu.peers import flex_attend
from benchmarks.gpu.peers import flex_order
from benchmarks.gpu.peers import gradient_call
from benchmarks.gpu.reference import check_errors
from benchmarks.gpu.reference import exact
from benchmarks.gpu.reference import gather_rows
from benchmarks.gpu.reference import gathered_problem
from benchmarks.gpu.reference import plain
from benchmarks.gpu.settings import CaseFunction
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.settings import SkippedError
from benchmarks.gpu.speed_cases import Shape
from benchmarks.gpu.speed_cases import SpeedCase
from benchmarks.gpu.speed_cases import quick_cases
from benchmarks.gpu.speed_cases import speed_cases
from benchmarks.gpu.variants import variant
from benchmarks.timing import interleaved_medians
from benchmarks.timing import wall_clock
from compiled_sparse import ops
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops.plan import sta_lists
from compiled_sparse.ops.quantized import HEAD_DIMS

Timed = dict[str, Callable[[], Any]]

SECONDS_PER_CASE = 3.0
ROUNDS = (3, 20)
SPARSE, DENSE, FLEX = "compiled_sparse", "dense", "flex_attention"
BOXES = "compiled_sparse, boxes"
QUANTIZED = "compiled_sparse, quantised"
QUANTIZED_TOLERANCE = 0.1
"""Relative distance of quantised attention from unquantised, on normally distributed inputs."""

PEER_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError)

_dense_of: dict[tuple[Shape, str], Dense | str] = {}
"""The fastest dense backend by shape and direction: the same for all sparsities."""


def cases(settings: Settings) -> dict[str, CaseFunction]:
    """Return the measurements by name, the most important first."""
    chosen = quick_cases() if settings.quick else speed_cases()
    return {
        case.name: functools.partial(if_it_fits, measure, case, settings.device) for case in chosen
    }


Measure = Callable[[SpeedCase, str], dict[str, Any]]


def if_it_fits(measure: Measure, case: SpeedCase, device: str) -> dict[str, Any]:
    """Measure a case.

    Raises:
        SkippedError: if the memory is too small.
    """
    try:
        return measure(case, device)
    except torch.OutOfMemoryError as error:
        raise SkippedError(first_line(error)) from error


def measure(case: SpeedCase, device: str) -> dict[str, Any]:
    """Check a case on sampled rows, then time it beside its peers, all in turns.

    Returns:
        The case's part of the record.

    Raises:
        AssertionError: if the sampled rows are wrong; nothing is timed then.
    """
    generator = torch.Generator(device).manual_seed(0)
    inputs = random_inputs(case.shape, generator)
    indices, counts = block_lists(case, generator)
    attend = functools.partial(_attend, case.layout, indices, counts)
    errors = check_rows(case, inputs, indices, counts)
    clock = cuda_clock() if device == "cuda" else wall_clock
    functions: Timed = {SPARSE: timed(case, attend, inputs)}
    if case.direction == "forward" and device == "cuda":
        with variant("boxes", torch.device(device)):
            check_rows(case, inputs, indices, counts)
        functions[BOXES] = _in_variant("boxes", device, functions[SPARSE])
    if case.direction == "forward" and case.shape.head_dim in HEAD_DIMS:
        in_eight_bits = functools.partial(_attend_quantized, case.layout, indices, counts)
        _check_quantized(in_eight_bits(*inputs), attend(*inputs))
        functions[QUANTIZED] = timed(case, in_eight_bits, inputs)
    notes: dict[str, Any] = {}
    dense = fastest_dense_of(case, inputs, clock)
    if isinstance(dense, Dense):
        functions[DENSE] = timed(case, dense, inputs)
        notes[DENSE] = {"milliseconds": dense.milliseconds, "not run": dense.errors}
    else:
        notes[DENSE] = dense
    flex, notes[FLEX] = _flex(case, inputs, indices, counts, compiled=device == "cuda")
    functions |= flex
    moves = _moves(case, inputs, indices, counts) if case.moves else {}
    seconds, broken = in_turns(functions | moves, clock)
    moved = _moving_tokens({name: seconds.pop(name) for name in moves if name in seconds}, seconds)
    result = describe(case, _pairs(case, indices, counts), seconds, device_name(device))
    name = dense.name if isinstance(dense, Dense) else None
    return {
        **result,
        "dense_backend": name,
        "peers": notes | broken,
        "moving_tokens": moved,
        "errors_over_plain": errors,
    }


def random_inputs(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k and v in [batch, length, heads, head_dim] memory, as models have them."""
    length = torch.Size(shape.grid).numel() + shape.text
    sizes = (1, length, shape.heads, shape.head_dim)

    def random() -> Tensor:
        values = torch.randn(
            sizes, generator=generator, device=generator.device, dtype=torch.bfloat16
        )
        return values.transpose(1, 2)

    return random(), random(), random()


def block_lists(case: SpeedCase, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the lists of a case: random and sorted for each head, or those of sliding tiles."""
    layout, device = case.layout, generator.device
    if case.pattern == "sta":
        return sta_lists(layout, (case.window,), device)
    blocks = layout.num_blocks
    scores = torch.rand(1, case.shape.heads, blocks, blocks, generator=generator, device=device)
    indices = scores.topk(case.selected, dim=-1).indices.sort(dim=-1).values.int()
    return indices, torch.full(indices.shape[:-1], case.selected, device=device).int()


def _pairs(case: SpeedCase, indices: Tensor, counts: Tensor) -> int:
    """Count the attended token pairs of all heads."""
    sizes = torch.tensor(case.layout.block_sizes, device=indices.device)
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    keys = (sizes[indices.long()] * listed).sum(-1)
    return int((keys * sizes).sum()) * (case.shape.heads // indices.shape[1])


def _attend(
    layout: BlockLayout, indices: Tensor, counts: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    return _attend_with_lse(layout, indices, counts, q, k, v)[0]


def _attend_with_lse(
    layout: BlockLayout, indices: Tensor, counts: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    return ops.block_sparse_attention(
        q,
        k,
        v,
        indices,
        counts,
        grid=layout.grid,
        q_tile=layout.tile,
        kv_tile=layout.tile,
        text_before=layout.text_before,
        text_after=layout.text_after,
    )


def _attend_quantized(
    layout: BlockLayout, indices: Tensor, counts: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    return ops.quantized_block_sparse_attention(
        q,
        k,
        v,
        indices,
        counts,
        grid=layout.grid,
        q_tile=layout.tile,
        kv_tile=layout.tile,
        text_before=layout.text_before,
        text_after=layout.text_after,
    )[0]


def _check_quantized(out: Tensor, unquantized: Tensor) -> None:
    norm = torch.linalg.vector_norm
    off = norm(out - unquantized, dtype=torch.float32) / norm(unquantized, dtype=torch.float32)
    assert float(off) <= QUANTIZED_TOLERANCE, f"quantised: relative distance {float(off):.2f}"


def check_rows(
    case: SpeedCase, inputs: tuple[Tensor, Tensor, Tensor], indices: Tensor, counts: Tensor
) -> dict[str, float]:
    """Check first, middle and last query block of the first and last head.

    Raises:
        AssertionError: if something is wrong.
    """
    layout = case.layout
    out, lse = _attend_with_lse(layout, indices, counts, *inputs)
    last = layout.num_blocks - 1
    rows = torch.tensor([0, last // 2, last], device=out.device)
    worst = {"out": 0.0, "lse": 0.0}
    for head in (0, case.shape.heads - 1):
        of_lists = min(head, indices.shape[1] - 1)
        gathered = gather_rows(indices[0, of_lists], counts[0, of_lists], rows, layout, layout)
        zeros = torch.zeros_like(out[0, head])
        tensors = (inputs[0][0, head], inputs[1][0, head], inputs[2][0, head])
        problem = gathered_problem(tensors, zeros, zeros[:, 0].float(), gathered)
        queries, padding = gathered.queries.clamp_min(0), (gathered.queries < 0)[:, None]
        results = {
            "out": out[0, head][queries][:, None].masked_fill(padding[..., None], 0.0),
            "lse": lse[0, head][queries][:, None].masked_fill(padding, float("-inf")),
        }
        ratios = check_errors(results, exact(problem), list(plain(problem)))
        worst = {name: max(worst[name], round(ratio, 3)) for name, ratio in ratios.items()}
    return worst


_LAUNCH_CYCLES = 2_000_000


def cuda_clock() -> Clock:
    """Return a clock that times with events, after emptying the L2 cache."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    flush = torch.empty(max(4 * l2_bytes, 2**28), dtype=torch.uint8, device="cuda")

    def clock(function: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(_LAUNCH_CYCLES)  # the host gets ahead: its time is not the kernels'
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    return clock


def timed(
    case: SpeedCase, attend: Attend, inputs: tuple[Tensor, Tensor, Tensor]
) -> Callable[[], Any]:
    """What is timed of an implementation: its forward without gradients, or its backward alone."""
    if case.direction == "backward":
        return gradient_call(attend, inputs, torch.randn_like(inputs[0]))

    def forward() -> None:
        with torch.no_grad():
            attend(*inputs)

    return forward


def _in_variant(name: str, device: str, function: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        with variant(name, torch.device(device)):
            return function()

    return call


def fastest_dense_of(
    case: SpeedCase, inputs: tuple[Tensor, Tensor, Tensor], clock: Clock
) -> Dense | str:
    """Return the fastest dense backend for the shape and direction of a case, or why none is."""
    key = (case.shape, case.direction)
    if key not in _dense_of:
        _dense_of[key] = fastest_dense(inputs, case.direction, clock)
    return _dense_of[key]


def _flex(
    case: SpeedCase,
    inputs: tuple[Tensor, Tensor, Tensor],
    indices: Tensor,
    counts: Tensor,
    *,
    compiled: bool,
) -> tuple[Timed, str]:
    """Return flex_attention with the same lists on moved tokens, and what to know about it."""
    order, note = flex_order(case.layout, indices.device)
    moved = tuple(order.move(each).contiguous() for each in inputs)
    try:
        attend = flex_attend(order, indices, counts, compiled=compiled)
        function = timed(case, attend, (moved[0], moved[1], moved[2]))
    except PEER_ERRORS as error:
        return {}, first_line(error)
    return {FLEX: function}, note


def _moves(
    case: SpeedCase, inputs: tuple[Tensor, Tensor, Tensor], indices: Tensor, counts: Tensor
) -> Timed:
    """The other way to attend to tiles: move the tokens, attend to runs, move back."""
    order = TileOrder.of(case.layout, indices.device)
    moved = tuple(order.move(each) for each in inputs)
    runs = order.runs(indices, counts)
    place = order.place_of_tokens()
    back = moved[0].transpose(1, 2)
    return {
        "moving there": lambda: [order.move(each) for each in inputs],
        "kernel on runs": lambda: runs(*moved),
        "moving back": lambda: back.index_select(1, place),
    }


def _moving_tokens(moves: dict[str, float], seconds: dict[str, float]) -> dict[str, float] | None:
    if len(moves) < 3:
        return None
    total = sum(moves.values())
    parts = {"in place": seconds[SPARSE], **moves, "total": total}
    milliseconds = {name: 1e3 * value for name, value in parts.items()}
    return {**milliseconds, "total over in place": total / seconds[SPARSE]}


def in_turns(functions: Timed, clock: Clock) -> tuple[dict[str, float], dict[str, str]]:
    """Time in turns what runs at all; an error of a peer is noted, one of the kernel raises."""
    working: Timed = {}
    broken: dict[str, str] = {}
    total = 0.0
    for name, function in functions.items():
        try:
            function()
            total += clock(function)
            working[name] = function
        except PEER_ERRORS as error:
            if name == SPARSE:
                raise
            broken[name] = first_line(error)
    least, most = ROUNDS
    rounds = min(max(least, int(SECONDS_PER_CASE / total)), most)
    return interleaved_medians(working, rounds, clock=clock, warm_up_seconds=0), broken


def describe(case: SpeedCase, pairs: int, seconds: dict[str, float], chip: str) -> dict[str, Any]:
    """Return what follows from the times: rates, ratios, and how near they are to the limits."""
    shape, layout = case.shape, case.layout
    tokens = layout.num_tokens
    every = shape.heads * tokens**2
    is_backward = case.direction == "backward"
    flop = 4 * shape.head_dim * (BACKWARD_FACTOR if is_backward else 1)
    tflops = {
        name: flop * (every if name == DENSE else pairs) / value / 1e12
        for name, value in seconds.items()
    }
    peak = peaks(chip)[0]
    over_dense = {n: seconds[DENSE] / s for n, s in seconds.items()} if DENSE in seconds else {}
    return {
        "shape": f"B1 H{shape.heads} L{tokens} D{shape.head_dim} bfloat16",
        "grid": list(shape.grid),
        "text": shape.text,
        "tile": list(case.tile),
        "window": list(case.window) if case.pattern == "sta" else None,
        "direction": case.direction,
        "pattern": case.pattern,
        "blocks": layout.num_blocks,
        "listed_blocks": case.selected if case.pattern == "random" else None,
        "padding_ratio": layout.padding_ratio,
        "pairs": pairs,
        "density": pairs / every,
        "bound": bound(
            pairs=pairs,
            tokens=tokens,
            heads=shape.heads,
            head_dim=shape.head_dim,
            backward=is_backward,
            chip=chip,
        ),
        "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
        "tflops": tflops,
        "mfu": {n: None if peak is None else rate / peak for n, rate in tflops.items()},
        "speed_up_over_dense": over_dense,
        "limit": every / pairs,
        "fraction_of_limit": {n: ratio * pairs / every for n, ratio in over_dense.items()},
    }
