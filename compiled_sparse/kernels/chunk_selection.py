"""Selection of chunks by each query: one program for each word of 32 queries.

Selected is what lies above a level of a query's own, which is found bit by bit: nothing is sorted,
gates are read again for each bit, from the cache. Of gates at the level the first chunks are taken.
A key is a number that orders the gates that compete, at least 1, and 0 for what does not compete.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from compiled_sparse.kernels import launch

WORD = tl.constexpr(32)
NO_SPREAD = tl.constexpr(1e-6)
NO_TOTAL = tl.constexpr(1e-6)
GATE_BITS = tl.constexpr(32)
SHARE_BITS = tl.constexpr(30)
"""Bits of a key made of a float32 in 0..1, whose two highest bits are 0."""

_BLOCK: Final = 64
"""Chunks that are looked at together."""

SIZES = ["tokens", "chunks", "rows", "words", "before", "runs_before", "others"]


@triton.jit
def word_position(words):
    """Return head and word of this program."""
    program = tl.program_id(0)
    return program // words, program % words


@triton.jit
def load_gates(gates, queries, start, chunks, tokens, chunk_visible, HAS_MASK, BLOCK: tl.constexpr):
    """Return gates [BLOCK, 32] of chunks from `start` on, what counts of them, own ones, numbers.

    `queries` are the places of the queries on the grid, which of them count, and their own chunks.
    """
    place, counts, own = queries
    chunk = start + tl.arange(0, BLOCK)
    exists = chunk < chunks
    shown = exists
    if HAS_MASK:
        shown = exists & (tl.load(chunk_visible + chunk, mask=exists, other=0) != 0)
    counted = shown[:, None] & counts[None, :]
    places = gates + chunk.to(tl.int64)[:, None] * tokens + place[None, :]
    gate = tl.load(places, mask=counted, other=0.0)
    return gate, counted, chunk[:, None] == own[None, :], chunk


@triton.jit
def key_of_gate(gate):
    """Return keys in the order of any numbers; -0 is 0, NaN the least."""
    bits = (gate + 0.0).to(tl.uint32, bitcast=True)
    key = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(gate == gate, tl.maximum(key, 2), 1)


@triton.jit
def load_keys(gates, queries, start, chunks, tokens, chunk_visible, HAS_MASK, BLOCK: tl.constexpr):
    """Return the keys of gates, which are own ones, and numbers; arguments as in `load_gates`."""
    gate, counted, is_own, chunk = load_gates(
        gates, queries, start, chunks, tokens, chunk_visible, HAS_MASK, BLOCK
    )
    return tl.where(counted & ~is_own, key_of_gate(gate), 0), is_own, chunk


@triton.jit
def load_shares(
    gates,
    queries,
    start,
    chunks,
    tokens,
    chunk_visible,
    low,
    spread,
    HAS_MASK,
    BLOCK: tl.constexpr,
):
    """Return gates scaled to 0..1, their keys, which are own ones, and numbers."""
    gate, counted, is_own, chunk = load_gates(
        gates, queries, start, chunks, tokens, chunk_visible, HAS_MASK, BLOCK
    )
    share = share_of(gate, counted, low, spread)
    return share, tl.where(counted & ~is_own, key_of_share(share), 0), is_own, chunk


@triton.jit
def share_of(gate, counted, low, spread):
    """Return gates scaled to 0..1, and 0 where they do not count or are no numbers."""
    share = tl.div_rn(gate - low[None, :], spread[None, :])
    return tl.where(counted & (share == share), share, 0.0)


@triton.jit
def key_of_share(share):
    """Return keys in the order of numbers in 0..1."""
    return share.to(tl.uint32, bitcast=True) + 1


@triton.jit
def raised(level, bit, BITS: tl.constexpr):
    """Return a level with one more bit, counted from the highest."""
    return level | (tl.full([WORD], 1, tl.uint32) << (BITS - 1 - bit))


@triton.jit
def store_words(selected, chosen, chunk, chunks, words):
    """Pack what is chosen [BLOCK, 32] and store a word for each chunk."""
    bits = chosen.to(tl.uint32) << tl.arange(0, WORD)[None, :].to(tl.uint32)
    word = tl.sum(bits, 1).to(tl.int32, bitcast=True)
    tl.store(selected + chunk.to(tl.int64) * words, word, mask=chunk < chunks)


@triton.jit
def query_places(own, query_visible, word, tokens, before, HAS_MASK: tl.constexpr):
    """Return the queries of a word as `load_gates` takes them, and which are text."""
    place = word * WORD + tl.arange(0, WORD) - before
    is_video = (place >= 0) & (place < tokens)
    counts = is_video
    if HAS_MASK:
        counts = is_video & (tl.load(query_visible + place, mask=is_video, other=0) != 0)
    mine = tl.load(own + place, mask=is_video, other=-1)
    return (place, counts, mine), ~is_video


@triton.jit(do_not_specialize=SIZES)
def select_by_number(
    gates,
    own,
    chunk_visible,
    query_visible,
    selected,
    tokens,
    chunks,
    rows,
    words,
    before,
    runs_before,
    others,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Select the `others` best chunks of each query beside its own.

    `gates` is float32 [heads, chunks, tokens], `own` int32 [tokens], masks are bool [chunks] and
    [tokens], `selected` int32 [heads, rows, words], of which the rows of video are written: text
    queries select everything.
    """
    head, word = word_position(words)
    gates += head.to(tl.int64) * chunks * tokens
    selected += (head.to(tl.int64) * rows + runs_before) * words + word
    queries, is_text = query_places(own, query_visible, word, tokens, before, HAS_MASK)
    level = tl.zeros([WORD], tl.uint32)
    for bit in range(GATE_BITS):
        higher = raised(level, bit, GATE_BITS)
        reached = tl.zeros([WORD], tl.int32)
        for start in range(0, chunks, BLOCK):
            key, _, _ = load_keys(
                gates, queries, start, chunks, tokens, chunk_visible, HAS_MASK, BLOCK
            )
            reached += tl.sum((key >= higher[None, :]).to(tl.int32), 0)
        level = tl.where(reached >= others, higher, level)

    above = tl.zeros([WORD], tl.int32)
    for start in range(0, chunks, BLOCK):
        key, _, _ = load_keys(gates, queries, start, chunks, tokens, chunk_visible, HAS_MASK, BLOCK)
        above += tl.sum((key > level[None, :]).to(tl.int32), 0)
    for start in range(0, chunks, BLOCK):
        key, is_own, chunk = load_keys(
            gates, queries, start, chunks, tokens, chunk_visible, HAS_MASK, BLOCK
        )
        ties = ((key == level[None, :]) & (key > 0)).to(tl.int32)
        taken = (ties != 0) & (above[None, :] + tl.cumsum(ties, 0) <= others)
        chosen = (key > level[None, :]) | taken | is_own | is_text[None, :]
        store_words(selected, chosen, chunk, chunks, words)
        above += tl.sum(ties, 0)


@triton.jit(do_not_specialize=SIZES)
def select_by_threshold(
    gates,
    own,
    chunk_visible,
    query_visible,
    selected,
    threshold,
    tokens,
    chunks,
    rows,
    words,
    before,
    runs_before,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Select the fewest chunks of each query whose share, with its own one's, is enough.

    Arguments as in `select_by_number`; `threshold` points to a float64.
    """
    head, word = word_position(words)
    gates += head.to(tl.int64) * chunks * tokens
    selected += (head.to(tl.int64) * rows + runs_before) * words + word
    queries, is_text = query_places(own, query_visible, word, tokens, before, HAS_MASK)
    low = tl.full([WORD], float("inf"), tl.float32)
    high = tl.full([WORD], float("-inf"), tl.float32)
    for start in range(0, chunks, BLOCK):
        gate, counted, _, _ = load_gates(
            gates, queries, start, chunks, tokens, chunk_visible, HAS_MASK, BLOCK
        )
        low = tl.minimum(low, tl.min(tl.where(counted, gate, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(counted, gate, float("-inf")), 0))
    spread = tl.where(high - low > NO_SPREAD, high - low, 1.0)

    total = tl.zeros([WORD], tl.float64)
    of_own = tl.zeros([WORD], tl.float64)
    best = tl.zeros([WORD], tl.uint32)
    for start in range(0, chunks, BLOCK):
        share, key, is_own, _ = load_shares(
            gates, queries, start, chunks, tokens, chunk_visible, low, spread, HAS_MASK, BLOCK
        )
        total += tl.sum(share.to(tl.float64), 0)
        of_own += tl.sum(tl.where(is_own, share, 0.0).to(tl.float64), 0)
        best = tl.maximum(best, tl.max(key, 0))
    total += NO_TOTAL
    need = tl.maximum(tl.load(threshold) - of_own / total, 0.0)

    level = tl.zeros([WORD], tl.uint32)
    for bit in range(SHARE_BITS):
        higher = raised(level, bit, SHARE_BITS)
        reached = tl.zeros([WORD], tl.float64)
        for start in range(0, chunks, BLOCK):
            share, key, _, _ = load_shares(
                gates, queries, start, chunks, tokens, chunk_visible, low, spread, HAS_MASK, BLOCK
            )
            is_above = key >= higher[None, :]
            reached += tl.sum(tl.where(is_above, share, 0.0).to(tl.float64), 0)
        level = tl.where(reached / total >= need, higher, level)
    # One is taken where nothing is asked for.
    level = tl.maximum(tl.minimum(level, best), 1)
    at_level = (level - 1).to(tl.float32, bitcast=True).to(tl.float64)

    above = tl.zeros([WORD], tl.float64)
    count = tl.zeros([WORD], tl.int32)
    for start in range(0, chunks, BLOCK):
        share, key, _, _ = load_shares(
            gates, queries, start, chunks, tokens, chunk_visible, low, spread, HAS_MASK, BLOCK
        )
        is_above = key > level[None, :]
        above += tl.sum(tl.where(is_above, share, 0.0).to(tl.float64), 0)
        count += tl.sum(is_above.to(tl.int32), 0)
    for start in range(0, chunks, BLOCK):
        _, key, is_own, chunk = load_shares(
            gates, queries, start, chunks, tokens, chunk_visible, low, spread, HAS_MASK, BLOCK
        )
        ties = (key == level[None, :]).to(tl.int32)
        rank = tl.cumsum(ties, 0) - ties
        reached = above[None, :] + rank.to(tl.float64) * at_level[None, :]
        is_first = (count[None, :] + rank) == 0
        taken = (ties != 0) & (is_first | (reached / total[None, :] < need[None, :]))
        chosen = (key > level[None, :]) | taken | is_own | is_text[None, :]
        store_words(selected, chosen, chunk, chunks, words)
        found = tl.sum(ties, 0)
        above += found.to(tl.float64) * at_level
        count += found


@dataclass(frozen=True)
class Selection:
    """What is selected from, for the heads of one batch entry.

    Args:
        gates: float32 [heads, chunks, tokens], contiguous.
        own: int32 [tokens], the chunk of each token.
        shown: Which chunks and which tokens count, bool [chunks] and [tokens]; None for all.
        before: Text tokens in front of the video.
        runs_before: Chunks of text in front of it.
    """

    gates: Tensor
    own: Tensor
    shown: tuple[Tensor, Tensor] | None
    before: int
    runs_before: int


def select(selection: Selection, rule: int | Tensor, selected: Tensor) -> None:
    """Write the rows of video of `selected`, int32 [heads, rows, words], contiguous.

    Args:
        selection: The gates.
        rule: How many chunks beside the own one, or the threshold, float64 without axes.
        selected: Where to write.
    """
    heads, chunks, tokens = selection.gates.shape
    _, rows, words = selected.shape
    masks = selection.shown or (selection.own, selection.own)
    tensors = (selection.gates, selection.own, *masks, selected)
    sizes = (tokens, chunks, rows, words, selection.before, selection.runs_before)
    constants = {"HAS_MASK": selection.shown is not None, "BLOCK": _BLOCK}
    if isinstance(rule, int):
        launch.run(select_by_number, heads * words, (*tensors, *sizes, rule), constants)
    else:
        launch.run(select_by_threshold, heads * words, (*tensors, rule, *sizes), constants)
