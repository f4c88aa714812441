"""Every reason for which a call stays dense, one by one, and what is said about it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import GRID
from modules import LENGTH
from modules import POLICY
from modules import Tiny
from modules import assert_close
from modules import assert_rewritten
from modules import assert_untouched
from modules import expected_output
from modules import raster
from modules import record
from modules import tokens
from modules import video
from torch import Tensor
from torch import nn

import compiled_sparse as cs
from compiled_sparse.errors import StrictRewriteError
from compiled_sparse.metadata import LayoutMetadata
from compiled_sparse.passes import SparseAttentionPass
from compiled_sparse.policy import as_policy
from compiled_sparse.reasons import EXPECTED_DENSE
from compiled_sparse.reasons import REASONS

SELF_ATTENTION = Tiny(lambda m, x: m.attn(raster(x)))


def with_arguments(**arguments: Any) -> Tiny:
    """Return a model whose attention call has further arguments."""
    return Tiny(lambda m, x: m.attn(raster(x), **arguments))


def with_mask(batch: int, *shape: int, dtype: torch.dtype = torch.bool) -> Tiny:
    """Return a model whose attention call has a mask of a shape."""
    return with_arguments(attn_mask=torch.ones(batch, *shape, dtype=dtype))


def test_keys_of_another_length_are_cross_attention() -> None:
    model = Tiny(lambda m, x, t: m.attn(raster(x), t))
    assert_untouched(model, video(), tokens(1, 7), reason="cross_attention")


def test_dropout_is_refused_in_training_and_accepted_in_evaluation() -> None:
    model = Tiny(lambda m, x: m.attn(raster(x), dropout_p=0.5 if m.training else 0.0))
    backend, _ = record(model, video())
    assert backend.outcomes == ["dropout"]
    assert_rewritten(model.eval(), video())


def test_causal_attention_is_refused() -> None:
    assert_untouched(with_arguments(is_causal=True), video(), reason="causal")


@pytest.mark.parametrize(
    "model",
    [
        with_mask(2, 1, 1, LENGTH, dtype=torch.float32),
        with_mask(2, 1, LENGTH, LENGTH),
        with_mask(2, 2, 1, LENGTH),
        with_mask(2, 1, LENGTH, 1),
        with_mask(LENGTH, LENGTH),
    ],
    ids=["float", "dense", "per head", "per query", "2-D"],
)
def test_a_mask_that_is_not_provably_key_padding_is_refused(model: Tiny) -> None:
    assert_untouched(model, video(batch=2), reason="mask_unsupported")


def test_a_key_padding_mask_is_accepted_and_computed() -> None:
    mask = torch.rand(2, 1, 1, LENGTH) > 0.3
    model = Tiny(lambda m, x, mask: m.attn(raster(x), attn_mask=mask))
    assert_rewritten(model, video(batch=2), mask)
    other = torch.rand(2, 1, 1, LENGTH) > 0.6
    inputs = (video(batch=2), other)
    _, actual = record(model, *inputs)
    assert_close(actual, expected_output(model, *inputs))


def test_a_scale_is_handed_on() -> None:
    assert_rewritten(with_arguments(scale=0.7), video())


def test_fewer_key_heads_are_accepted() -> None:
    def body(m: Tiny, x: Tensor) -> Tensor:
        q = raster(x).unflatten(2, (4, 4)).transpose(1, 2)
        k = m.attn.to_k(raster(x)).unflatten(2, (4, 4)).transpose(1, 2)[:, :2]
        return F.scaled_dot_product_attention(q, k, k * 2, enable_gqa=True)

    assert_rewritten(Tiny(body), video())


def test_a_graph_without_a_patch_embedding_has_no_layout() -> None:
    attn = SELF_ATTENTION.attn
    backend = assert_untouched(attn, tokens(), reason="layout_unknown")
    assert "pass cs.metadata(grid_thw=(T, H, W))" in backend.decisions[0].detail


def test_metadata_of_another_length_is_named() -> None:
    attn = SELF_ATTENTION.attn
    backend = assert_untouched(attn, tokens(), reason="layout_unknown", grid_thw=(3, 4, 6))
    assert "describes 72 tokens, this call has 60" in backend.decisions[0].detail


def _attend_directly(
    shape: tuple[int, ...], edit: Callable[..., Any] = lambda q: (q, q, q)
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    return (lambda q: F.scaled_dot_product_attention(*edit(q * 1))), torch.randn(shape)


DIRECT: dict[str, tuple[str, tuple[Callable[[Tensor], Tensor], Tensor]]] = {
    "large heads": ("head_dim_unsupported", _attend_directly((1, 1, LENGTH, 513))),
    "narrow values": (
        "head_dim_unsupported",
        _attend_directly((1, 1, LENGTH, 8), lambda q: (q, q, q[..., :4])),
    ),
    "three dimensions": ("rank_unsupported", _attend_directly((2, LENGTH, 8))),
    "five dimensions": ("rank_unsupported", _attend_directly((1, 1, 2, LENGTH, 8))),
    "keys shared by the batch": (
        "broadcast_unsupported",
        _attend_directly((2, 1, LENGTH, 8), lambda q: (q, *[q.mean(0, keepdim=True)] * 2)),
    ),
    "values shared by the heads": (
        "broadcast_unsupported",
        _attend_directly((1, 2, LENGTH, 8), lambda q: (q, q, q[:, :1])),
    ),
}


@pytest.mark.parametrize(("reason", "case"), DIRECT.values(), ids=DIRECT)
def test_tensors_the_op_does_not_take_are_refused(
    reason: str, case: tuple[Callable[[Tensor], Tensor], Tensor]
) -> None:
    model, q = case
    assert_untouched(model, q, reason=reason, grid_thw=GRID)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_call_inside_vmap_is_refused() -> None:
    attn = SELF_ATTENTION.attn

    def model(x: Tensor) -> Tensor:
        return torch.vmap(lambda row: attn(row[None])[0])(x)

    assert_untouched(model, tokens(2), reason="rank_unsupported", grid_thw=GRID)


def test_a_dtype_without_a_kernel_is_refused() -> None:
    model, q = _attend_directly((1, 1, LENGTH, 8))
    torch._dynamo.reset()
    decisions = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        for node in graph.graph.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, Tensor):
                with value.fake_mode:
                    node.meta["example_value"] = value.to(torch.float8_e4m3fn)
        layout = LayoutMetadata(GRID)
        decisions.extend(SparseAttentionPass(as_policy(POLICY), layout, rewrite=False)(graph))
        return graph.forward

    torch.compile(model, backend=backend)(q)
    assert [d.reason for d in decisions] == ["dtype_unsupported"]
    assert decisions[0].detail == "torch.float8_e4m3fn"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_with_a_kernel_is_accepted(dtype: torch.dtype) -> None:
    model, q = _attend_directly((1, 2, LENGTH, 8))
    q = q.to(dtype)
    backend, actual = record(model, q, grid_thw=GRID)
    assert backend.outcomes == ["sparse"]
    expected = cs.reference.attention(q, q, q, POLICY, grid_thw=GRID)
    assert_close(actual, expected, 2 * torch.finfo(dtype).eps)


def test_windows_for_another_number_of_axes_are_refused() -> None:
    policy = cs.STA(window_thw=(3, 3), tile_thw=(2, 2))
    assert_untouched(SELF_ATTENTION, video(), reason="axes_mismatch", policy=policy)


def test_windows_for_another_number_of_heads_are_refused() -> None:
    policy = cs.STA(window_thw=((1, 1, 1),) * 3, tile_thw=(2, 3, 2))
    assert_untouched(SELF_ATTENTION, video(), reason="heads_mismatch", policy=policy)


@pytest.mark.parametrize("policy", ["dense", {"at*": "dense", "*": POLICY}])
def test_the_policy_can_leave_a_module_dense(policy: Any) -> None:
    assert_untouched(SELF_ATTENTION, video(), reason="policy_dense", policy=policy)


@pytest.mark.parametrize("policy", [{"other": POLICY}, {"joint:*": POLICY}])
def test_a_module_without_a_rule_stays_dense(policy: Any) -> None:
    assert_untouched(SELF_ATTENTION, video(), reason="no_rule", policy=policy)


def test_a_policy_can_name_a_module() -> None:
    assert_rewritten(SELF_ATTENTION, video(), policy={"attn": POLICY})


def test_automatic_mode_leaves_short_sequences_dense() -> None:
    assert_untouched(SELF_ATTENTION, video(), reason="too_short", policy="auto")


def test_automatic_mode_leaves_a_call_without_gain_dense() -> None:
    model = SELF_ATTENTION.requires_grad_(False)
    assert_untouched(model, video(grid=(9, 16, 16)), reason="no_gain", policy="auto")


def test_automatic_mode_picks_a_window_where_it_gains() -> None:
    (decision,) = cs.explain(SELF_ATTENTION, video(grid=(21, 30, 52))).sites
    assert decision.is_sparse
    assert decision.predicted_gain > 1.3
    assert decision.grid_thw == (21, 30, 52)


def test_multi_head_attention_forward_is_reported_and_left_alone() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tiny = Tiny(lambda m, x: raster(x))
            self.mha = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.tiny(x)
            return self.mha(tokens, tokens, tokens, need_weights=False)[0]

    backend = assert_untouched(Model(), video(), reason="other_attention")
    assert backend.decisions[0].path == "mha"
    assert backend.decisions[0].detail == "multi_head_attention_forward"


def test_flex_attention_is_reported_and_left_alone() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    def body(m: Tiny, x: Tensor) -> Tensor:
        q = raster(x).unflatten(2, (1, 16)).transpose(1, 2)
        return flex_attention(q, q, q)

    model = Tiny(body).requires_grad_(False)
    backend, _ = record(model, video())
    assert backend.outcomes == ["other_attention"]
    assert backend.decisions[0].detail == "flex_attention"


def test_every_reason_the_package_gives_is_documented_and_none_is_expected_without() -> None:
    assert set(REASONS) >= EXPECTED_DENSE
    assert all(text.endswith(".") for text in REASONS.values())


# What is said about refusals.


def _compile(model: Any, *inputs: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    options = {"policy": POLICY, "inner": "eager", **options}
    return torch.compile(model, backend="compiled_sparse", options=options)(*inputs)


def test_a_missed_call_is_warned_about_with_place_reason_and_next_step(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "compiled_sparse"):
        _compile(with_arguments(is_causal=True), video())
    (warning,) = [r.message for r in caplog.records if r.name == "compiled_sparse"]
    assert warning == (
        "1 attention calls stay dense although the policy names a mechanism; first attn: causal. "
        "Causal attention. The mechanism is not causal token by token."
    )


@pytest.mark.parametrize("policy", [POLICY, None])
def test_cross_attention_and_text_are_not_warned_about(
    caplog: pytest.LogCaptureFixture, policy: Any
) -> None:
    def body(m: Tiny, x: Tensor, text: Tensor) -> Tensor:
        return m.attn(m.attn(raster(x)), m.attn(text))

    with caplog.at_level(logging.WARNING, "compiled_sparse"):
        _compile(Tiny(body), video(), tokens(1, 7), policy=policy)
    assert not [r for r in caplog.records if r.name == "compiled_sparse"]


def test_automatic_mode_says_one_line_and_warns_about_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "compiled_sparse"):
        _compile(with_arguments(is_causal=True), video(), policy=None, strict=True)
    (record_,) = [r for r in caplog.records if r.name == "compiled_sparse"]
    assert record_.levelno == logging.INFO
    assert record_.message == "0 of 1 attention calls sparse, 1 causal"


def test_strict_raises_where_a_named_mechanism_cannot_be_used() -> None:
    with pytest.raises(Exception, match="stay dense") as caught:
        _compile(with_arguments(is_causal=True), video(), strict=True)
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, StrictRewriteError):
        error = error.__cause__ or getattr(error, "inner_exception", None)
    assert isinstance(error, StrictRewriteError)
    assert error.got == "attn: causal"
    assert error.next_step == REASONS["causal"]


def test_strict_accepts_cross_attention_beside_sparse_calls() -> None:
    model = Tiny(lambda m, x, t: m.attn(m.attn(raster(x)), t))
    inputs = (video(), tokens(1, 7))
    actual = _compile(model, *inputs, strict=True)
    assert_close(actual, expected_output(model, *inputs))
