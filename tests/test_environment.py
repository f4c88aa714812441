"""`COMPILED_SPARSE_BACKEND`: what it may hold, and what nobody knows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import compiled_sparse as cs
from compiled_sparse.config import MechanismConfig
from compiled_sparse.environment import ALIASES
from compiled_sparse.environment import VARIABLE
from compiled_sparse.environment import mechanism_from_name
from compiled_sparse.environment import policy_from_environment
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import ConfigFormatError
from compiled_sparse.errors import UnknownMechanismError


@pytest.mark.parametrize(
    ("value", "policy"),
    [
        ("sta", cs.Policy({"*": cs.STA()})),
        (" STA ", cs.Policy({"*": cs.STA()})),
        ("SLIDING_TILE_ATTN", cs.Policy({"*": cs.STA()})),
        ("torch_sdpa", cs.Policy({"*": cs.Dense()})),
        ("VIDEO_SPARSE_ATTN", cs.Policy({"*": cs.VSA()})),
        ("vsa:sparsity=0.8,gate=ungated", cs.Policy({"*": cs.VSA(sparsity=0.8, gate="ungated")})),
        ("sta:window_thw=1x3x3", cs.Policy({"*": cs.STA(window_thw=(1, 3, 3))})),
        ("auto", cs.Policy({"*": cs.Auto()})),
        ("careful", cs.quality("careful")),
        ("", None),
        ("  ", None),
    ],
)
def test_names_specs_levels_and_aliases_are_taken(
    value: str, policy: cs.Policy | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    assert policy_from_environment() == policy


def test_nothing_is_said_where_the_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert policy_from_environment() is None


def test_a_policy_file_is_read_again_after_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "policy.json"
    monkeypatch.setenv(VARIABLE, str(path))
    for number, policy in enumerate((cs.quality("fast"), cs.Policy({"*": "sta"}))):
        path.write_text(policy.to_json(), encoding="utf-8")
        os.utime(path, ns=(number, number))
        assert policy_from_environment() == policy


def test_a_file_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "no/such/policy.json")
    with pytest.raises(ConfigFormatError, match="policy file cannot be read"):
        policy_from_environment()


@pytest.mark.parametrize("value", ["sliding", "FLASH_ATTN", "sta2", "vmoba2"])
def test_an_unknown_value_is_an_error_that_lists_what_is_known(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(UnknownMechanismError) as caught:
        policy_from_environment()
    for known in ("sta", "dense", "careful", *ALIASES):
        assert known in caught.value.expected
    assert VARIABLE in caught.value.problem
    assert value in caught.value.got


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("sliding_tile_attn", cs.STA()),
        ("Video_Sparse_Attn", cs.VSA()),
        ("VMOBA_ATTN", cs.VMoBA()),
        ("TORCH_SDPA", cs.Dense()),
        ("Dense", cs.Dense()),
        ("sta:window_thw=1x1x1", cs.STA(window_thw=(1, 1, 1))),
    ],
)
def test_a_name_stands_for_a_config(name: str, config: MechanismConfig) -> None:
    assert mechanism_from_name(name) == config


def test_a_misspelt_field_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "sta:window=3x3x3")
    with pytest.raises(ConfigFormatError, match="unknown field"):
        policy_from_environment()
    monkeypatch.setenv(VARIABLE, "sta:window_thw=0x3x3")
    with pytest.raises(ConfigError, match="positive integers"):
        policy_from_environment()
