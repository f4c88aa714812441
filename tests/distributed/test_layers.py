"""Attention layers for models written for several processes: as on one process, and refusals."""

from __future__ import annotations

import pytest
import torch
from dividing import moba_over_heads
from layer_cases import LayerCase
from layer_cases import assert_as_on_one
from layer_cases import in_layers
from process_groups import lone_group
from processes import values
from torch import Tensor
from torch import distributed
from torch._dynamo.testing import CompileCounter

import compiled_sparse as cs
from compiled_sparse.config import MechanismConfig
from compiled_sparse.distributed.layers import DistributedAttention
from compiled_sparse.distributed.layers import LocalAttention
from compiled_sparse.distributed.layers import Replicated
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import DistributedError
from compiled_sparse.errors import LayoutError
from compiled_sparse.errors import ShapeError

pytestmark = pytest.mark.usefixtures("fresh_compiler")

TILE = (2, 3, 2)
ODD = (5, 7, 3)
"""105 tokens: two ranks have one too many."""
STA = cs.STA(window_thw=(1, 3, 3), tile_thw=TILE)
BY_HEAD = cs.STA(window_thw=((1, 1, 3), (3, 1, 1), (1, 3, 1)), tile_thw=TILE)
TABLE = cs.WindowTable(
    windows=((1, 1, 1), (3, 3, 1), (1, 3, 3)),
    choice=(((0, 1, 2), (2, 1, 0)), ((1, 1, 1), (2, 0, 1))),
)
VSA = cs.VSA(sparsity=0.6, tile_thw=TILE)
GATED = cs.VSA(sparsity=0.6, tile_thw=TILE, gate="to_gate_compress")
MOBA = cs.VMoBA(
    temporal_chunk_size=1,
    temporal_topk=2,
    spatial_chunk_size=(3, 5),
    spatial_topk=1,
    st_chunk_size=(2, 3, 5),
    st_topk=2,
    moba_select_mode="topk",
)
CASES = [
    LayerCase(config=cs.Dense(), text=5, heads=3),
    LayerCase(config=STA),
    LayerCase(config=STA, heads=6, key_heads=2, grid=ODD, text=7),
    LayerCase(config=STA, heads=1, grid=ODD),  # more ranks than heads
    LayerCase(config=cs.STA(window_thw=(1, 3, 3)), heads=2, grid=(1, 2, 2), text=3),
    LayerCase(config=BY_HEAD, heads=3, text=6),
    LayerCase(config=cs.STA(window_thw=TABLE, tile_thw=TILE), heads=3, step=1, layer=0),
    LayerCase(config=VSA, heads=2, grid=ODD),
    LayerCase(config=GATED, heads=3, gated=True, grid=ODD),
    LayerCase(config=GATED, heads=1, gated=True, text=9),
    LayerCase(config=cs.SLA(topk_ratio=0.3, block_q=8, block_k=4), heads=3, text=4),
    LayerCase(config=MOBA, grid=(4, 6, 10), layer=1),
    LayerCase(config=cs.SWBA(block=8, window=3), heads=5, grid=ODD),
]
COMPILED = [
    LayerCase(config=BY_HEAD, heads=3, grid=ODD, text=6),
    LayerCase(config=GATED, heads=1, gated=True, text=9),
]


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_values_and_gradients_are_those_of_one_process(size: int) -> None:
    _check(size, CASES, None)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_compiled_in_one_graph_too(size: int) -> None:
    _check(size, COMPILED, "aot_eager")


def _check(size: int, cases: list[LayerCase], compiler: str | None) -> None:
    found = values(size, in_layers, cases, compiler)
    for number, case in enumerate(cases):
        assert_as_on_one(case, [of_rank[number] for of_rank in found])


def _tokens(rows: int = 60, heads: int = 4) -> Tensor:
    return torch.randn(1, rows, heads, 8)


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_the_local_layer_is_attention_of_what_is_at_hand(compiler: str | None) -> None:
    layer = LocalAttention(STA, grid_thw=(4, 6, 5), scale=0.3)
    compiled = layer if compiler is None else torch.compile(layer, backend=compiler, fullgraph=True)
    inputs = [_tokens(120).requires_grad_() for _ in range(3)]
    out = compiled(*inputs)
    query, key, value = (each.transpose(1, 2) for each in inputs)
    expected = cs.attention(query, key, value, STA, grid_thw=(4, 6, 5), scale=0.3).transpose(1, 2)
    assert torch.equal(out, expected)
    weights = torch.randn_like(out)
    given, wanted = (torch.autograd.grad(each, inputs, weights) for each in (out, expected))
    torch.testing.assert_close(given, wanted)


def test_the_local_layer_needs_no_grid_where_the_mechanism_needs_none() -> None:
    q, k, v = _tokens(7), _tokens(9), _tokens(9)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(each.transpose(1, 2) for each in (q, k, v))
    )
    torch.testing.assert_close(LocalAttention(cs.Dense())(q, k, v), expected.transpose(1, 2))
    with pytest.raises(LayoutError):
        LocalAttention(STA, grid_thw=(0, 1, 1))


def _layer(config: MechanismConfig = STA) -> DistributedAttention:
    return DistributedAttention(config, distributed.group.WORLD, grid_thw=(4, 6, 5))


@pytest.mark.parametrize("name", ["q", "k", "v", "gate_compress"])
@pytest.mark.parametrize("rows", [59, 61, 120])
def test_another_number_of_tokens_is_refused_in_every_tensor(name: str, rows: int) -> None:
    with lone_group(2):
        tensors = {each: _tokens() for each in ("q", "k", "v", "gate_compress")}
        tensors[name] = _tokens(rows)
        with pytest.raises(ShapeError, match=rf"{name} of shape \(1, {rows}, 4, 8\)"):
            _layer(GATED)(**tensors)


def test_text_of_different_lengths_is_refused() -> None:
    text = Replicated(_tokens(5), _tokens(6), _tokens(6))
    with lone_group(2), pytest.raises(ShapeError, match=r"\(1, 5, 4, 8\), \(1, 6, 4, 8\)"):
        _layer()(*(_tokens() for _ in range(3)), replicated=text)


def test_text_of_another_length_needs_no_other_graph() -> None:
    counter = CompileCounter()
    with lone_group(2), torch.no_grad():
        compiled = torch.compile(_layer(), backend=counter, fullgraph=True, dynamic=True)
        for length in (5, 9, 7):
            text = Replicated(*(_tokens(length) for _ in range(3)))
            video, words = compiled(*(_tokens() for _ in range(3)), replicated=text)
            assert (video.shape[1], words.shape[1]) == (60, length)
    assert counter.frame_count == 1


def test_windows_of_other_heads_are_refused_on_every_rank() -> None:
    with lone_group(3), pytest.raises(ConfigError, match="3 windows for 4 heads"):
        _layer(BY_HEAD)(*(_tokens(40) for _ in range(3)))


def test_a_mechanism_over_several_heads_is_refused_where_there_are_several_ranks() -> None:
    overall = moba_over_heads("overall")
    with lone_group(2), pytest.raises(DistributedError, match="several ranks"):
        _layer(overall)
    with lone_group(1):
        assert _layer(overall).rows == 120


def test_a_mesh_of_several_dimensions_is_refused() -> None:
    with lone_group(4):
        mesh = distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
        with pytest.raises(DistributedError, match="along several dimensions"):
            DistributedAttention(STA, mesh, grid_thw=(4, 6, 5))
        assert DistributedAttention(STA, mesh["ulysses"], grid_thw=(4, 6, 5)).rows == 60
