"""Markers: they do nothing, and they are in the graph until someone removes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch._dynamo.testing import EagerAndRecordGraphs

import compiled_sparse as cs

OPS = torch.ops.compiled_sparse


class Marked(nn.Module):
    """Two markers around one sine."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(3))
        self.register_buffer("layer", torch.tensor(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sine."""
        OPS.bind(self.layer, [self.gate], "gate", [self.gate], "projection", "config")
        OPS.bind_layout(x, [x.shape[0], 3])
        return x.sin()


def _calls(graph: torch.fx.GraphModule) -> list[str]:
    return [str(n.target) for n in graph.graph.nodes if "compiled_sparse" in str(n.target)]


MARKERS = ["compiled_sparse.bind.default", "compiled_sparse.bind_layout.default"]


def test_the_ops_satisfy_their_contract() -> None:
    assert cs.ops is not None
    learned = ([torch.randn(3)], "gate", [torch.randn(3, 3)], "projection")
    torch.library.opcheck(OPS.bind, (torch.tensor(1), *learned, "sta"))
    torch.library.opcheck(OPS.bind_layout, (torch.randn(2, 3), [2, 3, 4]))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_dynamo_graph_holds_the_markers_and_what_they_name(dynamic: bool) -> None:
    recorder, model, x = EagerAndRecordGraphs(), Marked(), torch.randn(2, 3)
    actual = torch.compile(model, backend=recorder, fullgraph=True, dynamic=dynamic)(x)
    assert torch.equal(actual, x.sin())
    (graph,) = recorder.graphs
    assert [name.removesuffix(".default") for name in _calls(graph)] == [
        name.removesuffix(".default") for name in MARKERS
    ]


@pytest.mark.usefixtures("fresh_compiler")
def test_other_compilers_remove_the_markers() -> None:
    recorder, model, x = AotEagerAndRecordGraphs(), Marked(), torch.randn(2, 3, requires_grad=True)
    actual = torch.compile(model, backend=recorder, fullgraph=True)(x)
    assert torch.equal(actual, x.sin())
    actual.sum().backward()
    assert torch.allclose(x.grad, x.detach().cos())
    assert [_calls(graph) for graph in recorder.fw_graphs] == [[]]


def test_an_exported_program_holds_the_markers() -> None:
    exported = torch.export.export(Marked(), (torch.randn(2, 3),))
    assert _calls(exported.graph_module) == MARKERS
    assert "gate" in exported.graph_signature.parameters
