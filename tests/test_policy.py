"""Policies: which config for which module path, in all the forms one can write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import compiled_sparse as cs
from compiled_sparse.config import Auto
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import ConfigFormatError
from compiled_sparse.errors import UnknownMechanismError
from compiled_sparse.policy import as_policy
from compiled_sparse.quality import LEVELS

RULES = {"blocks.0.*": cs.Dense(), "blocks.*.attn1": cs.STA(), "*": "sta:tile_thw=auto"}


def test_the_first_matching_rule_wins() -> None:
    policy = cs.Policy(RULES)
    assert policy.match("blocks.0.attn1") == ("blocks.0.*", cs.Dense())
    assert policy.match("blocks.10.attn1") == ("blocks.*.attn1", cs.STA())
    assert policy.match("blocks.10.attn2") == ("*", cs.STA(tile_thw="auto"))
    assert policy.match("") == ("*", cs.STA(tile_thw="auto"))


def test_a_path_no_rule_matches_has_no_config() -> None:
    assert cs.Policy({"blocks.*": cs.STA()}).match("head.attn") is None


def test_globs_match_case_and_the_whole_path() -> None:
    policy = cs.Policy({"Blocks.?": cs.STA()})
    assert policy.match("Blocks.1") is not None
    assert policy.match("blocks.1") is None
    assert policy.match("Blocks.10") is None


def test_json_gives_back_the_same_policy_in_the_same_order() -> None:
    policy = cs.Policy(RULES)
    assert cs.Policy.from_json(policy.to_json()) == policy
    assert list(json.loads(policy.to_json())["policy"]["rules"]) == list(RULES)


def test_policies_can_be_written_in_every_form(tmp_path: Path) -> None:
    expected = cs.Policy({"*": cs.STA()})
    path = tmp_path / "policy.json"
    path.write_text(expected.to_json(), encoding="utf-8")
    forms = [cs.STA(), "sta", "sta:window_thw=3x3x3", {"*": "sta"}, expected, path, str(path)]
    assert [as_policy(form) for form in forms] == [expected] * len(forms)
    assert cs.Policy((("*", "sta"),)) == cs.Policy([["*", cs.STA()]]) == expected


def test_no_policy_means_automatic() -> None:
    assert as_policy(None) == cs.Policy({"*": Auto()})


def test_policies_are_hashable() -> None:
    assert hash(cs.Policy(RULES)) == hash(cs.Policy(RULES))


@pytest.mark.parametrize(
    "rules",
    [
        {},
        (),
        {"*": "sta", "blocks.*": "dense"},
        (("blocks.*", "sta"), ("blocks.*", "dense")),
        (("*", "sta"), ("*", "dense")),
    ],
    ids=repr,
)
def test_rules_that_can_never_be_reached_are_refused(rules: object) -> None:
    with pytest.raises(ConfigError, match="empty or can never be reached"):
        cs.Policy(rules)


@pytest.mark.parametrize("rules", ["sta", cs.STA(), 3, ("sta",), (("*", "sta", "x"),)], ids=repr)
def test_rules_that_are_no_mapping_are_refused(rules: object) -> None:
    with pytest.raises(ConfigError, match="not a mapping"):
        cs.Policy(rules)


@pytest.mark.parametrize("value", [3, {"*": 3}, {"*": None}, {"*": cs.STA}], ids=repr)
def test_a_rule_that_is_neither_config_nor_spec_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="neither a config nor a spec string"):
        as_policy(value)


def test_an_unknown_mechanism_in_a_rule_is_refused() -> None:
    with pytest.raises(UnknownMechanismError, match="unknown mechanism"):
        as_policy({"*": "sliding"})


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigFormatError, match="policy file cannot be read"):
        as_policy(tmp_path / "missing.json")
    with pytest.raises(ConfigFormatError, match="No such file"):
        as_policy(str(tmp_path / "missing.json"))


@pytest.mark.parametrize(
    "document",
    [
        {"version": 1},
        {"version": 1, "policy": []},
        {"version": 1, "policy": {}},
        {"version": 1, "policy": {"rules": []}},
        {"version": 1, "policy": {"rules": {"*": "sta"}}},
        cs.STA().to_dict(),
    ],
    ids=str,
)
def test_a_document_without_rules_is_refused(document: dict) -> None:
    with pytest.raises(ConfigFormatError, match="holds no policy"):
        cs.Policy.from_json(json.dumps(document))


def test_a_policy_of_another_version_is_refused() -> None:
    with pytest.raises(ConfigFormatError, match="another format version"):
        cs.Policy.from_json('{"version": 3, "policy": {"rules": {}}}')


# Kinds of calls


def test_a_glob_may_ask_for_a_kind_of_call() -> None:
    wide = cs.STA(window_thw=(5, 5, 5))
    policy = cs.Policy({"self:blocks.*": "sta", "joint:*": wide, "*": "dense"})
    assert policy.match("blocks.1", "self") == ("self:blocks.*", cs.STA())
    assert policy.match("blocks.1", "joint") == ("joint:*", wide)
    assert policy.match("head", "self") == ("*", cs.Dense())
    assert policy.match("blocks.1") == ("*", cs.Dense())


@pytest.mark.parametrize("glob", ["cross:*", "video:blocks.*", ":*"])
def test_a_prefix_that_is_no_kind_is_refused(glob: str) -> None:
    with pytest.raises(ConfigError, match="prefixed by something that is no kind"):
        cs.Policy({glob: "sta"})


# Schedules


SCHEDULED = cs.Policy(RULES, 12, 2, dense_first_layers=2, dense_last_layers=1)


def test_a_schedule_survives_json() -> None:
    assert cs.Policy.from_json(SCHEDULED.to_json()) == SCHEDULED
    assert cs.Policy(RULES) != SCHEDULED
    document = json.loads(SCHEDULED.to_json())
    assert document["version"] == 2
    assert document["policy"]["dense_first_steps"] == 12


def test_documents_of_the_first_format_still_load() -> None:
    rule = {"version": 1, "mechanism": "sta", "window_thw": [3, 3, 3], "tile_thw": [6, 8, 8]}
    automatic = {"version": 1, "mechanism": "auto"}
    document = {"version": 1, "policy": {"rules": {"blocks.*": rule, "*": automatic}}}
    loaded = cs.Policy.from_json(json.dumps(document))
    assert loaded == cs.Policy({"blocks.*": cs.STA(), "*": Auto()})


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        ({}, ""),
        ({"dense_first_steps": 12, "dense_first_layers": 2}, "dense at steps 0-11, layers 0-1"),
        ({"dense_first_steps": 1, "dense_last_steps": 1}, "dense at step 0, the last step"),
        ({"dense_last_layers": 3}, "dense at the last 3 layers"),
    ],
)
def test_a_schedule_reads_well(schedule: dict[str, int], text: str) -> None:
    assert cs.Policy({"*": "sta"}, **schedule).describe_schedule() == text


@pytest.mark.parametrize(
    ("step", "num_steps", "dense"),
    [
        (0, 10, True),
        (2, 10, True),
        (3, 10, False),
        (7, 10, False),
        (8, 10, True),
        (9, None, False),
        (None, 10, True),
        (None, None, True),
    ],
)
def test_steps_at_both_ends_are_dense(step: int | None, num_steps: int | None, dense: bool) -> None:
    schedule = cs.Policy({"*": "sta"}, 3, 2).steps
    assert schedule is not None
    assert schedule.is_dense(step, num_steps) is dense


def test_a_policy_without_dense_steps_has_no_schedule() -> None:
    assert cs.Policy({"*": "sta"}, dense_first_layers=1).steps is None


# Quality levels


def test_quality_levels_are_policies_under_a_name() -> None:
    assert as_policy("careful") == cs.quality(" Careful ")
    assert cs.quality("careful") == cs.Policy(
        {"*": cs.Auto(window_fraction=0.8, min_gain=1.1)},
        dense_first_steps=12,
        dense_first_layers=2,
    )
    assert cs.quality("balanced") == cs.Policy(
        {"*": cs.Auto(window_fraction=0.6)}, dense_first_steps=8
    )
    assert cs.quality("fast") == cs.Policy({"*": cs.Auto(window_fraction=0.4)}, dense_first_steps=4)
    assert all(cs.quality(name).is_automatic for name in LEVELS)
