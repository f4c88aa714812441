"""What `torch.compile(..., options=...)` may hold."""

from __future__ import annotations

import pytest
import torch

import compiled_sparse as cs
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import UnknownOptionError
from compiled_sparse.options import INNER_COMPILERS
from compiled_sparse.options import parse_options


def test_no_options_mean_automatic_on_inductor() -> None:
    for options in (None, {}):
        parsed = parse_options(options)
        assert parsed.is_automatic
        assert parsed.inner == "inductor"
        assert parsed.inductor == {}
        assert parsed.strict is False


def test_every_own_option_is_taken() -> None:
    parsed = parse_options({"policy": cs.STA(), "inner": "aot_eager", "strict": True})
    assert parsed.policy == cs.Policy({"*": cs.STA()})
    assert parsed.inner == "aot_eager"
    assert parsed.strict is True
    assert not parsed.is_automatic


@pytest.mark.parametrize("inner", INNER_COMPILERS)
def test_every_named_inner_compiler_is_known(inner: str) -> None:
    assert parse_options({"inner": inner}).inner == inner


def test_the_mode_turns_into_patches_wherever_it_is_given() -> None:
    expected = torch._inductor.list_mode_options()["max-autotune"]
    assert expected
    assert parse_options({}, mode="max-autotune").inductor == expected
    assert parse_options({"mode": "max-autotune"}).inductor == expected
    assert parse_options({"mode": "default"}).inductor == {}


def test_inductor_options_pass_through_in_both_spellings() -> None:
    patches = parse_options({"max_autotune": True, "epilogue-fusion": False}).inductor
    assert patches == {"max_autotune": True, "epilogue_fusion": False}
    assert parse_options({"triton.cudagraphs": True}).inductor == {"triton.cudagraphs": True}


def test_an_option_overrides_the_mode() -> None:
    patches = parse_options({"mode": "max-autotune", "max_autotune": False}).inductor
    assert patches["max_autotune"] is False


def test_the_given_options_are_not_changed() -> None:
    options = {"policy": "sta", "inner": "eager", "strict": True, "mode": "default"}
    before = dict(options)
    parse_options(options)
    assert options == before


def test_a_policy_of_automatic_rules_only_is_automatic() -> None:
    assert parse_options({"policy": {"a": "auto", "*": "auto"}}).is_automatic
    assert not parse_options({"policy": {"a": "dense", "*": "auto"}}).is_automatic


@pytest.mark.parametrize(
    "options", [{"polixy": "sta"}, {"inner": "gcc"}, {"mode": "fast"}], ids=str
)
def test_what_nobody_knows_is_refused(options: dict) -> None:
    with pytest.raises(UnknownOptionError, match="unknown"):
        parse_options(options)


def test_the_known_modes_are_listed_once() -> None:
    with pytest.raises(UnknownOptionError) as caught:
        parse_options({"mode": "fast"})
    names = caught.value.expected.removeprefix("one of ").split(", ")
    assert sorted(names) == sorted(set(names))
    assert {"default", "max-autotune"} <= set(names)


def test_a_policy_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="neither a config nor a spec string"):
        parse_options({"policy": 3})
