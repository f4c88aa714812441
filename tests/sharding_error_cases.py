"""The wording of the errors about divided sequences; see `test_messages.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from dividing import GRID
from dividing import RUN
from dividing import STA
from dividing import Single
from dividing import explained
from dividing import moba_over_heads
from dividing import sequence
from messages import Case
from process_groups import lone_group
from torch import distributed

from compiled_sparse.config import MechanismConfig
from compiled_sparse.distributed.layers import DistributedAttention
from compiled_sparse.distributed.layers import Replicated
from compiled_sparse.errors import DistributedError
from compiled_sparse.errors import ShapeError
from compiled_sparse.sharding import sequence_group

MODULES = ("distributed/layers", "passes/divided", "sharding")


def divide_along_two() -> None:
    with lone_group(4):
        sequence_group(
            distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
        )


def ring_in_a_layer() -> None:
    with lone_group(2):
        mesh = distributed.init_device_mesh("cpu", (2, 1), mesh_dim_names=("ring", "ulysses"))
        DistributedAttention(STA, mesh, grid_thw=GRID)


def attend_in_a_layer(config: MechanismConfig = STA, rows: int = RUN, text: int = 0) -> None:
    """Attend on the first of two ranks; keys of the text are one more than queries."""
    tokens, words, more = (torch.zeros(1, n, 2, 8) for n in (rows, text, text + 1))
    replicated = Replicated(words, more, more) if text else None
    with lone_group(2):
        layer = DistributedAttention(config, distributed.group.WORLD, grid_thw=GRID)
        layer(tokens, tokens, tokens, replicated=replicated)


def with_text_as_keys(x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Queries of the video alone, keys of the text, too."""
    query, keys = x[:, None], torch.cat([x, text], 1)[:, None]
    return F.scaled_dot_product_attention(query, keys, keys)


def frame_by_frame(x: torch.Tensor) -> torch.Tensor:
    """Attend in each of two frames."""
    frames = x.unflatten(1, (2, -1))
    return F.scaled_dot_product_attention(frames, frames, frames)


CAUSAL = Single(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
MASKED = Single(
    lambda q, k, v: F.scaled_dot_product_attention(q, k, v, q.new_ones(1, 1, 1, RUN) > 0)
)
DROPPING = Single(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.5))
FLASH = Single(lambda *qkv: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*qkv)[0])

UNPROVEN = (
    "attends to this rank's tokens only, and nothing can be put around it",
    "with a mask [batch, 1, 1, length] at most",
    "compiled_sparse.distributed.DistributedAttention",
)

CASES = {
    "mesh of a sequence": Case(
        DistributedError,
        "the mesh divides the sequence along several dimensions",
        "dimensions ('ring', 'ulysses') of sizes (2, 2)",
        "one dimension longer than 1",
        'mesh["ulysses"]',
        divide_along_two,
    ),
    "processes of a sequence": Case(
        DistributedError,
        "this names no processes",
        "'cpu'",
        "DeviceMesh or ProcessGroup that this process is in",
        "init_device_mesh(",
        lambda: sequence_group("cpu"),
    ),
    "heads on several ranks": Case(
        DistributedError,
        "cannot have its heads on several ranks",
        "vmoba:",
        "depends on that head alone",
        'moba_threshold_type="query_head" or "head_global"',
        lambda: attend_in_a_layer(moba_over_heads("overall")),
    ),
    "ring of a layer": Case(
        DistributedError,
        "this layer divides heads",
        'a mesh with a dimension called "ring"',
        "among which heads are divided",
        "compiled_sparse.distributed.ring_attention",
        ring_in_a_layer,
    ),
    "rows of a layer": Case(
        ShapeError,
        "another number of the video's tokens",
        "q of shape (1, 120, 2, 8)",
        "[batch, 60, heads, head_dim]: grid (4, 6, 5) on 2 ranks",
        "pad the tokens at the end to a multiple of the ranks",
        lambda: attend_in_a_layer(rows=120),
    ),
    "text of a layer": Case(
        ShapeError,
        "the replicated tokens are not one text",
        "shapes (1, 7, 2, 8), (1, 8, 2, 8), (1, 8, 2, 8)",
        "[batch, text tokens, heads, head_dim], equally many",
        "of the same tokens, the same on all ranks",
        lambda: attend_in_a_layer(text=7),
    ),
    "tokens of a divided call": Case(
        DistributedError,
        "tokens are divided, and a call has others",
        "67 tokens in the call, no text given",
        "60 tokens of the video (120 on 2 ranks), and the text's",
        "say in cs.metadata(text=cs.Text(...))",
        lambda: explained(Single(), sequence(67)),
    ),
    "keys of a divided call": Case(
        DistributedError,
        UNPROVEN[0],
        "cross_attention: 67 keys, 60 queries",
        *UNPROVEN[1:],
        lambda: explained(with_text_as_keys, sequence(), sequence(7)),
    ),
    "frames of a divided call": Case(
        DistributedError,
        UNPROVEN[0],
        "partial_grid: 30 of 60 tokens at a time",
        *UNPROVEN[1:],
        lambda: explained(frame_by_frame, sequence()),
    ),
    "form of a divided call": Case(
        DistributedError,
        UNPROVEN[0],
        "causal: is_causal=True",
        *UNPROVEN[1:],
        lambda: explained(CAUSAL, sequence()),
    ),
    "mask of a call in a ring": Case(
        DistributedError,
        UNPROVEN[0],
        "mask_unsupported: a mask, in a ring",
        *UNPROVEN[1:],
        lambda: explained(MASKED, sequence(), ring=True),
    ),
    "dropout of a call in a ring": Case(
        DistributedError,
        UNPROVEN[0],
        "dropout: dropout, in a ring",
        *UNPROVEN[1:],
        lambda: explained(DROPPING, sequence(), ring=True),
    ),
    "run of a call in a ring": Case(
        DistributedError,
        UNPROVEN[0],
        "ring_unsupported: dense on grid (3, 5, 5): 75 tokens in tiles of 1 on 2 ranks",
        *UNPROVEN[1:],
        lambda: explained(Single(), sequence(38), grid=(3, 5, 5), ring=True),
    ),
    "kernel of a divided call": Case(
        DistributedError,
        UNPROVEN[0],
        "other_attention: _scaled_dot_product_flash_attention_for_cpu",
        *UNPROVEN[1:],
        lambda: explained(FLASH, sequence()),
    ),
}
