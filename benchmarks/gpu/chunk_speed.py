"""Time of attention over chunks that every query selects by itself, beside dense attention."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.gpu.environment import device_name
from benchmarks.gpu.peers import Attend
from benchmarks.gpu.peers import Dense
from benchmarks.gpu.peers import first_line
from benchmarks.gpu.reference import Problem
from benchmarks.gpu.reference import check_errors
from benchmarks.gpu.reference import exact
from benchmarks.gpu.reference import plain
from benchmarks.gpu.settings import CaseFunction
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.speed import DENSE
from benchmarks.gpu.speed import FLEX
from benchmarks.gpu.speed import PEER_ERRORS
from benchmarks.gpu.speed import SPARSE
from benchmarks.gpu.speed import Timed
from benchmarks.gpu.speed import cuda_clock
from benchmarks.gpu.speed import describe
from benchmarks.gpu.speed import fastest_dense_of
from benchmarks.gpu.speed import if_it_fits
from benchmarks.gpu.speed import in_turns
from benchmarks.gpu.speed import random_inputs
from benchmarks.gpu.speed import timed
from benchmarks.gpu.speed_cases import TINY
from benchmarks.gpu.speed_cases import WAN_1B
from benchmarks.gpu.speed_cases import WAN_14B
from benchmarks.gpu.speed_cases import SpeedCase
from benchmarks.timing import wall_clock
from compiled_sparse import ops
from compiled_sparse.ops.bit_masks import WORD
from compiled_sparse.ops.bit_masks import pack_bits
from compiled_sparse.reference.blocks import block_of_token

PATTERN = "chunks"
FLEX_BLOCK = 128
FLEX_NOTE = "every block partial: with selections as random as these, none is empty"


def cases(settings: Settings) -> dict[str, CaseFunction]:
    """Return the measurements by name."""
    if settings.quick:
        shapes = [(TINY, (2, 3, 3), 0.5)]
    else:
        # Two frames, a part of a few frames, few tokens.
        shapes = [
            (WAN_14B, (2, 45, 80), 0.75),
            (WAN_1B, (7, 15, 13), 0.75),
            (WAN_1B, (3, 8, 4), 0.9),
        ]
    chosen = [
        SpeedCase(shape, tile, sparsity, direction, PATTERN)
        for shape, tile, sparsity in shapes
        for direction in ("forward", "backward")
    ]
    return {
        case.name: functools.partial(if_it_fits, measure, case, settings.device) for case in chosen
    }


def measure(case: SpeedCase, device: str) -> dict[str, Any]:
    """Check a case on a few rows, then time it beside its peers, all in turns.

    Returns:
        The case's part of the record.

    Raises:
        AssertionError: if the rows are wrong; nothing is timed then.
    """
    generator = torch.Generator(device).manual_seed(0)
    inputs = random_inputs(case.shape, generator)
    selected, pairs = _selection(case, generator)
    attend = functools.partial(_attend, case, selected)
    errors = _check_rows(case, inputs, selected)
    clock = cuda_clock() if device == "cuda" else wall_clock
    functions: Timed = {SPARSE: timed(case, lambda *qkv: attend(*qkv)[0], inputs)}
    notes: dict[str, Any] = {FLEX: FLEX_NOTE}
    dense = fastest_dense_of(case, inputs, clock)
    name = None
    if isinstance(dense, Dense):
        functions[DENSE], name = timed(case, dense, inputs), dense.name
        notes[DENSE] = {"milliseconds": dense.milliseconds, "not run": dense.errors}
    else:
        notes[DENSE] = dense
    try:
        functions[FLEX] = timed(case, _flex(case, selected, compiled=device == "cuda"), inputs)
    except PEER_ERRORS as error:
        notes[FLEX] = first_line(error)
    seconds, broken = in_turns(functions, clock)
    result = describe(case, pairs, seconds, device_name(device))
    return {
        **result,
        "dense_backend": name,
        "peers": notes | broken,
        "moving_tokens": None,
        "errors_over_plain": errors,
    }


def _selection(case: SpeedCase, generator: torch.Generator) -> tuple[Tensor, int]:
    """Return random chunks for every query, and how many pairs of tokens they make."""
    layout, words, pairs = case.layout, [], 0
    sizes = torch.tensor(layout.block_sizes, device=generator.device)
    for _ in range(case.shape.heads):  # one at a time: scores take more memory than their bits
        shape = (layout.num_tokens, layout.num_blocks)
        scores = torch.rand(shape, generator=generator, device=generator.device)
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen.scatter_(1, scores.topk(case.selected, dim=1).indices, value=True)
        pairs += int((chosen.sum(0) * sizes).sum())
        words.append(pack_bits(chosen.mT))
    return torch.stack(words)[None], pairs


def _attend(
    case: SpeedCase, selected: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    layout = case.layout
    return ops.chunk_sparse_attention(
        q,
        k,
        v,
        selected,
        grid=layout.grid,
        tile=layout.tile,
        text_before=layout.text_before,
        text_after=layout.text_after,
    )


def _check_rows(
    case: SpeedCase, inputs: tuple[Tensor, Tensor, Tensor], selected: Tensor
) -> dict[str, float]:
    """Check the first, middle and last query of the first and last head."""
    out, lse = _attend(case, selected, *inputs)
    last = case.layout.num_tokens - 1
    rows = torch.tensor([0, last // 2, last], device=out.device)
    chunks = block_of_token(case.layout).to(out.device)
    worst = {"out": 0.0, "lse": 0.0}
    for head in (0, case.shape.heads - 1):
        q, k, v = (each[:, head : head + 1] for each in inputs)
        bits = selected[:, head : head + 1, :, rows // WORD] >> (rows % WORD) & 1
        mask = bits.bool().mT[..., chunks]
        nothing = torch.zeros_like(q[:, :, rows])
        scale = float(q.shape[-1]) ** -0.5
        problem = Problem(q[:, :, rows], k, v, mask, nothing, nothing[..., 0].float(), scale)
        results = {"out": out[:, head : head + 1, rows], "lse": lse[:, head : head + 1, rows]}
        ratios = check_errors(results, exact(problem), list(plain(problem)))
        worst = {name: max(worst[name], round(ratio, 3)) for name, ratio in ratios.items()}
    return worst


def _flex(case: SpeedCase, selected: Tensor, *, compiled: bool) -> Attend:
    """Return flex_attention with a mask function that looks the selection up."""
    chunks = block_of_token(case.layout).to(selected.device)
    blocks = -(-case.layout.num_tokens // FLEX_BLOCK)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        word = selected[batch, head, chunks[key], query // WORD]
        return (word >> (query % WORD) & 1) == 1

    every = torch.arange(blocks, device=selected.device, dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(
        torch.full((1, 1, blocks), blocks, device=selected.device, dtype=torch.int32),
        every.expand(1, 1, blocks, blocks).contiguous(),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(case.layout.num_tokens, case.layout.num_tokens),
    )
    attend = flex_attention
    if compiled:
        torch._dynamo.reset()
        attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return lambda q, k, v: attend(q, k, v, block_mask=mask)
