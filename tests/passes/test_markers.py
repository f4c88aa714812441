"""Markers in graphs: which call each speaks for, and that none is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from modules import GRID
from modules import POLICY
from modules import SPARSE_OP
from modules import Attention
from modules import RecordingBackend
from modules import all_nodes
from modules import assert_close
from modules import compile_sparse
from modules import expected_output
from modules import record
from modules import tokens
from torch import Tensor
from torch import nn
from torch.utils.checkpoint import checkpoint

import compiled_sparse as cs
from compiled_sparse.passes.markers import Markers

pytestmark = pytest.mark.usefixtures("fresh_compiler")

OPS = torch.ops.compiled_sparse
WIDER = cs.STA(window_thw=(1, 3, 1), tile_thw=(2, 3, 2))
MARKERS = (OPS.bind, OPS.bind.default, OPS.bind_layout, OPS.bind_layout.default)


def markers_in(backend: RecordingBackend, graphs: list[Any]) -> int:
    return sum(backend.count(graphs, target) for target in MARKERS)


def mechanisms(backend: RecordingBackend) -> list[str]:
    return [decision.mechanism for decision in backend.decisions]


class Two(nn.Module):
    """Two attention modules, the second of which is called twice."""

    def __init__(self, *, is_checkpointed: bool = False) -> None:
        super().__init__()
        self.first = Attention()
        self.second = Attention()
        self.is_checkpointed = is_checkpointed

    def forward(self, x: Tensor) -> Tensor:
        """Attend three times."""
        for module in (self.first, self.second, self.second):
            if self.is_checkpointed:
                x = checkpoint(module, x, use_reentrant=False)
            else:
                x = module(x)
        return x


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_each_marker_speaks_for_its_own_calls_and_is_erased(is_checkpointed: bool) -> None:
    model = Two(is_checkpointed=is_checkpointed)
    cs.attach(model, {"first": WIDER, "second": POLICY}, modules=["first", "second"])
    backend, _ = record(model, tokens().requires_grad_(), policy="dense", grid_thw=GRID)
    assert mechanisms(backend) == [WIDER.describe(), POLICY.describe(), POLICY.describe()]
    assert {decision.config_origin for decision in backend.decisions} == {"module"}
    assert markers_in(backend, backend.before) == 3
    assert markers_in(backend, backend.after) == 0
    assert backend.count(backend.after, SPARSE_OP) == 3


def test_markers_of_dense_calls_are_erased_too() -> None:
    model = Two()
    cs.attach(model, "dense", modules=["first", "second"])
    backend, actual = record(model, tokens(), grid_thw=GRID)
    assert backend.outcomes == ["policy_dense"] * 3
    assert markers_in(backend, backend.after) == 0
    assert actual.isfinite().all()


def test_the_innermost_module_has_the_word() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()
            self.other = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.attn(x))

    model = nn.ModuleDict({"outer": Outer()})["outer"]
    cs.sparse(WIDER)(model)
    cs.sparse(POLICY)(model.attn)
    backend, _ = record(model, tokens(), policy="dense", grid_thw=GRID)
    assert mechanisms(backend) == [POLICY.describe(), WIDER.describe()]


def test_a_marker_speaks_for_no_module_of_a_similar_name() -> None:
    model = nn.Sequential()
    model.add_module("attn", Attention())
    model.add_module("attn_x", Attention())
    cs.sparse(WIDER)(model.attn)
    backend, _ = record(model, tokens(), policy=POLICY, grid_thw=GRID)
    assert mechanisms(backend) == [WIDER.describe(), POLICY.describe()]


def test_only_a_numbered_module_has_a_layer() -> None:
    model = Two()
    cs.sparse(POLICY)(model.first)
    cs.attach(model, modules=["second"])
    cs.sparse(POLICY)(model.first)
    seen = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(Markers(graph).modules)
        return graph.forward

    torch.compile(model, backend=look, fullgraph=True)(tokens())
    assert [marker.path for marker in seen] == ["first", "second", "second"]
    assert [marker.layer is not None for marker in seen] == [False, True, True]
    assert [marker.policy is not None for marker in seen] == [True, False, False]


class Packed(nn.Module):
    """A model whose call names the sizes of the tokens it is given, as LTX does."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, hidden_states: Tensor, num_frames: int, height: int, width: int) -> Tensor:
        """Attend."""
        return self.attn(hidden_states)


def test_sizes_in_the_call_of_a_traced_model_are_its_grid() -> None:
    model, (frames, height, width) = Packed(), GRID
    cs.attach(model)
    backend = RecordingBackend()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    sizes = {"num_frames": frames, "height": height, "width": width}
    compiled(tokens(), **sizes)
    (decision,) = backend.decisions
    assert decision.grid_thw == GRID
    assert decision.layout_origin == "attach"
    assert not any(node.target in MARKERS for graph in backend.after for node in all_nodes(graph))


def test_sizes_that_do_not_multiply_up_are_not_believed() -> None:
    model = Packed()
    cs.attach(model)
    backend = RecordingBackend()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    compiled(tokens(), num_frames=3, height=4, width=6)
    assert backend.outcomes == ["layout_unknown"]


def test_changing_sizes_are_right_under_dynamic_shapes() -> None:
    model = Packed().requires_grad_(False)
    cs.attach(model)
    compiled = compile_sparse(model)
    for grid in ((3, 4, 5), (5, 4, 3), (2, 5, 6), (3, 4, 6)):
        x = tokens(1, grid[0] * grid[1] * grid[2])
        sizes = dict(zip(("num_frames", "height", "width"), grid, strict=True))
        actual = compiled(x, **sizes)
        assert_close(actual, expected_output(model.attn, x, grid_thw=grid))
