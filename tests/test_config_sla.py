"""The configs of sparse-linear attention: checked when built, and the same after a trip."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

import compiled_sparse as cs
from compiled_sparse.config import MechanismConfig
from compiled_sparse.config import parse_spec
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import LayoutError
from compiled_sparse.sparsity import ratio_at
from compiled_sparse.sparsity import truncated_top_k

KINDS = pytest.mark.parametrize("kind", [cs.SLA, cs.SageSLA])


@st.composite
def configs(draw: st.DrawFn) -> cs.SLA:
    axes = draw(st.integers(1, 3))
    blocks = st.tuples(*[st.integers(1, 200)] * axes)
    if axes == 1:
        blocks = st.one_of(blocks, st.integers(1, 200))
    return cs.SLA(
        topk_ratio=draw(st.floats(0, 1, exclude_min=True)),
        feature_map=draw(st.sampled_from(["softmax", "elu", "relu"])),
        block_q=draw(blocks),
        block_k=draw(blocks),
        proj=draw(st.sampled_from([None, "proj_l", "other"])),
    )


@given(configs())
def test_every_field_survives_both_round_trips(config: cs.SLA) -> None:
    assert MechanismConfig.from_json(config.to_json()) == config
    assert parse_spec(config.describe()) == config
    assert hash(parse_spec(config.describe())) == hash(config)


def test_defaults_are_the_published_ones() -> None:
    config = cs.SLA()
    assert (config.topk_ratio, config.feature_map, config.proj) == (0.1, "softmax", "proj_l")
    assert (config.block_q, config.block_k) == (128, 64)
    assert (cs.SageSLA().topk_ratio, cs.SageSLA().values) == (0.5, "auto")


def test_a_run_is_the_same_as_a_number_or_as_one_side() -> None:
    assert cs.SLA(block_q=(32,), block_k=[16]) == cs.SLA(block_q=32, block_k=16)
    assert cs.SLA(block_q=[4, 8, 4], block_k=(4, 4, 4)).query_tile == (4, 8, 4)


@KINDS
@pytest.mark.parametrize("ratio", [0, -0.1, 1.5, float("nan"), "0.1", None, True], ids=repr)
def test_a_ratio_that_is_no_share_is_refused(kind: type[cs.SLA], ratio: object) -> None:
    with pytest.raises(ConfigError, match=r"SLA\.topk_ratio is out of range"):
        kind(topk_ratio=ratio)


@KINDS
@pytest.mark.parametrize("name", ["block_q", "block_k"])
@pytest.mark.parametrize("block", [(), 0, -1, (0, 4), 4.0, True, "auto", None], ids=repr)
def test_a_block_is_made_of_positive_integers(kind: type[cs.SLA], name: str, block: object) -> None:
    with pytest.raises(ConfigError, match=rf"SLA\.{name} is not made of positive integers"):
        kind(**{name: block})


@pytest.mark.parametrize("proj", ["", "a b", "attn.proj", 3, True, ("proj_l",)], ids=repr)
def test_a_projection_that_is_no_name_is_refused(proj: object) -> None:
    with pytest.raises(ConfigError, match=r"SLA\.proj is no name"):
        cs.SLA(proj=proj)


@pytest.mark.parametrize("feature_map", ["hedgehog", "", None, 1, "Softmax"], ids=repr)
def test_a_feature_map_that_is_not_known_is_refused(feature_map: object) -> None:
    with pytest.raises(ConfigError, match="feature_map is not known"):
        cs.SLA(feature_map=feature_map)


def test_runs_are_of_the_sequence_and_boxes_of_the_grid() -> None:
    runs, boxes = cs.SLA(), cs.SLA(block_q=(4, 8, 4), block_k=(4, 4, 4))
    assert runs.grid_is_sequence
    assert not boxes.grid_is_sequence
    assert runs.resolve_tile((1000,)) == (128,)
    assert boxes.resolve_tile((21, 30, 52)) == (4, 8, 4)
    assert not runs.needs_static_grid
    with pytest.raises(LayoutError, match="different numbers of axes"):
        boxes.resolve_tile((30, 52))


@given(st.integers(0, 1000), st.integers(1, 500))
def test_a_sparsity_in_thousandths_leaves_the_ratio_in_thousandths(
    thousandths: int, blocks: int
) -> None:
    ratio = ratio_at(thousandths / 1000)
    assert ratio == (1000 - thousandths) / 1000
    assert truncated_top_k(blocks, ratio) == max(1, int(ratio * blocks))


@KINDS
@given(st.floats(0, 1, exclude_max=True))
def test_any_sparsity_below_one_gives_a_config_of_the_same_kind(
    kind: type[cs.SLA], sparsity: float
) -> None:
    config = kind(proj=None, block_q=7).with_sparsity(sparsity)
    assert type(config) is kind
    changed = {"topk_ratio": config.topk_ratio}
    assert config == dataclasses.replace(kind(proj=None, block_q=7), **changed)


def test_a_projection_is_named_given_or_neither() -> None:
    assert [cs.SLA(proj=proj).projection_name for proj in (None, "proj_l")] == [None, "proj_l"]
    assert cs.VSA().projection_name is None
    cs.SLA().check_projection(None)
    cs.SLA(proj=None).check_projection(None)
    for config in (cs.VSA(), cs.STA(), cs.SWBA(), cs.Dense()):
        with pytest.raises(ConfigError, match="takes no projection"):
            config.check_projection((0, None))


def test_it_takes_no_gate() -> None:
    assert cs.SLA().gate_name is None
    with pytest.raises(ConfigError, match="takes no gate"):
        cs.SLA().check_gate(True)
