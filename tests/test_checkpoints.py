"""Names of checkpoints, and loading gates under any of them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch import nn

from compiled_sparse.checkpoints import LoadReport
from compiled_sparse.checkpoints import load_with_gates
from compiled_sparse.checkpoints import report_on
from compiled_sparse.checkpoints import to_diffusers
from compiled_sparse.checkpoints import to_fastvideo
from compiled_sparse.errors import CheckpointError

NAMES = [
    ("attn1.to_q", "to_q"),
    ("attn1.to_k", "to_k"),
    ("attn1.to_v", "to_v"),
    ("attn1.to_out.0", "to_out"),
    ("attn1.norm_q", "norm_q"),
    ("attn1.norm_k", "norm_k"),
    ("attn1.to_gate_compress", "to_gate_compress"),
    ("attn2.to_out.0", "attn2.to_out"),
    ("ffn.net.0.proj", "ffn.fc_in"),
    ("ffn.net.2", "ffn.fc_out"),
    ("norm2", "self_attn_residual_norm.norm"),
]
PREFIXES = ["", "transformer.", "module.", "_orig_mod.", "module._orig_mod.", "a.b."]
SUFFIXES = ["", ".weight", ".bias", ".lora_A.weight"]
GATES = ["blocks.0.attn1.to_gate_compress", "blocks.1.attn1.to_gate_compress"]
DIM = 6

names = st.tuples(
    st.sampled_from(PREFIXES),
    st.integers(0, 39),
    st.sampled_from(NAMES),
    st.sampled_from(SUFFIXES),
)


class Block(nn.Module):
    """A block of either form; its gate is where and what the caller says."""

    def __init__(self, *, is_fastvideo: bool = False) -> None:
        super().__init__()
        self.attn1 = nn.Module()
        at = self if is_fastvideo else self.attn1
        for name in ("to_q", "to_k", "to_v"):
            setattr(at, name, nn.Linear(DIM, DIM))
        out = nn.Linear(DIM, DIM)
        at.to_out = out if is_fastvideo else nn.ModuleList([out, nn.Dropout(0.0)])
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("cache", torch.ones(3), persistent=False)


class Model(nn.Module):
    """Blocks, and something outside of them."""

    def __init__(self, *, is_fastvideo: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(is_fastvideo=is_fastvideo) for _ in range(2))
        self.proj_out = nn.Linear(DIM, 4)


class Wrapper(nn.Module):
    """A gate that wraps its linear layer beside adapters, as LoRA does."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(DIM, DIM)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(DIM, 2, bias=False)})


def gated(
    at: str = "attn1.to_gate_compress",
    make: Callable[[], nn.Module] = lambda: nn.Linear(DIM, DIM),
    *,
    is_fastvideo: bool = False,
) -> tuple[Model, list[str]]:
    """A model with a gate in each block, and the paths of the gates."""
    model = Model(is_fastvideo=is_fastvideo)
    for block in model.blocks:
        *parents, name = at.split(".")
        place: nn.Module = block
        for parent in parents:
            if not hasattr(place, parent):
                setattr(place, parent, nn.Module())
            place = getattr(place, parent)
        setattr(place, name, make())
    return model, [f"blocks.{i}.{at}" for i in range(2)]


def numbers(model: nn.Module) -> dict[str, Tensor]:
    """A state dict of the model's names with values of its own."""
    return {name: torch.randn_like(value) for name, value in model.state_dict().items()}


def published(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """As FastWan is published: diffusers' names, gates at the block."""
    return {
        name.replace(".attn1.to_gate_compress", ".to_gate_compress"): value
        for name, value in state_dict.items()
    }


def part(state_dict: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Weight and bias of the module whose path starts like this."""
    return {
        name.rpartition(".")[2]: value
        for name, value in state_dict.items()
        if name.startswith(path)
    }


def assert_loaded(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("theirs", "other"), NAMES)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_each_module_of_a_block_is_renamed_in_both_directions(
    theirs: str, other: str, prefix: str
) -> None:
    for suffix in SUFFIXES:
        long, short = (f"{prefix}blocks.12.{each}{suffix}" for each in (theirs, other))
        assert to_diffusers({short: 1}) == {long: 1}
        assert to_fastvideo({long: 1}) == {short: 1}
        assert to_diffusers({long: 1}) == {long: 1}
        assert to_fastvideo({short: 1}) == {short: 1}


@given(st.lists(names, unique=True), st.randoms())
def test_renaming_twice_changes_nothing_more_and_back_gives_the_names(
    chosen: list[tuple[str, int, tuple[str, str], str]], random: Any
) -> None:
    long = {
        f"{prefix}blocks.{n}.{pair[0]}{suffix}": i
        for i, (prefix, n, pair, suffix) in enumerate(chosen)
    }
    short = to_fastvideo(long)
    assert list(short.values()) == list(long.values())
    assert to_fastvideo(short) == short
    assert to_diffusers(short) == long == to_diffusers(long)
    mixed = {random.choice(pair): i for i, pair in enumerate(zip(long, short, strict=True))}
    assert to_diffusers(mixed) == long
    assert to_fastvideo(mixed) == short


@pytest.mark.parametrize(
    "name",
    [
        "to_q.weight",
        "attn1.to_q.weight",
        "norm2.weight",
        "vace_blocks.0.norm2.weight",
        "transformer_blocks.0.attn1.to_q.weight",
        "blocks.x.attn1.to_q.weight",
        "blocks.0.attn2.to_q.weight",
        "blocks.0.attn2.norm_q.weight",
        "blocks.0.attn1.to_q_extra.weight",
        "blocks.0.to_q_extra.weight",
        "blocks.0.to_out.1.weight",
        "blocks.0.attn1.to_out.1.weight",
        "blocks.0.norm3.weight",
        "blocks.0.scale_shift_table",
        "patch_embedding.weight",
        "",
    ],
)
def test_names_that_are_not_known_stay(name: str) -> None:
    assert to_diffusers({name: 1}) == to_fastvideo({name: 1}) == {name: 1}


def test_a_published_checkpoint_has_its_gates_moved_to_the_attention_module() -> None:
    state_dict = {
        "blocks.0.attn1.to_q.weight": 1,
        "blocks.0.norm2.bias": 2,
        "blocks.0.to_gate_compress.weight": 3,
        "blocks.0.to_gate_compress.bias": 4,
        "proj_out.weight": 5,
    }
    found = to_diffusers(state_dict)
    assert list(found.values()) == [1, 2, 3, 4, 5]
    assert list(found)[2:4] == [f"{GATES[0]}.weight", f"{GATES[0]}.bias"]


@pytest.mark.parametrize("rename", [to_diffusers, to_fastvideo])
def test_two_names_of_one_parameter_are_refused(rename: Callable[..., Any]) -> None:
    both = {"a.blocks.3.to_q.weight": 1, "a.blocks.3.attn1.to_q.weight": 1}
    with pytest.raises(CheckpointError, match="two names of the checkpoint mean one parameter"):
        rename(both)


@pytest.mark.parametrize("rename", [to_diffusers, to_fastvideo])
@pytest.mark.parametrize("wrong", ["model.safetensors", None, [("a", 1)], {3: 1}], ids=repr)
def test_what_is_no_state_dict_is_refused(rename: Callable[..., Any], wrong: Any) -> None:
    with pytest.raises(CheckpointError, match="not a mapping of names"):
        rename(wrong)


CHECKPOINTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "diffusers": to_diffusers,
    "fastvideo": to_fastvideo,
    "published": lambda given: published(to_diffusers(given)),
    "wrapped": lambda given: {f"module._orig_mod.{name}": each for name, each in given.items()},
    "of a pipeline": lambda given: {f"transformer.{name}": each for name, each in given.items()},
    "ordered": lambda given: OrderedDict(reversed(given.items())),
}


@pytest.mark.parametrize("is_fastvideo", [False, True])
@pytest.mark.parametrize("form", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_of_any_form_is_loaded_into_a_model_of_any_form(
    form: Callable[[dict[str, Tensor]], dict[str, Any]], is_fastvideo: bool
) -> None:
    at = "to_gate_compress" if is_fastvideo else "attn1.to_gate_compress"
    model, gates = gated(at, is_fastvideo=is_fastvideo)
    expected = numbers(model)
    report = load_with_gates(model, gates, form(expected))
    assert_loaded(model, expected)
    assert report.found == tuple(f"{gate}.{p}" for gate in gates for p in ("weight", "bias"))
    assert report.missing == report.zero_filled == ()
    assert report.missing_weights == report.unexpected == ()


@pytest.mark.parametrize("at", ["attn1.compiled_sparse_gate", "self_attn.gate", "gate"])
@pytest.mark.parametrize("name", ["blocks.{}.to_gate_compress", "blocks.{}.attn1.to_gate_compress"])
def test_a_gate_of_another_name_is_found_by_its_block(at: str, name: str) -> None:
    model, gates = gated(at)
    expected = numbers(model)
    given = {
        key.replace(f"blocks.{i}.{at}", name.format(i)): value
        for i in range(2)
        for key, value in expected.items()
        if f"blocks.{1 - i}." not in key
    }
    report = load_with_gates(model, gates, given)
    assert_loaded(model, expected)
    assert len(report.found) == 4


def test_a_gate_of_another_name_is_found_beside_it() -> None:
    model, gates = gated("self_attn.gate")
    expected = numbers(model)
    given = {
        key.replace("self_attn.gate", "self_attn.to_gate_compress"): value
        for key, value in expected.items()
    }
    load_with_gates(model, gates, given)
    assert_loaded(model, expected)


def test_the_gate_at_the_block_belongs_to_the_first_attention_of_two() -> None:
    model, gates = gated()
    for block in model.blocks:
        block.attn2 = nn.Module()
        block.attn2.to_gate_compress = nn.Linear(DIM, DIM)
    gates += [gate.replace("attn1", "attn2") for gate in gates]
    expected = numbers(model)
    load_with_gates(model, gates, published(expected))
    assert_loaded(model, expected)


def test_a_parameter_that_has_the_name_itself_comes_before_a_gate_nearby() -> None:
    model, _ = gated()
    for block in model.blocks:
        block.attn2 = nn.Module()
        block.attn2.to_gate_compress = nn.Linear(DIM, DIM)
    expected = numbers(model)
    gates = [gate.replace("attn1", "attn2") for gate in GATES]
    load_with_gates(model, gates, published(expected))
    assert_loaded(model, expected)


def test_a_model_that_has_both_names_of_a_parameter_is_loaded_by_its_own() -> None:
    model, gates = gated()
    for block in model.blocks:
        block.to_q = nn.Linear(DIM, DIM)
        block.to_gate_compress = nn.Linear(DIM, DIM)
    expected = numbers(model)
    load_with_gates(model, gates, expected)
    assert_loaded(model, expected)


def test_a_gate_at_the_block_that_could_be_either_of_two_is_refused() -> None:
    model, gates = gated("video.gate")
    for block in model.blocks:
        block.audio = nn.Module()
        block.audio.gate = nn.Linear(DIM, DIM)
    gates += [gate.replace("video", "audio") for gate in gates]
    given = {"blocks.0.to_gate_compress.weight": torch.zeros(DIM, DIM)}
    with pytest.raises(CheckpointError, match="gates or projections that the model lacks"):
        load_with_gates(model, gates, given, strict=False)


@pytest.mark.parametrize("inner", ["", "base_layer."])
@pytest.mark.parametrize("at", ["attn1.to_gate_compress", "attn1.compiled_sparse_gate"])
def test_a_gate_may_wrap_its_linear_layer(at: str, inner: str) -> None:
    model, gates = gated(at, Wrapper)
    expected = numbers(model)
    given = {
        key.replace(f"{at}.base_layer.", f"{at}.{inner}"): value for key, value in expected.items()
    }
    report = load_with_gates(model, gates, given)
    assert_loaded(model, expected)
    assert report.found[0] == f"{gates[0]}.base_layer.weight"
    assert not any("lora" in name for name in report.found)


def test_a_compiled_model_is_loaded_like_any_other() -> None:
    model, gates = gated()
    expected = numbers(model)
    report = load_with_gates(torch.compile(model, backend="eager"), gates, published(expected))
    assert_loaded(model, expected)
    assert report.found[0] == f"{gates[0]}.weight"


def test_a_model_of_compiled_blocks_is_loaded_like_any_other() -> None:
    model, gates = gated()
    given = published(numbers(model))
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")
    report = load_with_gates(model, gates, given)
    assert report.found[0] == "blocks.0._orig_mod.attn1.to_gate_compress.weight"
    assert_loaded(model.blocks[1]._orig_mod.attn1.to_gate_compress, part(given, "blocks.1.to_gate"))
    assert_loaded(model.blocks[0]._orig_mod.attn1.to_q, part(given, "blocks.0.attn1.to_q"))


def test_gates_that_the_checkpoint_lacks_become_zero() -> None:
    model, gates = gated()
    expected = numbers(model)
    given = {name: value for name, value in expected.items() if "s.1.attn1.to_gate" not in name}
    report = load_with_gates(model, gates, given)
    zero = (f"{gates[1]}.weight", f"{gates[1]}.bias")
    assert report.missing == report.zero_filled == zero
    assert report.found == (f"{gates[0]}.weight", f"{gates[0]}.bias")
    assert_loaded(model, {**expected, **{name: torch.zeros_like(expected[name]) for name in zero}})


def test_a_gate_published_without_bias_gets_a_bias_of_zero() -> None:
    model, gates = gated()
    expected = numbers(model)
    given = {name: value for name, value in expected.items() if not name.endswith("compress.bias")}
    report = load_with_gates(model, gates, given)
    assert report.found == tuple(f"{gate}.weight" for gate in gates)
    assert report.zero_filled == tuple(f"{gate}.bias" for gate in gates)
    assert not model.get_parameter(f"{gates[1]}.bias").any()


def test_a_gate_without_bias_has_none_to_report() -> None:
    model, gates = gated(make=lambda: nn.Linear(DIM, DIM, bias=False))
    assert report_on(model, gates, {}).missing == tuple(f"{gate}.weight" for gate in gates)


def test_loading_keeps_dtype_and_gradients_of_the_parameters() -> None:
    model, gates = gated()
    given = numbers(model)
    model.half()
    load_with_gates(model, gates, given)
    gate = model.get_parameter(f"{gates[0]}.weight")
    assert gate.dtype == torch.float16
    assert gate.requires_grad
    assert torch.equal(gate, given[f"{gates[0]}.weight"].half())


def test_without_strict_what_is_missing_keeps_its_value_and_the_rest_is_loaded() -> None:
    model, gates = gated()
    before, given = copy.deepcopy(model.state_dict()), numbers(model)
    del given["proj_out.bias"], given["blocks.0.scale"]
    report = load_with_gates(model, gates, {**given, "logit_scale": torch.ones(1)}, strict=False)
    assert report.missing_weights == ("blocks.0.scale", "proj_out.bias")
    assert report.unexpected == ("logit_scale",)
    left = {name: before[name] for name in report.missing_weights}
    assert_loaded(model, {**given, **left})


def test_buffers_that_are_not_saved_are_not_expected() -> None:
    model, gates = gated()
    report = report_on(model, gates, {})
    assert "blocks.0.scale" in report.missing_weights
    assert not any("cache" in name for name in report.missing_weights)


def test_what_a_module_saves_beside_tensors_is_handed_to_it() -> None:
    class Noted(nn.Linear):
        note: Any = None

        def get_extra_state(self) -> Any:
            return self.note

        def set_extra_state(self, state: Any) -> None:
            self.note = state

    model, gates = gated(make=lambda: Noted(DIM, DIM))
    given = {**model.state_dict(), f"{gates[0]}._extra_state": "x", f"{gates[1]}._extra_state": "y"}
    load_with_gates(model, gates, given)
    assert model.blocks[1].attn1.to_gate_compress.note == "y"


def test_a_report_says_the_same_as_loading_and_changes_nothing() -> None:
    model, gates = gated()
    before, given = copy.deepcopy(model.state_dict()), published(numbers(model))
    given = {name: value for name, value in given.items() if "s.1.to_gate" not in name}
    given["extra"] = given.pop("proj_out.weight")
    report = report_on(model, gates, given)
    assert_loaded(model, before)
    assert report == load_with_gates(model, gates, given, strict=False)
    assert len(report.zero_filled) == 2


def test_a_report_lists_gates_without_a_place_instead_of_refusing_them() -> None:
    model, given = Model(), published(numbers(gated()[0]))
    left = report_on(model, [], given).unexpected
    assert left == tuple(
        f"blocks.{i}.to_gate_compress.{p}" for i in "01" for p in ("weight", "bias")
    )


def test_a_single_path_is_taken_as_one_gate() -> None:
    model, gates = gated()
    assert report_on(model, gates[0], {}).missing == (f"{gates[0]}.weight", f"{gates[0]}.bias")


WRONG: dict[str, tuple[str, Callable[[dict[str, Any]], Any], bool]] = {
    "missing weight": (
        r"missing: 1 \(proj_out\.bias\); unexpected: none",
        lambda given: given.pop("proj_out.bias"),
        True,
    ),
    "unexpected name": (
        r"missing: none; unexpected: 1 \(other\)",
        lambda given: given.update(other=torch.zeros(1)),
        True,
    ),
    "many missing": (
        r"missing: 20 \(blocks\.0\.scale, blocks\.0\.attn1\.to_q\.weight, "
        r"blocks\.0\.attn1\.to_q\.bias, \.\.\.\)",
        lambda given: [given.pop(name) for name in list(given) if "compress" not in name],
        True,
    ),
    "gate of another block": (
        "gates or projections that the model lacks",
        lambda given: given.update({"blocks.7.to_gate_compress.weight": torch.zeros(DIM, DIM)}),
        False,
    ),
    "gate of another attention": (
        "gates or projections that the model lacks",
        lambda given: given.update({"blocks.0.attn2.to_gate_compress.bias": torch.zeros(DIM)}),
        False,
    ),
    "adapter of a gate": (
        r"blocks\.0\.to_gate_compress\.lora_A",
        lambda given: given.update({"blocks.0.to_gate_compress.lora_A.weight": torch.zeros(DIM)}),
        False,
    ),
    "shapes": (
        r"proj_out\.weight: \(3, 6\) for \(4, 6\); proj_out\.bias: \(3,\) for \(4,\)",
        lambda given: given.update(
            {"proj_out.weight": torch.zeros(3, DIM), "proj_out.bias": torch.zeros(3)}
        ),
        False,
    ),
    "shape of a gate": (
        r"attn1\.to_gate_compress\.bias: \(1,\) for \(6,\)",
        lambda given: given.update({f"{GATES[0]}.bias": torch.zeros(1)}),
        False,
    ),
    "no tensor": (
        r"proj_out\.bias: list for \(4,\)",
        lambda given: given.update({"proj_out.bias": [0.0] * 4}),
        False,
    ),
    "two names": (
        "two names of the checkpoint mean one parameter",
        lambda given: given.update({"blocks.1.to_gate_compress.bias": torch.zeros(DIM)}),
        False,
    ),
    "no memory": (
        r"on the meta device: 1 \(proj_out\.bias of the checkpoint\)",
        lambda given: given.update({"proj_out.bias": torch.zeros(4, device="meta")}),
        False,
    ),
}


@pytest.mark.parametrize(("problem", "spoil", "only_strict"), WRONG.values(), ids=WRONG)
def test_an_error_leaves_the_model_as_it_was(
    problem: str, spoil: Callable[[dict[str, Any]], Any], only_strict: bool
) -> None:
    model, gates = gated()
    before = copy.deepcopy(model.state_dict())
    given: dict[str, Any] = numbers(model)
    spoil(given)
    for strict in (True,) if only_strict else (True, False):
        with pytest.raises(CheckpointError, match=problem):
            load_with_gates(model, gates, given, strict=strict)
        assert_loaded(model, before)
    if only_strict:
        load_with_gates(model, gates, given, strict=False)


def test_a_bias_that_the_gates_of_the_model_lack_is_refused() -> None:
    model, gates = gated(make=lambda: nn.Linear(DIM, DIM, bias=False))
    with pytest.raises(CheckpointError, match=r"2 \(blocks\.0\.to_gate_compress\.bias, "):
        load_with_gates(model, gates, published(numbers(gated()[0])), strict=False)


def test_gates_are_refused_where_the_model_has_none() -> None:
    with pytest.raises(CheckpointError, match="gates or projections that the model lacks"):
        load_with_gates(Model(), [], published(numbers(gated()[0])), strict=False)


def test_a_gate_under_the_name_of_the_models_own_is_refused_elsewhere() -> None:
    model, gates = gated("attn1.mixer.0")
    given = {**numbers(model), "blocks.0.attn2.mixer.0.weight": torch.zeros(DIM, DIM)}
    with pytest.raises(CheckpointError, match="gates or projections that the model lacks"):
        load_with_gates(model, gates, given, strict=False)
    given = {**numbers(model), "blocks.0.other.0.weight": torch.zeros(DIM, DIM)}
    assert load_with_gates(model, gates, given, strict=False).unexpected


@pytest.mark.parametrize(
    "path", ["blocks.0.attn1.gate", "blocks.9.attn1", "blocks.0.attn1", "proj_out.weight", 3, None]
)
def test_a_path_that_is_no_gate_is_refused(path: Any) -> None:
    model, gates = gated()
    for call in (report_on, load_with_gates):
        with pytest.raises(CheckpointError, match="not a linear layer of the model"):
            call(model, [gates[0], path], {})


def test_a_parametrized_gate_is_refused_because_it_has_no_weight_to_fill() -> None:
    model, gates = gated()
    nn.utils.parametrizations.weight_norm(model.get_submodule(gates[0]))
    with pytest.raises(CheckpointError, match="with 0 linear layers"):
        report_on(model, gates, {})


def test_paths_that_are_none_and_models_that_are_no_modules_are_refused() -> None:
    with pytest.raises(CheckpointError, match="not a linear layer"):
        load_with_gates(Model(), None, {})
    with pytest.raises(CheckpointError, match="loaded into a module"):
        load_with_gates("model", [], {})
    with pytest.raises(CheckpointError, match="not a mapping of names"):
        load_with_gates(Model(), [], Path("model.safetensors"))


def test_a_model_without_memory_is_refused() -> None:
    model, gates = gated()
    given = numbers(model)
    with pytest.raises(CheckpointError, match="weight of the model"):
        load_with_gates(model.to("meta"), gates, given)


def test_a_report_is_readable() -> None:
    report = LoadReport(
        found=("a.weight", "a.bias"),
        missing=("b.weight",),
        zero_filled=("b.weight",),
        unexpected=tuple("vwxyz"),
    )
    assert str(report).splitlines() == [
        "learned, found:   2 (a.weight, a.bias)",
        "learned, missing: 1 (b.weight)",
        "set to zero:      1 (b.weight)",
        "others, missing:  none",
        "unexpected:       5 (v, w, x, ...)",
    ]


def wan() -> tuple[nn.Module, list[str]]:
    """A small Wan transformer with a gate added to the self-attention of each block."""
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    for block in model.blocks:
        block.attn1.to_gate_compress = nn.Linear(32, 32)
    return model, GATES


def test_wan_goes_through_fastvideos_names_and_back() -> None:
    model, _ = wan()
    state_dict = model.state_dict()
    renamed = to_fastvideo(state_dict)
    assert set(to_diffusers(renamed)) == set(state_dict)
    # Of each block: q, k, v, out, two norms, the gate, the other out, two layers, one norm.
    assert len(set(state_dict) - set(renamed)) == 2 * (8 + 2 + 2 + 2 + 4 + 2)
    assert not any(".attn1." in name for name in renamed)


@pytest.mark.parametrize("form", ["diffusers", "fastvideo", "published"])
def test_wan_is_loaded_from_any_form(form: str) -> None:
    model, gates = wan()
    expected = numbers(model)
    report = load_with_gates(model, gates, CHECKPOINTS[form](expected))
    assert_loaded(model, expected)
    assert len(report.found) == 4


def test_wan_from_a_checkpoint_without_gates_has_zeros_there_and_all_else_loaded() -> None:
    model, gates = wan()
    expected = numbers(model)
    plain = {name: value for name, value in expected.items() if "gate" not in name}
    report = load_with_gates(model, gates, to_fastvideo(plain))
    zeros = {name: torch.zeros_like(expected[name]) for name in report.zero_filled}
    assert len(zeros) == 4
    assert_loaded(model, {**plain, **zeros})
