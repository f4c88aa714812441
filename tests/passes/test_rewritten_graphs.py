"""What a rewritten graph looks like, and what its new nodes carry."""

from __future__ import annotations

import expecttest
import torch
import torch.nn.functional as F
from modules import GRID
from modules import SPARSE_OP
from modules import RecordingBackend
from modules import Tiny
from modules import TinyDiT
from modules import all_nodes
from modules import dit_inputs
from modules import op_lines
from modules import raster
from modules import record
from modules import tokens
from modules import video
from torch import Tensor

from compiled_sparse.metadata import LayoutMetadata
from compiled_sparse.passes import SparseAttentionPass
from compiled_sparse.passes.fx import clone_dynamo_graph
from compiled_sparse.policy import as_policy


def _lines(backend: RecordingBackend) -> str:
    return "\n".join(map(op_lines, backend.after))


def test_a_static_model_holds_one_sparse_op_per_self_attention() -> None:
    backend, _ = record(TinyDiT(), *dit_inputs(), dynamic=False)
    expecttest.assert_expected_inline(
        _lines(backend),
        """\
sta_default = torch.ops.compiled_sparse.sta.default(transpose_1, transpose_2, transpose_3,
    None, [3, 4, 5], [2, 3, 2], [1, 1, 1], 0, 0, None)
out_1 = torch._C._nn.scaled_dot_product_attention(transpose_5, transpose_6, transpose_7)
sta_default_1 = torch.ops.compiled_sparse.sta.default(transpose_9, transpose_10,
    transpose_11, None, [3, 4, 5], [2, 3, 2], [1, 1, 1], 0, 0, None)
out_3 = torch._C._nn.scaled_dot_product_attention(transpose_13, transpose_14, transpose_15)""",
    )


def test_a_dynamic_model_reads_its_grid_off_the_patch_embedding() -> None:
    backend, _ = record(TinyDiT(1), *dit_inputs(), dynamic=True)
    expecttest.assert_expected_inline(
        _lines(backend),
        """\
sym_size_int = torch.ops.aten.sym_size.int(features, 2)
sym_size_int_1 = torch.ops.aten.sym_size.int(features, 3)
sym_size_int_2 = torch.ops.aten.sym_size.int(features, 4)
sta_default = torch.ops.compiled_sparse.sta.default(transpose_1, transpose_2, transpose_3,
    None, [sym_size_int, sym_size_int_1, sym_size_int_2], [2, 3, 2], [1, 1, 1], 0, 0, None)
out_1 = torch._C._nn.scaled_dot_product_attention(transpose_5, transpose_6, transpose_7)""",
    )


def test_text_and_key_padding_are_arguments_of_the_op() -> None:
    def body(m: Tiny, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return m.attn(torch.cat([raster(x), text], 1), attn_mask=mask, scale=0.5)

    inputs = (video(), tokens(1, 7), torch.ones(1, 1, 1, 67, dtype=torch.bool))
    backend, _ = record(Tiny(body), *inputs)
    expecttest.assert_expected_inline(
        _lines(backend),
        """\
sta_default = torch.ops.compiled_sparse.sta.default(transpose_1, transpose_2, transpose_3,
    getitem, [3, 4, 5], [2, 3, 2], [1, 1, 1], 0, 7, 0.5)""",
    )


def test_new_nodes_carry_values_of_exact_strides_and_the_place_of_the_call() -> None:
    backend, _ = record(TinyDiT(1), *dit_inputs(batch=2))
    (before,) = (n for n in all_nodes(backend.before[0]) if _is_self_attention(n))
    (op,) = (n for n in all_nodes(backend.after[0]) if n.target is SPARSE_OP)
    (out,) = op.users
    value = out.meta["example_value"]
    assert value.shape == before.meta["example_value"].shape
    assert value.stride() == (960, 8, 16, 1)
    assert op.meta["example_value"][1].shape == (2, 2, 60)
    for name in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        assert out.meta[name] == op.meta[name] == before.meta[name]


def _is_self_attention(node: torch.fx.Node) -> bool:
    if node.target is not F.scaled_dot_product_attention:
        return False
    query, key = (argument.meta["example_value"] for argument in node.args[:2])
    return query.shape == key.shape


def test_annotations_of_the_user_are_kept() -> None:
    def body(m: Tiny, x: Tensor) -> Tensor:
        with torch.fx.traceback.annotate({"stage": "attention"}):
            return m.attn(raster(x))

    backend, _ = record(Tiny(body), video())
    (op,) = (n for n in all_nodes(backend.after[0]) if n.target is SPARSE_OP)
    assert op.meta["custom"] == {"stage": "attention"}


def test_calls_in_nested_graphs_are_rewritten_there() -> None:
    model = TinyDiT(2, checkpoint=True)
    backend, _ = record(model, *dit_inputs())
    (graph,) = backend.after
    assert backend.count([graph], SPARSE_OP) == 2
    assert SPARSE_OP not in {node.target for node in graph.graph.nodes}
    assert backend.outcomes == ["sparse", "cross_attention"] * 2


def test_a_branch_is_searched_too_but_nothing_is_known_of_its_inputs() -> None:
    def body(m: Tiny, x: Tensor) -> Tensor:
        x = raster(x)
        return torch.cond(
            x.sum() > 0, m.attn.forward, lambda t: t.contiguous() * 1, (x.contiguous(),)
        )

    backend, _ = record(Tiny(body).requires_grad_(False), video())
    assert backend.outcomes == ["layout_unknown"]


def test_deciding_without_rewriting_leaves_the_graph_alone() -> None:
    backend, _ = record(TinyDiT(1), *dit_inputs())
    graph = clone_dynamo_graph(backend.before[0])
    decisions = SparseAttentionPass(backend.policy, rewrite=False)(graph)
    assert decisions == backend.decisions
    assert graph.code == backend.before[0].code


def test_the_key_of_the_pass_changes_with_its_settings() -> None:
    sta, dense = as_policy("sta"), as_policy("dense")
    keys = {
        SparseAttentionPass(sta).uuid(),
        SparseAttentionPass(dense).uuid(),
        SparseAttentionPass(sta, LayoutMetadata(GRID)).uuid(),
        SparseAttentionPass(sta, LayoutMetadata((5, 4, 3))).uuid(),
    }
    assert len(keys) == 4
    assert SparseAttentionPass(as_policy("sta")).uuid() in keys
