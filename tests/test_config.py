"""Configs: checked when built, and the same after a trip through JSON or a spec string."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import compiled_sparse as cs
from compiled_sparse.config import Auto
from compiled_sparse.config import MechanismConfig
from compiled_sparse.config import known_mechanisms
from compiled_sparse.config import parse_spec
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import ConfigFormatError
from compiled_sparse.errors import LayoutError
from compiled_sparse.errors import UnknownMechanismError


@st.composite
def sta_configs(draw: st.DrawFn) -> cs.STA:
    axes = draw(st.integers(1, 3))
    extents = st.tuples(*[st.integers(1, 20)] * axes)
    windows = draw(st.one_of(extents, st.lists(extents, min_size=1, max_size=4).map(tuple)))
    return cs.STA(window_thw=windows, tile_thw=draw(st.one_of(extents, st.just("auto"))))


@given(sta_configs())
def test_json_gives_back_the_same_config(config: cs.STA) -> None:
    assert MechanismConfig.from_json(config.to_json()) == config


@given(sta_configs())
def test_a_spec_string_means_the_same_windows_and_tile(config: cs.STA) -> None:
    again = parse_spec(config.describe())
    assert isinstance(again, cs.STA)
    assert again.windows == config.windows
    assert again.tile_thw == config.tile_thw


@given(st.builds(cs.SWBA, block=st.integers(1, 10**6), window=st.integers(1, 10**6)))
def test_block_and_window_survive_both_round_trips(config: cs.SWBA) -> None:
    assert MechanismConfig.from_json(config.to_json()) == config
    assert parse_spec(config.describe()) == config


@pytest.mark.parametrize("name", ["block", "window"])
@pytest.mark.parametrize("value", [0, -1, "a", True, 2.0, None, (4,)], ids=repr)
def test_a_block_or_window_that_is_no_count_is_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{name}={value!r}")):
        cs.SWBA(**{name: value})


def test_a_sequence_is_cut_into_blocks_whatever_its_length() -> None:
    assert (cs.SWBA().block, cs.SWBA().window) == (256, 4)
    assert cs.SWBA(block=100).resolve_tile((7,)) == (100,)
    assert cs.SWBA().resolved((256,)) == cs.SWBA()
    assert not cs.SWBA().needs_static_grid


@st.composite
def vsa_configs(draw: st.DrawFn) -> cs.VSA:
    axes = draw(st.integers(1, 3))
    return cs.VSA(
        sparsity=draw(st.floats(0, 1, exclude_max=True)),
        tile_thw=draw(st.tuples(*[st.integers(1, 20)] * axes)),
        gate=draw(st.sampled_from([None, "ungated", "to_gate_compress"])),
    )


@given(vsa_configs())
def test_sparsity_tile_and_gate_survive_both_round_trips(config: cs.VSA) -> None:
    assert MechanismConfig.from_json(config.to_json()) == config
    assert parse_spec(config.describe()) == config
    assert hash(parse_spec(config.describe())) == hash(config)


@pytest.mark.parametrize("sparsity", [1, 1.0, -0.1, 2, float("nan"), "0.9", None, True], ids=repr)
def test_a_sparsity_that_is_no_share_is_refused(sparsity: object) -> None:
    with pytest.raises(ConfigError, match=r"VSA\.sparsity is out of range"):
        cs.VSA(sparsity=sparsity)


@pytest.mark.parametrize("tile", [(), (0, 4, 4), (4, 4, 4.0), (True, 4, 4), "auto", None], ids=repr)
def test_a_tile_of_means_is_made_of_positive_integers(tile: object) -> None:
    with pytest.raises(ConfigError, match=r"VSA\.tile_thw is not made of positive integers"):
        cs.VSA(tile_thw=tile)


@pytest.mark.parametrize("gate", ["", "a b", "attn.gate", 3, True, ("to_gate",)], ids=repr)
def test_a_gate_that_is_no_name_is_refused(gate: object) -> None:
    with pytest.raises(ConfigError, match=r"VSA\.gate is no name"):
        cs.VSA(gate=gate)


def test_a_named_gate_is_needed_an_ungated_config_takes_none_and_no_name_takes_either() -> None:
    assert [cs.VSA(gate=gate).gate_name for gate in (None, "ungated", "to_gate")] == [
        None,
        None,
        "to_gate",
    ]
    for gate in (False, True):
        cs.VSA().check_gate(gate)
    cs.VSA(gate="ungated").check_gate(False)
    cs.VSA(gate="to_gate").check_gate(True)
    with pytest.raises(ConfigError, match="given to an ungated config"):
        cs.VSA(gate="ungated").check_gate(True)
    with pytest.raises(ConfigError, match="names a learned gate and none is given"):
        cs.VSA(gate="to_gate").check_gate(False)


@pytest.mark.parametrize("config", [cs.Dense(), Auto(), cs.STA(), cs.SWBA()], ids=repr)
def test_mechanisms_without_a_gate_refuse_one(config: MechanismConfig) -> None:
    config.check_gate(False)
    with pytest.raises(ConfigError, match="takes no gate"):
        config.check_gate(True)
    assert config.gate_name is None
    assert not config.has_sparsity


def test_means_are_of_the_same_tile_on_every_grid_of_its_axes() -> None:
    assert cs.VSA().resolve_tile((21, 30, 52)) == cs.VSA().tile_thw == (4, 4, 4)
    assert cs.VSA(tile_thw=64) == cs.VSA(tile_thw=(64,))
    assert not cs.VSA().needs_static_grid
    assert cs.VSA().has_sparsity
    with pytest.raises(LayoutError, match="different numbers of axes"):
        cs.VSA().resolve_tile((30, 52))


@pytest.mark.parametrize("config", [cs.Dense(), Auto()], ids=repr)
def test_configs_without_fields_survive_both_round_trips(config: MechanismConfig) -> None:
    assert MechanismConfig.from_json(config.to_json()) == config
    assert parse_spec(config.describe()) == config


def test_the_json_document_names_version_and_mechanism() -> None:
    assert json.loads(cs.STA().to_json()) == {
        "version": 2,
        "mechanism": "sta",
        "window_thw": [3, 3, 3],
        "tile_thw": [6, 8, 8],
    }


def test_the_description_reads_like_the_spec_string() -> None:
    config = cs.STA(window_thw=((3, 3, 3), (1, 5, 5)), tile_thw="auto")
    assert config.describe() == "sta:window_thw=3x3x3/1x5x5,tile_thw=auto"
    assert cs.Dense().describe() == "dense"


def test_configs_are_frozen_hashable_and_keyword_only() -> None:
    config = cs.STA(window_thw=[3, 5, 5], tile_thw=[4, 4, 4])
    assert config == cs.STA(window_thw=(3, 5, 5), tile_thw=(4, 4, 4))
    assert hash(config) == hash(cs.STA(window_thw=(3, 5, 5), tile_thw=(4, 4, 4)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.tile_thw = (1, 1, 1)
    with pytest.raises(TypeError):
        cs.STA((3, 3, 3))


def test_one_window_serves_all_heads_and_many_serve_one_each() -> None:
    assert cs.STA().windows == ((3, 3, 3),)
    per_head = cs.STA(window_thw=[(3, 3, 3), [1, 5, 5]])
    assert per_head.windows == ((3, 3, 3), (1, 5, 5))
    assert per_head.num_axes == 3
    per_head.check_heads(2)
    with pytest.raises(ConfigError, match="one window per query head"):
        per_head.check_heads(3)


def test_a_plain_integer_is_a_window_or_tile_of_one_axis() -> None:
    assert cs.STA(window_thw=3, tile_thw=64) == cs.STA(window_thw=(3,), tile_thw=(64,))
    assert parse_spec("sta:window_thw=3/5,tile_thw=64").windows == ((3,), (5,))


@pytest.mark.parametrize(
    "window", [(), (0, 3, 3), (3, 3, -1), (3.0, 3, 3), (True, 3, 3), "abc", None, ((3, 3, 3), 3)]
)
def test_a_window_that_is_not_made_of_positive_integers_is_refused(window: object) -> None:
    with pytest.raises(ConfigError, match=r"STA\.window_thw is not made of positive integers"):
        cs.STA(window_thw=window)


@pytest.mark.parametrize("tile", [(), (0, 3, 3), (6, 8, 8.0), (False, 3, 3), "Auto", None])
def test_a_tile_that_is_not_made_of_positive_integers_is_refused(tile: object) -> None:
    with pytest.raises(ConfigError, match=r"STA\.tile_thw is not made of positive integers"):
        cs.STA(tile_thw=tile)


def test_windows_of_different_lengths_are_refused() -> None:
    with pytest.raises(ConfigError, match="windows of different lengths"):
        cs.STA(window_thw=((3, 3, 3), (3, 3)))


def test_a_window_and_a_tile_with_different_axes_are_refused() -> None:
    with pytest.raises(ConfigError, match="different numbers of axes"):
        cs.STA(window_thw=(3, 3))


def test_the_tile_is_the_given_one_or_the_automatic_one() -> None:
    assert cs.STA().resolve_tile((21, 30, 52)) == (6, 8, 8)
    assert cs.STA(tile_thw="auto").resolve_tile((21, 30, 52)) == (7, 5, 13)


@pytest.mark.parametrize("tile", [(6, 8, 8), "auto"])
def test_a_grid_with_other_axes_than_the_config_has_no_tile(tile: object) -> None:
    with pytest.raises(LayoutError, match="different numbers of axes"):
        cs.STA(tile_thw=tile).resolve_tile((30, 52))


def test_every_mechanism_is_registered_by_its_name() -> None:
    names = ("auto", "dense", "sage_sla", "sla", "sta", "swba", "vmoba", "vsa")
    assert known_mechanisms() == names


@pytest.mark.parametrize(
    ("spec", "config"),
    [
        ("dense", cs.Dense()),
        ("auto", Auto()),
        ("STA", cs.STA()),
        (
            " sta : window_thw = 3x5x5 , tile_thw = auto ",
            cs.STA(window_thw=(3, 5, 5), tile_thw="auto"),
        ),
        ("sta:", cs.STA()),
        ("swba", cs.SWBA()),
        ("swba:block=64,window=2", cs.SWBA(block=64, window=2)),
        ("vsa", cs.VSA()),
        (
            "vsa:sparsity=0.8,tile_thw=4x4x4,gate=to_gate_compress",
            cs.VSA(sparsity=0.8, tile_thw=(4, 4, 4), gate="to_gate_compress"),
        ),
        ("vsa:sparsity=0,tile_thw=8x8", cs.VSA(sparsity=0, tile_thw=(8, 8))),
    ],
)
def test_spec_strings_are_read_with_any_spaces_and_case(spec: str, config: object) -> None:
    assert parse_spec(spec) == config


@pytest.mark.parametrize("name", ["", "stta", "none", ":window_thw=3x3x3"])
def test_an_unknown_mechanism_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownMechanismError, match="auto, dense, sage_sla, sla, sta"):
        parse_spec(name)


def test_a_spec_part_without_an_equals_sign_is_refused() -> None:
    with pytest.raises(ConfigFormatError, match="not key=value"):
        parse_spec("sta:3x3x3")


@pytest.mark.parametrize("spec", ["sta:window=3x3x3", "dense:window_thw=3x3x3"])
def test_an_unknown_field_is_refused(spec: str) -> None:
    with pytest.raises(ConfigFormatError, match="unknown field of mechanism"):
        parse_spec(spec)


@pytest.mark.parametrize("value", ["3x0x3", "3.5", "true", "none", "3xax3"])
def test_a_spec_value_out_of_range_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="not made of positive integers"):
        parse_spec(f"sta:window_thw={value}")


@pytest.mark.parametrize("version", [0, 3, "1", None])
def test_another_format_version_is_refused(version: object) -> None:
    document = {**cs.STA().to_dict(), "version": version}
    with pytest.raises(ConfigFormatError, match="another format version"):
        MechanismConfig.from_dict(document)


def test_a_document_without_a_mechanism_is_refused() -> None:
    with pytest.raises(UnknownMechanismError, match="unknown mechanism"):
        MechanismConfig.from_dict({"version": 1})


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not a JSON document"), ("[1]", "not an object"), ("3", "object")]
)
def test_text_that_is_no_json_object_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigFormatError, match=message):
        MechanismConfig.from_json(text)
