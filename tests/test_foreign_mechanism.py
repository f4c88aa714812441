"""A mechanism of another package, from its entry point to a compiled model."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import GRID
from modules import TinyDiT
from modules import assert_close
from modules import compile_sparse
from modules import dit_inputs
from modules import parameter_gradients
from torch import Tensor

import compiled_sparse as cs
from compiled_sparse import registry
from compiled_sparse.config import MechanismConfig
from compiled_sparse.config import known_mechanisms
from compiled_sparse.config import parse_spec
from compiled_sparse.environment import VARIABLE
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import UnknownMechanismError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import Text
from compiled_sparse.ops.plan import block_tokens
from compiled_sparse.reference.blocks import block_of_token

SPEC = "topblocks:keep=0.3,mean=0.25"
TEXT = cs.Text(3, 7)
BUILT_IN = ("auto", "dense", "sage_sla", "sla", "sta", "swba", "vmoba", "vsa")


def _install(folder: Path, *entries: str) -> None:
    """What pip leaves behind for a package with entry points."""
    info = folder / "foreign-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join((f"[{registry.ENTRY_POINT_GROUP}]", *entries)))


@pytest.fixture
def nothing_else_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_mechanisms", dict(registry._mechanisms))


@pytest.fixture
def installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_else_known: None
) -> Iterator[None]:
    _install(tmp_path, "topblocks = topblocks:MECHANISM")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parent / "foreign")
    importlib.invalidate_caches()
    yield
    torch._dynamo.reset()


def naive(q: Tensor, k: Tensor, v: Tensor, config: Any, layout: BlockLayout) -> Tensor:
    """The mechanism once more, block by block and head by head."""
    tokens = [row[row >= 0].long() for row in block_tokens(layout)]
    kept = max(1, math.ceil(config.keep * len(tokens)))
    out = torch.full_like(q, float("nan"))
    for batch in range(q.shape[0]):
        for head in range(q.shape[1]):
            queries, keys, values = (each[batch, head] for each in (q, k, v))
            for rows in tokens:
                fits = [queries[rows].mean(0) @ keys[columns].mean(0) for columns in tokens]
                best = torch.stack(fits).topk(kept).indices
                columns = torch.cat([tokens[int(block)] for block in best])
                scores = queries[rows] @ keys[columns].T / q.shape[-1] ** 0.5
                out[batch, head, rows] = scores.softmax(-1) @ values[columns]
            out[batch, head] += config.mean * values.mean(0)
    return out


def test_a_spec_string_finds_the_installed_mechanism(installed: None) -> None:
    config = parse_spec(SPEC)
    assert type(config).__name__ == "TopBlocks"
    assert config.describe().startswith("topblocks:keep=0.3")
    assert known_mechanisms() == tuple(sorted((*BUILT_IN, "topblocks")))
    assert MechanismConfig.from_json(config.to_json()) == config
    policy = cs.Policy({"blocks.*": SPEC, "*": "sta"}, dense_first_steps=2)
    assert cs.Policy.from_json(policy.to_json()) == policy


def test_all_mechanisms_are_listed_without_one_being_named_first(installed: None) -> None:
    assert "topblocks" in known_mechanisms()


@pytest.mark.parametrize("text", [cs.Text(), TEXT], ids=["video", "joint"])
def test_the_function_the_reference_and_the_naive_rule_agree(installed: None, text: Text) -> None:
    config: Any = parse_spec(SPEC)
    length = 60 + text.before + text.after
    q, k, v = (torch.randn(2, 3, length, 8, dtype=torch.float64) for _ in range(3))
    arguments: dict[str, Any] = {"grid_thw": GRID, "text": text}
    expected = naive(q, k, v, config, BlockLayout(GRID, (2, 3, 2), text.before, text.after))
    torch.testing.assert_close(cs.attention(q, k, v, config, **arguments), expected)
    torch.testing.assert_close(cs.reference.attention(q, k, v, config, **arguments), expected)
    compiled = torch.compile(
        lambda *qkv: cs.attention(*qkv, config, **arguments), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(q, k, v), expected)


def test_key_masks_and_fewer_key_heads_reach_op_and_reference(installed: None) -> None:
    config = parse_spec(SPEC)
    q = torch.randn(2, 4, 60, 8, dtype=torch.float64)
    k, v = (torch.randn(2, 2, 60, 8, dtype=torch.float64) for _ in range(2))
    arguments: dict[str, Any] = {
        "grid_thw": GRID,
        "key_mask": torch.rand(2, 60) < 0.7,
        "scale": 0.3,
        "return_lse": True,
    }
    actual = cs.attention(q, k, v, config, **arguments)
    expected = cs.reference.attention(q, k, v, config, **arguments)
    for each, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(each, other)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_compiled_model_computes_what_the_reference_says(installed: None, inner: str) -> None:
    model, inputs, config = TinyDiT(2), dit_inputs(), parse_spec(SPEC)
    output = compile_sparse(model, policy=SPEC, inner=inner)(*inputs)
    with cs.reference.override(config, grid_thw=GRID) as replaced:
        expected = model(*inputs)
    assert replaced.num_replaced == 2
    assert_close(output, expected)
    assert (output - model(*inputs)).abs().max() > 1e-3
    actual, wanted = (parameter_gradients(model, each) for each in (output, expected))
    for name, gradient in wanted.items():
        error = (actual[name] - gradient).abs().max()
        assert error <= 1e-4 * max(float(g.abs().max()) for g in wanted.values()), name


@pytest.mark.slow
def test_three_resolutions_are_each_right(installed: None) -> None:
    model, config = TinyDiT(1).requires_grad_(False), parse_spec(SPEC)
    compiled = compile_sparse(model, policy=SPEC, inner="aot_eager")
    for grid in ((3, 4, 5), (5, 7, 6), (2, 3, 7), (3, 4, 5)):
        inputs = dit_inputs(grid)
        with cs.reference.override(config, grid_thw=grid):
            expected = model(*inputs)
        assert_close(compiled(*inputs), expected)


def test_the_report_names_it_and_counts_its_density(installed: None) -> None:
    report = cs.explain(TinyDiT(1), *dit_inputs(), policy=SPEC)
    assert report.num_sparse == 1
    assert report.sites[0].mechanism == parse_spec(SPEC).describe()
    assert report.sites[0].density == 4 / 12
    refused = cs.explain(TinyDiT(1), *dit_inputs(), policy="topblocks:tile_thw=4x4")
    assert refused.sites[0].reason == "axes_mismatch"


def test_the_capability_query_answers_for_it(installed: None) -> None:
    facts: dict[str, Any] = {"grid_thw": (8, 12, 10), "heads": 4, "dtype": torch.float32}
    answers = {each.mechanism: each for each in cs.compatible(**facts, head_dim=64)}
    assert list(answers) == ["sage_sla", "sla", "sta", "swba", "topblocks", "vmoba", "vsa"]
    assert answers["topblocks"].ok
    assert answers["topblocks"].density == 0.5


def test_the_environment_may_name_it(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = TinyDiT(1).requires_grad_(False), dit_inputs()
    monkeypatch.setenv(VARIABLE, SPEC)
    with cs.reference.override(parse_spec(SPEC), grid_thw=GRID):
        expected = model(*inputs)
    assert_close(compile_sparse(model)(*inputs), expected)


def test_automatic_mode_never_takes_a_foreign_mechanism(installed: None) -> None:
    assert registry.automatic().name == "sta"


def test_a_broken_package_harms_only_who_names_its_mechanism(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nothing_else_known: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _install(tmp_path, "broken = no_such_module:MECHANISM")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(UnknownMechanismError, match="no_such_module"):
        parse_spec("broken")
    assert known_mechanisms() == BUILT_IN
    assert "no_such_module" in caplog.text
    with pytest.raises(UnknownMechanismError, match=", ".join(BUILT_IN)):
        parse_spec("stta")


def test_a_name_is_given_once(nothing_else_known: None) -> None:
    sta = registry.find("sta")
    assert sta is not None
    assert registry.register(sta) is sta
    config = type("Other", (cs.STA,), {})
    with pytest.raises(ConfigError, match="two mechanisms of one name"):
        registry.register(
            registry.Mechanism(
                config=config,
                capabilities=sta.capabilities,
                evaluate=sta.evaluate,
                lower=sta.lower,
                token_mask=sta.token_mask,
            )
        )


def test_the_blocks_of_the_reference_are_those_of_the_kernels() -> None:
    layout = BlockLayout((5, 7, 3), (2, 3, 2), 4, 9)
    blocks = block_of_token(layout)
    for block, row in enumerate(block_tokens(layout)):
        assert (blocks[row[row >= 0].long()] == block).all()
