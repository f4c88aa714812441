"""What the graph of a divided model looks like."""

from __future__ import annotations

import expecttest
import torch
from divided import Model
from modules import RecordingBackend
from modules import op_lines
from process_groups import lone_group
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

import compiled_sparse as cs

STA = cs.STA(window_thw=(1, 1, 3), tile_thw=(2, 3, 2))


def _graph(*, ring: bool) -> str:
    """A graph of one process of two, traced without the other."""
    backend = RecordingBackend(STA)
    model = Model(heads=3, key_heads=3, head_dim=8)
    model.blocks = model.blocks[:1]
    with lone_group(2):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ring" if ring else "ulysses",))
        assert mesh.get_group() is not None
        grid = (4, 6, 5)
        with cs.metadata(grid_thw=grid, text=cs.Text(after=3), mesh=mesh), torch.no_grad():
            compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
            compiled(torch.randn(1, 63, 24))
    assert not distributed.is_initialized()
    return "\n".join(map(op_lines, backend.after))


def test_exchanges_stand_around_the_op_of_some_heads_and_all_tokens() -> None:
    expecttest.assert_expected_inline(
        _graph(ring=False),
        """\
scatter_heads_default = torch.ops.compiled_sparse.scatter_heads.default([q, k, v], '0', 2,
    0, 120, 0, 3)
sta_default = torch.ops.compiled_sparse.sta.default(getitem, getitem_1, getitem_2, None, [4,
    6, 5], [2, 3, 2], [1, 1, 3], 0, 3, None)
gather_heads_default = torch.ops.compiled_sparse.gather_heads.default(getitem_3, q, 3, '0',
    2, 0, 0, 3)""",
    )


def test_a_ring_is_one_op_over_the_tokens_at_hand() -> None:
    expecttest.assert_expected_inline(
        _graph(ring=True),
        """\
ring_attention_default = torch.ops.compiled_sparse.ring_attention.default(q, k, v, None,
    'sta', [4, 6, 5], [2, 3, 2], [1, 1, 3], 2, 0, '0', 0, 3, None)""",
    )
