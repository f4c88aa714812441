"""Which key blocks sparse-linear attention selects, as functions of their own.

They take and return what the functions of the published package of these names do.
"""

from __future__ import annotations

from torch import Tensor

from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import ShapeError
from compiled_sparse.layout import ceil_div
from compiled_sparse.ops.checks import check_shapes
from compiled_sparse.ops.checks import check_tensors
from compiled_sparse.ops.sla import block_scores
from compiled_sparse.ops.tile_mean import tile_mean
from compiled_sparse.ops.top_k import top_k_blocks
from compiled_sparse.ops.video import VideoTiles
from compiled_sparse.sparsity import truncated_top_k


def mean_pool(x: Tensor, block: int) -> Tensor:
    """Return the mean of every run of tokens; the last run may be shorter.

    Args:
        x: [batch, heads, length, head_dim]; float32, bfloat16, float16 or float64.
        block: Tokens of a run.

    Returns:
        [batch, heads, ceil(length / block), head_dim] of x's dtype, summed in float32.

    Raises:
        ConfigError: if `block` is not a positive integer.
        ShapeError: if x has not four axes, or no tokens.
        DtypeError: if the dtype is not supported.
    """
    _check_block("block", block)
    _check_length("x", x)
    return tile_mean(x, grid=(x.shape[2],), tile=(block,))


def get_block_map(
    q: Tensor, k: Tensor, topk_ratio: float, block_q: int = 64, block_k: int = 64
) -> tuple[Tensor, Tensor, int]:
    """Return which key blocks each query block attends to: those whose mean key it likes best.

    Means of queries are multiplied with means of keys less their overall mean, all rounded to the
    dtype of the inputs. Of equal scores the first blocks are taken; a ratio that leaves no block
    gives one (published code gives none, and then NaN).

    Args:
        q: [batch, heads, queries, head_dim].
        k: [batch, heads, keys, head_dim].
        topk_ratio: Share of the key blocks to keep, 0 to 1; the number is cut off.
        block_q: Tokens of a query block.
        block_k: Tokens of a key block.

    Returns:
        `sparse_map` int8 [batch, heads, query blocks, key blocks], 1 where selected; `lut` int64
        [batch, heads, query blocks, topk], the selected blocks, ascending; and `topk`.

    Raises:
        ConfigError: if a block is not a positive integer.
        MetadataError: if the ratio is not from 0 to 1.
        ShapeError: if q and k do not fit each other.
        DtypeError: if the dtype is not supported, or the two differ.
        DeviceError: if the two are on different devices.
    """
    for name, block in (("block_q", block_q), ("block_k", block_k)):
        _check_block(name, block)
    for name, x in (("q", q), ("k", k)):
        _check_length(name, x)
    check_tensors(q, k, k, None, ())
    check_shapes(q, k, k, None)
    tiles = [VideoTiles([x.shape[2]], [n], 0, 0) for x, n in ((q, block_q), (k, block_k))]
    scores = block_scores(q.detach(), k.detach(), None, tiles[0], tiles[1])
    topk = truncated_top_k(ceil_div(k.shape[2], block_k), topk_ratio)
    lut = top_k_blocks(scores, topk)[0].long()
    sparse_map = scores.new_zeros(scores.shape, dtype=lut.dtype).scatter(-1, lut, 1)
    return sparse_map.char(), lut, topk


def _check_block(name: str, block: object) -> None:
    if not isinstance(block, int) or isinstance(block, bool) or block < 1:
        raise ConfigError(
            f"{name} is not a positive integer",
            got=repr(block),
            expected="tokens of a block, at least 1",
            next_step=f"pass {name}=64, for instance",
        )


def _check_length(name: str, x: Tensor) -> None:
    if x.dim() != 4 or not x.shape[2]:
        raise ShapeError(
            f"{name} has no tokens in heads",
            got=f"{name} of shape {tuple(x.shape)}",
            expected="[batch, heads, length, head_dim] with a length of at least 1",
            next_step=f"reshape {name}; heads come before length",
        )
