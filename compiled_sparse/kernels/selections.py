"""Which queries of a segment selected a chunk, found among bits without a list of them.

A segment is up to `1 << LEVELS` words of a chunk's row of bits, 32 queries each. Ranks number the
bits that are set: the work that follows grows with them, not with the segment. A program has
scratch memory for what its threads tell each other.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ones(word):
    """Return the number of bits set in each uint32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def count_selected(row, first_word, segment, length, scratch, LEVELS: tl.constexpr):
    """Return how many queries of a segment selected a chunk, ready for `query_of_rank`.

    What the threads of a program stored before is seen by all of them after it, if there are any.

    Args:
        row: Pointer to the words of the chunk.
        first_word: Where the segment begins.
        segment: How many words it has at most.
        length: Number of queries; bits behind them do not count.
        scratch: int32, `1 << LEVELS` of them.
        LEVELS: So many that no segment is longer.
    """
    place = tl.arange(0, 1 << LEVELS)
    bits = length - (first_word + place) * 32
    word = tl.load(row + first_word + place, mask=(place < segment) & (bits > 0), other=0)
    unused = 32 - tl.minimum(tl.maximum(bits, 1), 32)
    in_use = tl.full([1 << LEVELS], 0xFFFFFFFF, tl.uint32) >> unused.to(tl.uint32)
    set_bits = ones(word.to(tl.uint32, bitcast=True) & in_use)
    count = tl.sum(set_bits, 0)
    if count > 0:
        tl.debug_barrier()  # other threads may still search among the last ranks
        tl.store(scratch + place, tl.cumsum(set_bits, 0))
        tl.debug_barrier()
    return count


@triton.jit
def query_of_rank(row, first_word, scratch, rank, count, LEVELS: tl.constexpr):
    """Return the query of each rank, and whether there is one: `rank < count`.

    Arguments as in `count_selected`, which was called before and returned `count`.
    """
    word = tl.zeros_like(rank)
    before = tl.zeros_like(rank)
    for level in tl.static_range(LEVELS):
        width = 1 << (LEVELS - 1 - level)
        rank_behind = tl.load(scratch + word + (width - 1))
        is_behind = rank_behind <= rank
        word = tl.where(is_behind, word + width, word)
        before = tl.where(is_behind, rank_behind, before)
    valid = rank < count
    word += first_word
    bits = tl.load(row + word, mask=valid, other=0).to(tl.uint32, bitcast=True)
    return word * 32 + bit_of_rank(bits, rank - before), valid


@triton.jit
def bit_of_rank(word, rank):
    """Return which bit of a uint32 is the one with `rank` set bits below it."""
    bit = tl.zeros_like(rank)
    for step in tl.static_range(5):
        width = 16 >> step
        below = ones(word & ((1 << width) - 1))
        above = rank >= below
        rank = tl.where(above, rank - below, rank)
        word = tl.where(above, word >> width, word)
        bit = tl.where(above, bit + width, bit)
    return bit


@triton.jit
def remember(scratch, query, valid):
    """Store the queries of a tile in `scratch`, for `recalled`."""
    tl.debug_barrier()  # other threads may still read the last ones
    tl.store(scratch + tl.arange(0, query.shape[0]), tl.where(valid, query, -1))
    tl.debug_barrier()


@triton.jit
def recalled(scratch, SIZE: tl.constexpr):
    """Return the queries of a tile, and whether there is one, once more.

    So no thread holds them and the addresses of their rows while keys pass by: they would be more
    than there are registers for.
    """
    query = tl.load(scratch + tl.arange(0, SIZE))
    return query, query >= 0
