"""VMoBA's config: published documents, layers that take turns, and what is out of range."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import compiled_sparse as cs
from compiled_sparse.config import MechanismConfig
from compiled_sparse.config import parse_spec
from compiled_sparse.errors import ConfigError

# The two configs that are published with the method for Wan 1.3B.
WIDE = {
    "temporal_chunk_size": 2,
    "temporal_topk": 2,
    "spatial_chunk_size": [4, 13],
    "spatial_topk": 6,
    "st_chunk_size": [4, 4, 13],
    "st_topk": 18,
    "moba_select_mode": "topk",
    "moba_threshold": 0.25,
    "moba_threshold_type": "query_head",
    "first_full_layer": 0,
    "first_full_step": 12,
    "temporal_layer": 1,
    "spatial_layer": 1,
    "st_layer": 1,
}
SQUARE = WIDE | {
    "temporal_topk": 3,
    "spatial_chunk_size": [3, 4],
    "spatial_topk": 20,
    "st_chunk_size": [4, 6, 4],
    "st_topk": 15,
    "moba_select_mode": "threshold",
}


LETTERS = {"temporal": "t", "spatial": "s", "st": "b"}


def letters(config: cs.VMoBA, layers: int) -> str:
    """What each layer does: dense, temporal, spatial or boxes."""
    found = [config.for_layer(layer) for layer in range(layers)]
    return "".join(LETTERS[each.kind] if isinstance(each, cs.VMoBA) else "d" for each in found)


@pytest.mark.parametrize("document", [WIDE, SQUARE], ids=["448x832", "480x832"])
def test_a_published_document_loads_as_it_is(document: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "vmoba.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    config = cs.VMoBA.from_published(path)
    for name, value in document.items():
        assert getattr(config, name) == (tuple(value) if isinstance(value, list) else value)
    assert cs.VMoBA.from_published(document) == cs.VMoBA.from_published(str(path)) == config


def test_what_the_pipeline_adds_is_not_read_and_what_is_left_out_is_as_published() -> None:
    config = cs.VMoBA.from_published({"current_timestep": 3, "raw_latent_shape": [20, 60, 104]})
    assert config == cs.VMoBA(first_full_step=12)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ((1, 1, 1), "tsbtsb"),
        ((2, 0, 1), "ttbttb"),
        ((0, 1, 0), "ssssss"),
        ((1, 2, 3), "tssbbb"),
    ],
)
def test_layers_take_turns(turns: tuple[int, int, int], expected: str) -> None:
    names = ("temporal_layer", "spatial_layer", "st_layer")
    config = cs.VMoBA(**dict(zip(names, turns, strict=True)))
    assert letters(config, 6) == expected
    assert config.needs_layer == (len(set(expected)) > 1)
    assert not any(config.for_layer(layer).needs_layer for layer in range(6))


def test_layers_before_the_first_full_one_are_dense_and_turns_count_from_it() -> None:
    assert letters(cs.VMoBA(first_full_layer=2), 6) == "ddtsbt"
    # As published: nothing is dense, and the remainder of a negative number is not negative.
    published = cs.VMoBA(first_full_layer=2, published_schedule=True)
    assert letters(published, 6) == "sbtsbt"
    assert published.needs_layer


def test_steps_before_the_first_full_one_are_dense_and_an_unknown_one_is_the_first() -> None:
    config = cs.VMoBA(first_full_step=12)
    assert [isinstance(config.at(step), cs.Dense) for step in (None, 0, 11, 12)] == [
        *(True, True, True, False)
    ]
    published = cs.VMoBA(first_full_step=12, published_schedule=True)
    assert isinstance(published.at(0), cs.VMoBA)
    assert published.dense_first_steps == 0


def test_layers_of_like_chunks_are_one_config() -> None:
    one = cs.VMoBA(spatial_topk=4).for_layer(0)
    assert one == cs.VMoBA(spatial_topk=9, st_chunk_size=(2, 2, 2)).for_layer(3)
    assert one.describe() == "vmoba:spatial_layer=0,st_layer=0"


@pytest.mark.parametrize(
    ("fields", "grid", "tile"),
    [
        ({"temporal_chunk_size": 2}, (600,), (40,)),
        ({"temporal_chunk_size": 2.55}, (600,), (51,)),
        ({"temporal_layer": 0, "st_layer": 0}, (30, 4, 5), (30, 3, 4)),
        ({"temporal_layer": 0, "spatial_layer": 0}, (30, 4, 5), (4, 4, 4)),
        ({"temporal_chunk_size": 1e300}, (600,), (600,)),
    ],
)
def test_chunks_are_boxes_of_a_grid_or_runs_of_it(
    fields: dict[str, Any], grid: tuple[int, ...], tile: tuple[int, ...]
) -> None:
    config = cs.VMoBA(**fields)
    assert config.resolve_grid((30, 4, 5)) == grid
    assert config.resolve_tile((30, 4, 5)) == tile


@pytest.mark.parametrize("config", [cs.VMoBA(), cs.VMoBA.from_published(WIDE)])
def test_a_config_comes_back_from_json_and_from_its_spec(config: cs.VMoBA) -> None:
    assert MechanismConfig.from_json(config.to_json()) == config
    assert parse_spec(config.describe()) == config


@pytest.mark.parametrize(
    "fields",
    [
        {"temporal_chunk_size": 0},
        {"temporal_chunk_size": True},
        {"temporal_chunk_size": float("nan")},
        {"spatial_chunk_size": (3, 4, 5)},
        {"spatial_chunk_size": 3},
        {"st_chunk_size": [4, 0, 4]},
        {"temporal_topk": 0},
        {"st_topk": 2**31},
        {"spatial_topk": 2.0},
        {"moba_select_mode": "top_k"},
        {"moba_threshold": -0.1},
        {"moba_threshold": "0.25"},
        {"moba_threshold_type": "head"},
        {"moba_select_mode": "topk", "moba_threshold_type": "block"},
        {"first_full_layer": -1},
        {"first_full_step": False},
        {"temporal_layer": 0, "spatial_layer": 0, "st_layer": 0},
        {"published_schedule": 1},
    ],
    ids=str,
)
def test_what_is_out_of_range_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        cs.VMoBA(**fields)
    name = "temporal_layer" if len(fields) == 3 else list(fields)[-1]
    assert caught.value.problem == f"VMoBA.{name} is out of range"
