"""Learned gates of attached models: where they are, what loads them, and how they go."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch._dynamo.utils
from gated import CONFIG
from gated import GATE
from gated import gated
from gated import open_gates
from modules import GRID
from modules import Attention
from modules import TinyDiT
from modules import assert_close
from modules import compile_sparse
from modules import dit_inputs
from modules import tokens
from torch import nn

import compiled_sparse as cs
from compiled_sparse.errors import AttachError
from compiled_sparse.errors import CheckpointError


@pytest.fixture(autouse=True)
def _nothing_is_counted() -> None:
    torch._dynamo.utils.counters.clear()


def num_graphs() -> int:
    """Return how many graphs were compiled in this test."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


GATES = tuple(f"blocks.{i}.attn1.{GATE}" for i in range(2))
NO_TEXT = cs.Text()


def test_gates_are_zero_linear_layers_with_the_published_names() -> None:
    model = TinyDiT().to(torch.bfloat16)
    before = model.state_dict()
    handle = cs.attach(model, CONFIG)
    assert handle.gates == GATES
    added = {name: value for name, value in model.state_dict().items() if name not in before}
    assert {name: tuple(value.shape) for name, value in added.items()} == {
        name: shape
        for gate in GATES
        for name, shape in ((f"{gate}.weight", (16, 16)), (f"{gate}.bias", (16,)))
    }
    assert all(not value.any() and value.dtype == torch.bfloat16 for value in added.values())
    assert set(added) <= {name for name, _ in model.named_parameters()}
    assert "2 learned gates, the first blocks.0.attn1.to_gate_compress" in handle.report()


def test_removing_the_handle_removes_the_gates_it_added() -> None:
    model = TinyDiT()
    before = list(model.state_dict())
    cs.attach(model, CONFIG).remove()
    assert list(model.state_dict()) == before


def test_attaching_again_keeps_what_the_gates_have_learned() -> None:
    model = TinyDiT()
    handle = cs.attach(model, CONFIG)
    open_gates(model, handle.gates)
    learned = {name: value.clone() for name, value in model.state_dict().items()}
    for policy in (CONFIG, cs.STA(window_thw=(1, 1, 1)), None):
        again = cs.attach(model, policy)
        assert again.gates == GATES
        assert all(torch.equal(value, learned[name]) for name, value in model.state_dict().items())
    again.remove()
    assert not any(GATE in name for name in model.state_dict())


def test_only_modules_whose_rule_names_a_gate_get_one() -> None:
    model = TinyDiT()
    handle = cs.attach(model, {"blocks.0.*": CONFIG, "*": cs.VSA()})
    assert handle.gates == GATES[:1]


def test_a_gate_of_the_modules_own_is_used_and_stays() -> None:
    model = TinyDiT()
    own = nn.Linear(16, 16)
    setattr(model.blocks[0].attn1, GATE, own)
    handle = cs.attach(model, CONFIG)
    assert handle.gates == GATES
    handle.remove()
    assert getattr(model.blocks[0].attn1, GATE) is own
    assert not hasattr(model.blocks[1].attn1, GATE)


def test_copies_and_pickles_have_gates_of_their_own() -> None:
    model = TinyDiT()
    open_gates(model, cs.attach(model, CONFIG).gates)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        one, two = (each.blocks[0].attn1.to_gate_compress.weight for each in (model, other))
        assert torch.equal(one, two)
        assert one.data_ptr() != two.data_ptr()


def test_a_decorated_class_is_built_with_its_gate() -> None:
    @cs.sparse(CONFIG)
    class Own(Attention):
        pass

    module = Own()
    assert GATE in dict(module.named_children())
    handle = cs.attach(model := nn.ModuleDict({"attn": module}), modules="attn")
    assert handle.gates == (f"attn.{GATE}",)
    handle.remove()
    assert GATE in dict(model["attn"].named_children())


def test_two_gates_for_one_module_are_refused_and_nothing_is_changed() -> None:
    model = TinyDiT()
    names = list(model.state_dict())
    rules = {"self:*": CONFIG, "joint:*": cs.VSA(gate="other")}
    with pytest.raises(AttachError, match="one learned gate"):
        cs.attach(model, rules)
    assert list(model.state_dict()) == names
    cs.attach(model, CONFIG)
    with pytest.raises(AttachError, match="of this name"):
        cs.attach(model, cs.VSA(gate="other"))
    assert [name for name in model.state_dict() if name not in names] == [
        f"{gate}.{part}" for gate in GATES for part in ("weight", "bias")
    ]


def test_a_name_that_is_taken_and_a_module_without_sizes_are_refused() -> None:
    with pytest.raises(AttachError, match="of this name"):
        cs.attach(TinyDiT(), cs.VSA(gate="heads"))

    class BareAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Linear(16, 16)

    with pytest.raises(AttachError, match="how wide"):
        cs.attach(nn.ModuleList([BareAttention()]), CONFIG)


def checkpoint_of(model: nn.Module, *, at_block: bool = True) -> dict[str, torch.Tensor]:
    """Return a state dict as FastWan's are: gates beside the attention module, not in it."""
    place = f"attn1.{GATE}"
    return {
        name.replace(place, GATE) if at_block else name: value.clone()
        for name, value in model.state_dict().items()
    }


@pytest.mark.parametrize("at_block", [True, False])
def test_a_published_checkpoint_loads_into_the_gates(at_block: bool) -> None:
    source, model = TinyDiT(), TinyDiT()
    open_gates(source, cs.attach(source, CONFIG).gates)
    state = checkpoint_of(source, at_block=at_block)
    handle = cs.attach(model, CONFIG)
    assert len(handle.load_state_dict_report(state).found) == 4
    assert not model.blocks[0].attn1.to_gate_compress.weight.any()
    report = handle.load_state_dict(state)
    assert report.found == tuple(f"{gate}.{part}" for gate in GATES for part in ("weight", "bias"))
    assert not report.zero_filled
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])


def test_a_checkpoint_with_gates_is_an_error_for_a_model_without() -> None:
    source, model = TinyDiT(), TinyDiT()
    cs.attach(source, CONFIG)
    handle = cs.attach(model, cs.VSA())
    for strict in (True, False):
        with pytest.raises(CheckpointError, match="gate"):
            handle.load_state_dict(checkpoint_of(source), strict=strict)


def test_gates_that_a_checkpoint_lacks_are_zero_and_reported() -> None:
    plain, model = TinyDiT(), TinyDiT()
    handle = cs.attach(model, CONFIG)
    open_gates(model, handle.gates)
    report = handle.load_state_dict(plain.state_dict())
    assert len(report.zero_filled) == 4
    assert not model.blocks[1].attn1.to_gate_compress.bias.any()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_model_compiled_block_by_block_shares_one_artifact_among_its_gates() -> None:
    model = TinyDiT()
    handle = cs.attach(model, CONFIG)
    open_gates(model, handle.gates)
    inputs = dit_inputs()
    with torch.no_grad(), gated(model, handle, NO_TEXT, None, NO_TEXT, None):
        expected = model(*inputs)
    for block in model.blocks:
        block.compile(backend="compiled_sparse", fullgraph=True, options={"inner": "eager"})
    with torch.no_grad(), cs.metadata(grid_thw=GRID):
        assert_close(model(*inputs), expected)
    assert num_graphs() == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_no_sparsity_after_the_first_compiles_anything() -> None:
    model = TinyDiT()
    handle = cs.attach(model, CONFIG)
    open_gates(model, handle.gates)
    inputs = dit_inputs()
    compiled = compile_sparse(model, policy="dense")
    for sparsity in (0.0, 0.3, 0.55, 0.9, 0.0):
        with cs.metadata(sparsity=sparsity):
            actual = compiled(*inputs)
        config = cs.VSA(sparsity=sparsity, tile_thw=CONFIG.tile_thw)
        with gated(model, handle, NO_TEXT, None, NO_TEXT, None, config=config):
            assert_close(actual, model(*inputs))
    assert num_graphs() == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_the_sparsity_of_a_call_leaves_other_mechanisms_alone() -> None:
    inputs = tokens()
    module = nn.ModuleDict({"attn": Attention()})
    compiled = compile_sparse(module["attn"])
    with cs.metadata(grid_thw=GRID):
        plain = compiled(inputs)
        with cs.metadata(sparsity=0.5):
            assert torch.equal(compiled(inputs), plain)
    assert num_graphs() == 1


def test_explain_tells_the_density_at_the_sparsity_of_the_call() -> None:
    model = TinyDiT()
    cs.attach(model, CONFIG)
    densities = []
    for sparsity in (0.0, 0.5):
        with cs.metadata(sparsity=sparsity):
            site = cs.explain(model, *dit_inputs()).sites[0]
        assert site.mechanism == CONFIG.describe()
        densities.append(site.density)
    assert densities == [1.0, 0.5]
