"""Learned projections of attached models: where they are, what loads them, and how they go."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from modules import GRID
from modules import Attention
from modules import TinyDiT
from modules import assert_close
from modules import assert_gradients_close
from modules import compile_sparse
from modules import dit_inputs
from modules import parameter_gradients
from projected import CONFIG
from projected import PROJ
from projected import open_projections
from projected import projected
from test_recompute import gradients_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import compiled_sparse as cs
from compiled_sparse.attach import Handle
from compiled_sparse.errors import AttachError
from compiled_sparse.errors import CheckpointError

PROJECTIONS = tuple(f"blocks.{i}.attn1.{PROJ}" for i in range(2))
PARAMETERS = tuple(f"{path}.{part}" for path in PROJECTIONS for part in ("weight", "bias"))
CONFIGS = (CONFIG, None, CONFIG, None)
"""Of the calls of `TinyDiT`: self-attention and cross-attention in turn."""


@pytest.fixture(autouse=True)
def _nothing_is_counted() -> None:
    torch._dynamo.utils.counters.clear()


def num_graphs() -> int:
    """Return how many graphs were compiled in this test."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def attached(**options: Any) -> tuple[TinyDiT, Handle]:
    """Return a model whose projections are not zero."""
    model = TinyDiT(**options)
    handle = cs.attach(model, CONFIG)
    open_projections(model, handle.projections)
    return model, handle


def test_projections_are_zero_linear_layers_in_float32_with_the_published_names() -> None:
    model = TinyDiT().to(torch.bfloat16)
    before = model.state_dict()
    handle = cs.attach(model, CONFIG)
    assert handle.projections == PROJECTIONS
    assert handle.gates == ()
    added = {name: value for name, value in model.state_dict().items() if name not in before}
    assert {name: tuple(value.shape) for name, value in added.items()} == {
        name: (8, 8) if name.endswith("weight") else (8,) for name in PARAMETERS
    }
    assert all(not value.any() and value.dtype == torch.float32 for value in added.values())
    assert set(added) <= {name for name, each in model.named_parameters() if each.requires_grad}
    assert "2 learned projections, the first blocks.0.attn1.proj_l" in handle.report()


def test_removing_the_handle_removes_the_projections_it_added() -> None:
    model = TinyDiT()
    before = list(model.state_dict())
    cs.attach(model, CONFIG).remove()
    assert list(model.state_dict()) == before
    assert not any("projection" in name for each in model.modules() for name in vars(each))


def test_attaching_again_keeps_what_the_projections_have_learned() -> None:
    model, _ = attached()
    learned = {name: value.clone() for name, value in model.state_dict().items()}
    for policy in (CONFIG, cs.STA(window_thw=(1, 1, 1)), cs.SLA(proj=None), None):
        again = cs.attach(model, policy)
        assert again.projections == PROJECTIONS
        assert all(torch.equal(value, learned[name]) for name, value in model.state_dict().items())
    again.remove()
    assert not any(PROJ in name for name in model.state_dict())


def test_only_modules_whose_rule_names_a_projection_get_one() -> None:
    model = TinyDiT()
    handle = cs.attach(model, {"blocks.0.*": CONFIG, "*": cs.SLA(proj=None)})
    assert handle.projections == PROJECTIONS[:1]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_projection_of_the_modules_own_is_used_and_stays(bias: bool) -> None:
    model = TinyDiT()
    own = nn.Linear(8, 8, bias=bias)
    setattr(model.blocks[0].attn1, PROJ, own)
    handle = cs.attach(model, CONFIG)
    assert handle.projections == PROJECTIONS
    handle.remove()
    assert getattr(model.blocks[0].attn1, PROJ) is own
    assert not hasattr(model.blocks[1].attn1, PROJ)


@pytest.mark.usefixtures("fresh_compiler")
def test_copies_and_pickles_have_projections_of_their_own() -> None:
    model, _ = attached()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        one, two = (each.blocks[0].attn1.proj_l.weight for each in (model, other))
        assert torch.equal(one, two)
        assert one.data_ptr() != two.data_ptr()
        inputs = dit_inputs()
        handle = cs.attach(other, CONFIG)
        with torch.no_grad(), projected(other, handle, *CONFIGS):
            expected = other(*inputs)
        with torch.no_grad():
            assert_close(compile_sparse(other, policy="dense")(*inputs), expected)


def test_a_decorated_class_is_built_with_its_projection() -> None:
    @cs.sparse(CONFIG)
    class Own(Attention):
        pass

    module = Own()
    assert PROJ in dict(module.named_children())
    handle = cs.attach(model := nn.ModuleDict({"attn": module}), modules="attn")
    assert handle.projections == (f"attn.{PROJ}",)
    handle.remove()
    assert PROJ in dict(model["attn"].named_children())


def test_two_projections_for_one_module_are_refused_and_nothing_is_changed() -> None:
    model = TinyDiT()
    names = list(model.state_dict())
    rules = {"self:*": CONFIG, "joint:*": cs.SLA(proj="other")}
    with pytest.raises(AttachError, match="one learned projection"):
        cs.attach(model, rules)
    assert list(model.state_dict()) == names
    cs.attach(model, CONFIG)
    with pytest.raises(AttachError, match="of this name"):
        cs.attach(model, cs.SLA(proj="other"))
    assert [name for name in model.state_dict() if name not in names] == list(PARAMETERS)


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(AttachError, match="of this name"):
        cs.attach(TinyDiT(), cs.SLA(proj="heads"))


class Bare(nn.Module):
    """Attention without a hint at the size of its heads."""

    def __init__(self, **attributes: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(16, 18)
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.mark.parametrize("attributes", [{}, {"heads": 4}, {"head_dim": 0}], ids=str)
def test_a_module_without_a_size_of_heads_is_refused(attributes: dict[str, int]) -> None:
    model = nn.ModuleDict({"attn": Bare(**attributes)})
    with pytest.raises(AttachError, match="size of the module's heads"):
        cs.attach(model, CONFIG, modules="attn")
    assert not hasattr(model["attn"], PROJ)


@pytest.mark.parametrize(
    "attributes", [{"heads": 3}, {"num_heads": 3}, {"head_dim": 6}, {"heads": 1, "dim_head": 6}]
)
def test_the_size_of_heads_is_an_attribute_or_a_share_of_the_queries(
    attributes: dict[str, int],
) -> None:
    model = nn.ModuleDict({"attn": Bare(**attributes)})
    cs.attach(model, CONFIG, modules="attn")
    assert tuple(model["attn"].proj_l.weight.shape) == (6, 6)


# Checkpoints.


def named_like(model: nn.Module, place: str) -> dict[str, torch.Tensor]:
    """Return a state dict whose projections are called as in a published checkpoint."""
    return {
        name.replace(f"attn1.{PROJ}", place): value.clone()
        for name, value in model.state_dict().items()
    }


@pytest.mark.parametrize(
    "place",
    ["attn1.attn_impl.proj_l", "self_attn.attn_op.local_attn.proj_l", "attn1.proj_l"],
)
@pytest.mark.parametrize("prefix", ["", "transformer.", "module._orig_mod."])
def test_a_published_checkpoint_loads_into_the_projections(prefix: str, place: str) -> None:
    (source, _), model = attached(), TinyDiT()
    handle = cs.attach(model, CONFIG)
    state = {f"{prefix}{name}": value for name, value in named_like(source, place).items()}
    assert handle.load_state_dict_report(state).found == PARAMETERS
    assert not model.blocks[0].attn1.proj_l.weight.any()
    report = handle.load_state_dict(state)
    assert report.found == PARAMETERS
    assert report.missing == report.zero_filled == report.unexpected == report.missing_weights == ()
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


class Wrapper(nn.Module):
    """A projection that wraps its linear layer beside adapters, as LoRA does."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})


@pytest.mark.parametrize("place", ["attn1.attn_impl.proj_l", "attn1.proj_l"])
def test_a_projection_of_another_name_and_a_wrapped_one_are_loaded(place: str) -> None:
    (source, _), model = attached(), TinyDiT()
    handle = cs.attach(model, cs.SLA(proj="learned"))
    model.blocks[1].attn1.learned = Wrapper(model.blocks[1].attn1.learned)
    report = handle.load_state_dict(named_like(source, place), strict=False)
    assert len(report.found) == 4
    for one, other in zip(
        (model.blocks[0].attn1.learned, model.blocks[1].attn1.learned.base_layer),
        (each.attn1.proj_l for each in source.blocks),
        strict=True,
    ):
        assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize(
    "place",
    ["attn1.attn_impl.proj_l", "self_attn.attn_op.local_attn.proj_l", "attn1.proj_l"],
)
def test_a_checkpoint_with_projections_is_an_error_for_a_model_without(place: str) -> None:
    (source, _), model = attached(), TinyDiT()
    handle = cs.attach(model, cs.SLA(proj=None))
    for strict in (True, False):
        with pytest.raises(CheckpointError, match="projection"):
            handle.load_state_dict(named_like(source, place), strict=strict)


def test_projections_that_a_checkpoint_lacks_are_zero_and_reported() -> None:
    plain = TinyDiT()
    model, handle = attached()
    report = handle.load_state_dict(plain.state_dict())
    assert report.zero_filled == PARAMETERS
    assert not any(model.get_parameter(name).any() for name in PARAMETERS)


def test_what_a_model_saves_it_loads_again() -> None:
    (model, _), (other, handle) = attached(), attached()
    assert handle.load_state_dict(model.state_dict()).found == PARAMETERS
    again = other.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


# Compiled.


@pytest.mark.usefixtures("fresh_compiler")
def test_a_model_compiled_block_by_block_shares_one_artifact_among_its_projections() -> None:
    model, handle = attached()
    inputs = dit_inputs()
    with projected(model, handle, *CONFIGS):
        expected = model(*inputs)
    gradients = parameter_gradients(model, expected)
    for block in model.blocks:
        block.compile(backend="compiled_sparse", fullgraph=True, options={"inner": "aot_eager"})
    with cs.metadata(grid_thw=GRID):
        actual = model(*inputs)
    assert_close(actual, expected)
    assert_gradients_close(parameter_gradients(model, actual), gradients)
    assert num_graphs() == 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_projections_of_checkpointed_blocks_have_their_gradients(
    use_reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, handle = attached()
    inputs = dit_inputs()
    with projected(model, handle, *CONFIGS):
        expected = gradients_of(model, model(*inputs))
    expected = {name: each.clone() for name, each in expected.items()}
    model.checkpoint = True

    def either(block: Any, *args: Any, **_: Any) -> Any:
        return checkpoint(block, *args, use_reentrant=use_reentrant)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", either)
    for block in model.blocks:
        block.compile(backend="compiled_sparse", fullgraph=True, options={"inner": "aot_eager"})
    with cs.metadata(grid_thw=GRID):
        output = model(*inputs)
        assert_gradients_close(gradients_of(model, output), expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_no_sparsity_after_the_first_compiles_anything() -> None:
    model, handle = attached()
    inputs = dit_inputs()
    compiled = compile_sparse(model, policy="dense")
    for sparsity in (0.0, 0.3, 0.55, 0.9, 0.0):
        with cs.metadata(sparsity=sparsity):
            actual = compiled(*inputs)
        ratio = max(round(1 - sparsity, 2), 0.01)
        config = cs.SLA(topk_ratio=ratio, block_q=CONFIG.block_q, block_k=CONFIG.block_k)
        with projected(model, handle, config, None, config, None):
            assert_close(actual, model(*inputs))
    assert num_graphs() == 1


def test_explain_tells_the_density_at_the_sparsity_of_the_call() -> None:
    model, _ = attached()
    densities = []
    for sparsity in (0.0, 0.5):
        with cs.metadata(sparsity=sparsity):
            site = cs.explain(model, *dit_inputs()).sites[0]
        assert site.mechanism == CONFIG.describe()
        densities.append(site.density)
    assert densities == [1.0, pytest.approx(7 / 15, abs=0.02)]


def test_a_gate_cannot_share_the_name_of_a_projection() -> None:
    policy = {"self:*": cs.VSA(gate="learned"), "joint:*": cs.SLA(proj="learned")}
    with pytest.raises(AttachError, match="have one name"):
        cs.attach(TinyDiT(), policy)
