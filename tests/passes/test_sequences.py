"""Sliding-window block attention in compiled models: the sequence is its grid."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from typing import ClassVar

import expecttest
import pytest
import torch
from modules import GRID
from modules import LENGTH
from modules import Attention
from modules import Tiny
from modules import TinyDiT
from modules import assert_close
from modules import assert_gradients_close
from modules import assert_untouched
from modules import compile_sparse
from modules import dit_inputs
from modules import expected_output
from modules import op_lines
from modules import parameter_gradients
from modules import raster
from modules import record
from modules import tokens
from modules import video
from torch import Tensor
from torch import nn

import compiled_sparse as cs
from compiled_sparse import registry
from compiled_sparse.config import MechanismConfig
from compiled_sparse.environment import VARIABLE
from compiled_sparse.mechanisms.block_selector import block_selector_mechanism
from compiled_sparse.pattern import swba_density
from compiled_sparse.reference.attention import token_mask

pytestmark = pytest.mark.usefixtures("fresh_compiler")

SWBA = cs.SWBA(block=7, window=2)
SPEC = "swba:block=7,window=2"


def expected(model: nn.Module, *inputs: Tensor, length: int = LENGTH) -> Tensor:
    """What the model computes when its self-attention of that length is the reference."""
    return expected_output(model, *inputs, grid_thw=(length,), config=SWBA)


def assert_sequences(
    model: nn.Module,
    *inputs: Tensor,
    length: int = LENGTH,
    calls: int = 1,
    origin: str = "graph",
    grid_thw: tuple[int, ...] | None = None,
    dynamic: bool = False,
) -> None:
    """Check that all calls become SWBA over their sequence and compute what the reference says."""
    backend, actual = record(model, *inputs, policy=SPEC, grid_thw=grid_thw, dynamic=dynamic)
    assert backend.outcomes == ["sparse"] * calls, [str(d) for d in backend.decisions]
    for decision in backend.decisions:
        assert decision.grid_thw == (length,)
        assert (decision.text_before, decision.text_after) == (0, 0)
        assert (decision.mechanism, decision.layout_origin) == (SPEC, origin)
    assert_close(actual, expected(model, *inputs, length=length))
    assert (actual - model(*inputs)).abs().max() > 1e-4 * actual.abs().max()


@pytest.mark.parametrize(
    ("inner", "dynamic", "checkpoint"),
    [
        *(("aot_eager", dynamic, each) for dynamic in (False, True) for each in (False, True)),
        pytest.param("inductor", True, False, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_has_the_output_and_gradients_of_the_reference(
    inner: str, dynamic: bool, checkpoint: bool
) -> None:
    model = TinyDiT(1, checkpoint=checkpoint)
    plain = TinyDiT(1)  # a checkpoint would leave the override before it computes again
    plain.load_state_dict(model.state_dict())
    compiled = compile_sparse(model, policy=SWBA, inner=inner, dynamic=dynamic)
    for grid in (GRID, (2, 6, 7)):
        inputs = dit_inputs(grid)
        wanted = expected(plain, *inputs, length=torch.Size(grid).numel())
        output = compiled(*inputs)
        assert_close(output, wanted)
        gradients = parameter_gradients(model, output), parameter_gradients(plain, wanted)
        assert_gradients_close(*gradients)


def test_the_rewritten_graph_names_length_block_and_window() -> None:
    lines = []
    for dynamic in (False, True):
        backend, _ = record(TinyDiT(1), *dit_inputs(), policy=SPEC, dynamic=dynamic)
        lines += map(op_lines, backend.after)
    expecttest.assert_expected_inline(
        "\n".join(lines),
        """\
swba_default = torch.ops.compiled_sparse.swba.default(transpose_1, transpose_2, transpose_3,
    None, 60, 7, 2, None)
out_1 = torch._C._nn.scaled_dot_product_attention(transpose_5, transpose_6, transpose_7)
sym_size_int = torch.ops.aten.sym_size.int(transpose_1, 2)
swba_default = torch.ops.compiled_sparse.swba.default(transpose_1, transpose_2, transpose_3,
    None, sym_size_int, 7, 2, None)
out_1 = torch._C._nn.scaled_dot_product_attention(transpose_5, transpose_6, transpose_7)""",
    )


def test_the_report_shows_the_sequence_and_its_counted_density() -> None:
    report = cs.explain(TinyDiT(1), *dit_inputs(), policy=SPEC)
    site, cross = report.sites
    mask = token_mask(SWBA, slice(None), LENGTH, LENGTH, None, cs.Text())
    assert site.density == pytest.approx(mask.double().mean().item())
    assert site.predicted_gain == pytest.approx(0.8 / site.density)
    assert (site.grid_thw, site.mechanism) == ((LENGTH,), SPEC)
    assert cross.reason == "cross_attention"
    assert SPEC in str(report)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_text_in_the_sequence_is_made_of_ordinary_tokens(dynamic: bool) -> None:
    def body(m: Tiny, x: Tensor, before: Tensor, after: Tensor) -> Tensor:
        return m.attn(torch.cat([before, raster(x), after], 1))

    inputs = (video(), tokens(1, 6), tokens(1, 9))
    assert_sequences(Tiny(body), *inputs, length=75, dynamic=dynamic)
    backend, _ = record(Tiny(body), *inputs, policy={"joint:*": SPEC, "*": "dense"})
    assert backend.outcomes == ["sparse"]
    assert backend.decisions[0].kind == "joint"


def test_key_padding_reaches_the_op() -> None:
    def body(m: Tiny, x: Tensor, mask: Tensor) -> Tensor:
        return m.attn(raster(x), attn_mask=mask)

    mask = torch.arange(LENGTH)[None, None, None] < 51
    assert_sequences(Tiny(body), video(), mask)


Arrange = Callable[[Tensor], Tensor]
ARRANGEMENTS: dict[str, Arrange] = {
    "columns first": lambda x: x.transpose(3, 4).flatten(2).transpose(1, 2),
    "space first": lambda x: x.permute(0, 3, 4, 2, 1).flatten(1, 3),
    "tiles": lambda x: (
        x.unflatten(3, (2, 2)).permute(0, 3, 2, 4, 5, 1).flatten(1, 4)  # [B, h, T, 2, W, C]
    ),
}


@pytest.mark.parametrize("arrange", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_a_whole_video_in_any_order_is_a_sequence(arrange: Arrange) -> None:
    model = Tiny(lambda m, x: m.attn(arrange(x))).requires_grad_(False)
    assert_untouched(model, video(), reason="layout_unknown")
    assert_sequences(model, video())


def test_two_videos_in_one_sequence_are_one_sequence() -> None:
    def body(m: Tiny, x: Tensor, other: Tensor) -> Tensor:
        return m.attn(torch.cat([raster(x), raster(m.patch(other))], 1))

    inputs = (video(), video(grid=(2, 3, 4)))
    assert_untouched(Tiny(body), *inputs, reason="several_grids")
    assert_sequences(Tiny(body), *inputs, length=84)


PARTS: dict[str, tuple[Arrange, str]] = {
    "spatial": (lambda x: x.permute(0, 2, 3, 4, 1).flatten(0, 1).flatten(1, 2), "partial_grid"),
    "temporal": (lambda x: x.permute(0, 3, 4, 2, 1).flatten(0, 2), "partial_grid"),
    "windows": (
        lambda x: x.unflatten(3, (2, 2)).permute(0, 3, 2, 4, 5, 1).flatten(0, 1).flatten(1, 3),
        "layout_unknown",
    ),
    "first frame": (lambda x: raster(x[:, :, :1]), "partial_grid"),
    "half of the tokens": (lambda x: raster(x)[:, :30], "layout_unknown"),
    "batch folded in": (lambda x: raster(x).reshape(1, -1, 16), "layout_unknown"),
}


@pytest.mark.parametrize(("arrange", "reason"), PARTS.values(), ids=PARTS)
def test_a_part_of_the_video_is_left_alone(arrange: Arrange, reason: str) -> None:
    model = Tiny(lambda m, x: m.attn(arrange(x))).requires_grad_(False)
    assert_untouched(model, video(batch=2), reason=reason, policy=SPEC)


def test_text_among_itself_and_cross_attention_are_left_alone() -> None:
    def body(m: Tiny, x: Tensor, text: Tensor) -> Tensor:
        return m.attn(text).sum() + m.attn(raster(x), text).sum()

    backend, _ = record(Tiny(body), video(), tokens(), policy=SPEC)
    assert backend.outcomes == ["not_video", "cross_attention"]


def test_keys_in_another_order_than_the_queries_are_left_alone() -> None:
    model = Tiny(lambda m, x: m.attn(raster(x), raster(x.transpose(3, 4)))).requires_grad_(False)
    assert_untouched(model, video(), reason="layout_unknown", policy=SPEC)


def test_a_causal_call_is_left_alone() -> None:
    model = Tiny(lambda m, x: m.attn(raster(x), is_causal=True))
    assert_untouched(model, video(), reason="causal", policy=SPEC)


def test_what_no_graph_shows_takes_the_callers_word() -> None:
    model, x = Attention().requires_grad_(False), tokens()
    assert_untouched(model, x, reason="layout_unknown", policy=SPEC)
    for grid in ((LENGTH,), GRID):
        assert_sequences(model, x, grid_thw=grid, origin="metadata")


@pytest.mark.parametrize("force", [False, True], ids=["own", "forced"])
def test_a_module_with_its_own_policy_needs_no_grid(force: bool) -> None:
    model = Attention().requires_grad_(False)
    dense_model = copy.deepcopy(model)
    cs.sparse("dense" if force else SPEC)(model)
    compiled = compile_sparse(model, policy="dense", dynamic=True)
    for length in (LENGTH, 33):
        x = tokens(1, length)
        with cs.force(SPEC) if force else nullcontext():
            out = compiled(x)
        assert_close(out, expected(dense_model, x, length=length))
    assert_untouched(dense_model, tokens(), reason="layout_unknown", policy=SPEC)


def test_blocks_of_an_attached_model_need_no_grid_when_compiled_one_by_one() -> None:
    model, inputs = TinyDiT(3).requires_grad_(False), dit_inputs()
    wanted = expected(model, *inputs)
    x, text, step = torch.randn(1, 33, 16), inputs[1], torch.rand(1, 16)
    block_inputs = (x, text, step, torch.rand(33, 8))
    block_wanted = expected(model.blocks[0], *block_inputs, length=33)
    cs.attach(model, SPEC)
    for block in model.blocks:
        block.compile(backend="compiled_sparse", fullgraph=True, options={"inner": "eager"})
    assert_close(model(*inputs), wanted)
    assert_close(model.blocks[0](*block_inputs), block_wanted)


def test_a_part_of_an_attached_modules_tokens_is_left_alone() -> None:
    class Windowed(Attention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            windows = x.unflatten(1, (4, -1)).flatten(0, 1)
            return super().forward(windows).unflatten(0, (-1, 4)).flatten(1, 2)

    model = cs.sparse(SPEC)(Windowed().requires_grad_(False))
    report = cs.explain(model, tokens())
    assert [site.reason for site in report.sites] == ["layout_unknown"]


def test_force_and_the_environment_may_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = TinyDiT(1).requires_grad_(False), dit_inputs()
    wanted, dense = expected(model, *inputs), model(*inputs)
    compiled = compile_sparse(model, policy="dense")
    assert_close(compiled(*inputs), dense)
    with cs.force(SWBA):
        assert_close(compiled(*inputs), wanted)
    monkeypatch.setenv(VARIABLE, SPEC)
    assert_close(compiled(*inputs), wanted)


def test_policies_with_a_schedule_hold_for_it() -> None:
    model, inputs = TinyDiT(2).requires_grad_(False), dit_inputs()
    policy = cs.Policy({"*": SPEC}, dense_first_steps=1, dense_last_layers=1)
    compiled = compile_sparse(model, policy=cs.Policy.from_json(policy.to_json()))
    for step in (0, 1):
        with cs.metadata(step=step, num_steps=4):
            report = cs.explain(model, *inputs, policy=policy)
            compiled(*inputs)
        reasons = [site.reason for site in report.sites if site.kind != "cross"]
        assert reasons == (["step_dense", "layer_dense"] if step == 0 else ["", "layer_dense"])


def test_automatic_mode_never_takes_it() -> None:
    assert registry.automatic().name == "sta"
    mechanism = registry.find("swba")
    assert mechanism is not None
    assert mechanism.automatic is None


def test_the_capability_query_counts_text_as_tokens() -> None:
    answers = cs.compatible(
        grid_thw=GRID, text=cs.Text(4, 9), heads=2, head_dim=8, dtype=torch.float16
    )
    answer = next(each for each in answers if each.mechanism == "swba")
    assert answer.ok
    assert answer.config == cs.SWBA()
    assert answer.density == swba_density(73, 256, 4) == 1.0


def test_a_mechanism_of_another_package_may_ask_for_the_sequence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Diagonal(MechanismConfig):
        name: ClassVar[str] = "diagonal"
        grid_is_sequence: ClassVar[bool] = True

        def resolve_tile(self, grid: tuple[int, ...]) -> tuple[int, ...]:
            return (7,)

    def select(*arguments: Any) -> tuple[Tensor, Tensor]:
        blocks = torch.arange(arguments[2].num_blocks, dtype=torch.int32)
        return blocks[None, None, :, None], torch.ones_like(blocks)[None, None]

    monkeypatch.setattr(registry, "_mechanisms", dict(registry._mechanisms))
    registry.register(
        block_selector_mechanism("diagonal", Diagonal, select, density=lambda *_: 0.125)
    )
    same = cs.SWBA(block=7, window=1)
    q, k, v = torch.randn(3, 1, 2, LENGTH, 8)
    for module in (cs, cs.reference):
        out = module.attention(q, k, v, Diagonal(), grid_thw=GRID)
        torch.testing.assert_close(out, cs.attention(q, k, v, same))
    model = Tiny(lambda m, x: m.attn(ARRANGEMENTS["tiles"](x)))
    x = video()
    backend, actual = record(model, x, policy="diagonal")
    assert backend.outcomes == ["sparse"]
    assert_close(actual, expected_output(model, x, grid_thw=(LENGTH,), config=same))
