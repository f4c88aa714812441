"""Learned gates in graphs: computed from what feeds queries, keys and values, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attached import LowRank
from attached import Model
from attached import OneStream
from attached import TwoStreams
from gated import CONFIG
from gated import GATE
from gated import gated
from gated import open_gates
from modules import GRID
from modules import LENGTH
from modules import Attention
from modules import RecordingBackend
from modules import assert_close
from modules import assert_gradients_close
from modules import parameter_gradients
from modules import record
from modules import tokens
from torch import Tensor
from torch import nn
from torch.utils.checkpoint import checkpoint

import compiled_sparse as cs

pytestmark = pytest.mark.usefixtures("fresh_compiler")

VSA_OP = torch.ops.compiled_sparse.vsa.default
NO_TEXT = cs.Text()


class Fused(nn.Module):
    """Queries, keys and values by one projection of a norm that is part of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        heads = (
            each.unflatten(2, (2, 8)).transpose(1, 2)
            for each in self.qkv(self.norm(x)).chunk(3, -1)
        )
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def attached(attn: nn.Module, **options: Any) -> tuple[Model, Any]:
    """Return a model whose gate is not zero."""
    model = Model(attn, **options)
    handle = cs.attach(model, CONFIG, modules="attn")
    assert handle.gates == (f"attn.{GATE}",)
    open_gates(model, handle.gates)
    return model, handle


def assert_gated(module: Model, handle: Any, text: cs.Text, *inputs: Tensor) -> None:
    """Check output and all gradients against the reference."""
    backend, actual = record(module, *inputs, policy="dense", grid_thw=GRID)
    assert backend.outcomes == ["sparse"], [str(each) for each in backend.decisions]
    with gated(module, handle, text):
        expected = module.attn(*inputs)
    assert_close(actual, expected)
    gradients = parameter_gradients(module, expected)
    assert_gradients_close(parameter_gradients(module, actual), gradients)
    largest = max(float(each.abs().max()) for each in gradients.values())
    assert all(
        float(each.abs().max()) > 1e-4 * largest for name, each in gradients.items() if GATE in name
    )


@pytest.mark.parametrize("kind", [Attention, Fused])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_gate_weighs_what_queries_keys_and_values_are_projected_from(
    kind: type[nn.Module], batch: int
) -> None:
    assert_gated(*attached(kind()), NO_TEXT, tokens(batch))


@pytest.mark.parametrize("kind", [TwoStreams, OneStream])
def test_text_in_the_sequence_has_no_part_in_the_gate(kind: type[nn.Module]) -> None:
    model, handle = attached(kind())
    text = cs.Text(before=7) if kind is TwoStreams else cs.Text(after=7)
    with cs.metadata(grid_thw=GRID, text=text):
        assert_gated(model, handle, text, tokens(), tokens(length=7))


def test_adapters_of_projections_and_gate_count() -> None:
    module = Attention()
    for name in ("to_q", "to_k", "to_v"):
        setattr(module, name, LowRank(getattr(module, name)))
    model, handle = attached(module)
    setattr(module, GATE, LowRank(getattr(module, GATE)))
    assert_gated(model, handle, NO_TEXT, tokens())


def test_a_gate_inside_activation_checkpointing_is_recomputed() -> None:
    model, handle = attached(Attention(), is_checkpointed=True)
    assert_gated(model, handle, NO_TEXT, tokens().requires_grad_())


def test_the_gate_of_the_module_is_used_where_the_policy_names_none() -> None:
    model, handle = attached(Attention())
    plain = cs.VSA(sparsity=CONFIG.sparsity, tile_thw=CONFIG.tile_thw)
    again = cs.attach(model, plain, modules="attn")
    assert again.gates == handle.gates
    assert_gated(model, handle, NO_TEXT, tokens())


def outcome(module: nn.Module, *inputs: Tensor, policy: Any = "dense") -> RecordingBackend:
    """Compile a module on the test's grid; a call that stays dense computes dense attention."""
    backend, actual = record(module, *inputs, policy=policy, grid_thw=GRID)
    assert backend.count(backend.after, VSA_OP) == 0
    assert_close(actual, module(*inputs))
    return backend


def test_a_gate_that_no_module_has_is_not_dropped_silently() -> None:
    backend = outcome(Attention(), tokens(), policy=CONFIG)
    assert backend.outcomes == ["gate_missing"]
    assert backend.decisions[0].detail == f"gate {GATE!r}"


def test_a_gate_of_another_name_is_not_taken_for_the_one_named() -> None:
    model, _ = attached(Attention())
    with cs.force(cs.VSA(tile_thw=(2, 3, 2), gate="other")), cs.metadata(grid_thw=GRID):
        report = cs.explain(model, tokens())
    assert [site.reason for site in report.sites] == ["gate_missing"]
    assert "the module has 'to_gate_compress'" in report.sites[0].detail


def test_an_ungated_policy_is_refused_where_there_is_a_gate() -> None:
    model, _ = attached(Attention())
    cs.attach(model, cs.VSA(tile_thw=(2, 3, 2), gate="ungated"), modules="attn")
    assert outcome(model, tokens()).outcomes == ["gate_unused"]


class OtherValues(Attention):
    """Values are projected from another hidden state of the same tokens."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Attend."""
        q, k, v = (to(y).unflatten(2, (2, -1)).transpose(1, 2) for to, y in self._pairs(x))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def _pairs(self, x: Tensor) -> list[tuple[nn.Module, Tensor]]:
        return [(self.to_q, x), (self.to_k, x), (self.to_v, x.sin())]


class WrittenLater(Attention):
    """The hidden state is written to between the projections and the gate's place."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Attend."""
        hidden = x * 2
        q, k, v = (
            to(hidden).unflatten(2, (2, -1)).transpose(1, 2)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        hidden.mul_(3)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) + hidden


class Moved(Attention):
    """Tokens change places between the projections and the attention call."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Attend."""
        q, k, v = (
            to(x).roll(1, dims=1).unflatten(2, (2, -1)).transpose(1, 2)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class OtherMembers(Attention):
    """Queries, keys and values of the batch's members the other way round."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Attend."""
        q, k, v = (
            to(x)[[1, 0]].unflatten(2, (2, -1)).transpose(1, 2)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class OneMember(Attention):
    """Queries, keys and values of one of the batch's members."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Attend."""
        q, k, v = (
            to(x)[1:].unflatten(2, (2, -1)).transpose(1, 2)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ByConvolution(Attention):
    """The projections are no linear layers; before the module there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv1d(16, 16, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Attend."""
        q, k, v = (
            each(x.transpose(1, 2)).unflatten(1, (2, -1)).transpose(2, 3)
            for each in self.convolutions
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ByKeyword(Attention):
    """The projections are functions called by keywords; queries are projected twice."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Attend."""
        q, k, v = (
            F.linear(input=layer(x), weight=self.to_out.weight)
            .unflatten(2, (2, -1))
            .transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ByMatrixProduct(Attention):
    """The second of two projections multiplies and adds up by itself."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Attend."""
        q, k, v = (
            (layer(x)[..., None, :] * self.to_out.weight)
            .sum(-1)
            .unflatten(2, (2, -1))
            .transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class OnTheGrid(Attention):
    """Video is projected on its grid, and a condition of as many tokens is added."""

    def __init__(self) -> None:
        super().__init__()
        self.of_condition = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Attend."""
        condition = self.of_condition(x.cos())
        q, k, v = (
            (layer(x.unflatten(1, GRID)).flatten(1, 3) + condition)
            .unflatten(2, (2, -1))
            .transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class WrittenQueries(Attention):
    """The memory of the queries is filled with what other tokens are projected to."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Attend."""
        q, k, v = (
            to(x).unflatten(2, (2, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v)
        )
        filled = torch.empty_like(q)
        filled[..., :4] = (
            self.to_q(torch.einsum("blc,cd->bld", x, self.to_k.weight))
            .unflatten(2, (2, -1))
            .transpose(1, 2)[..., :4]
        )
        filled[..., 4:] = q[..., 4:]
        return F.scaled_dot_product_attention(filled, k, v).transpose(1, 2).flatten(2)


class Unprojected(nn.Module):
    """Queries, keys and values by elementwise weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 16))
        self.to_gate_compress = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        q, k, v = ((x * w).unflatten(2, (2, -1)).transpose(1, 2) for w in self.weights)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("kind", "batch"),
    [
        (OtherValues, 1),
        (WrittenLater, 1),
        (Moved, 1),
        (OtherMembers, 2),
        (OneMember, 2),
        (Unprojected, 1),
    ],
)
def test_a_gate_whose_hidden_state_is_not_proven_keeps_the_call_dense(
    kind: type[nn.Module], batch: int
) -> None:
    model, _ = attached(kind())
    with cs.metadata(grid_thw=GRID, text=NO_TEXT):
        backend = outcome(model, tokens(batch))
    (reason,) = backend.outcomes
    assert reason == "gate_unplaced" or (
        kind in (Moved, OtherMembers) and reason == "layout_unknown"
    )


@pytest.mark.parametrize(
    "kind",
    [
        ByConvolution,
        ByKeyword,
        ByMatrixProduct,
        OnTheGrid,
        OtherValues,
        Unprojected,
        WrittenQueries,
    ],
)
def test_projections_elsewhere_are_not_taken_for_those_of_the_call(kind: type[nn.Module]) -> None:
    model, _ = attached(kind(), first=nn.Linear(16, 16))
    with cs.metadata(grid_thw=GRID, text=NO_TEXT):
        (reason,) = outcome(model, tokens()).outcomes
    assert reason in ("gate_unplaced", "layout_unknown")


@pytest.mark.parametrize("width", [8, 32])
def test_a_gate_of_another_width_than_the_heads_is_refused(width: int) -> None:
    module = Attention()
    module.to_gate_compress = nn.Linear(16, width)
    backend = outcome(attached(module)[0], tokens())
    assert backend.outcomes == ["gate_unplaced"]
    assert "2 heads of 8" in backend.decisions[0].detail


def test_a_module_whose_arguments_do_not_fit_the_gate_is_refused() -> None:
    class Folded(Attention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x.flatten(1, 3))

    backend = outcome(attached(Folded())[0], torch.randn(1, *GRID, 16))
    assert backend.outcomes == ["gate_unplaced"]
    assert "no argument" in backend.decisions[0].detail


class Casting(Attention):
    """A module of low precision that is handed full precision, and other tensors."""

    def forward(self, ids: Tensor, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """Attend."""
        return super().forward(x.to(self.to_q.weight.dtype))


def test_arguments_of_other_dtypes_are_passed_over_or_cast() -> None:
    model, handle = attached(Casting().to(torch.bfloat16))
    ids = torch.zeros(1, LENGTH, 16, dtype=torch.int64)
    inputs = ids, tokens(), torch.ones(1, 5, 16, dtype=torch.bool)
    backend, actual = record(model, *inputs, policy="dense", grid_thw=GRID)
    assert backend.outcomes == ["sparse"], [str(each) for each in backend.decisions]
    with gated(model, handle, NO_TEXT):
        assert_close(actual, model(*inputs), relative=2e-2)


def test_each_call_of_a_checkpointed_module_has_the_gate_of_its_own_tokens() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = checkpoint(self.attn, x, use_reentrant=False)
            return x

    model = Twice()
    handle = cs.attach(model, CONFIG, modules="attn")
    open_gates(model, handle.gates)
    x = tokens().requires_grad_()
    backend, actual = record(model, x, policy="dense", grid_thw=GRID)
    assert backend.outcomes == ["sparse"] * 2
    with gated(model, handle, NO_TEXT, NO_TEXT):
        assert_close(actual, model.attn(model.attn(x)))


def test_gates_work_with_dynamic_lengths_of_text() -> None:
    model, handle = attached(OneStream())
    backend = RecordingBackend("dense")
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for length in (7, 12, 5):
        inputs = tokens(), tokens(length=length)
        with cs.metadata(grid_thw=GRID, text=cs.Text(after=length)):
            actual = compiled(*inputs)
        with gated(model, handle, cs.Text(after=length)):
            expected = model(*inputs)
        assert_close(actual, expected)


def test_a_gate_that_works_in_place_leaves_the_hidden_state_alone() -> None:
    attn, first = Attention(), nn.ReLU(inplace=True)
    setattr(attn, GATE, nn.Sequential(first, nn.Linear(16, 16)))
    model = Model(attn)
    handle = cs.attach(model, CONFIG, modules="attn")
    x = tokens()
    backend, actual = record(model, x.clone(), policy="dense", grid_thw=GRID)
    assert backend.outcomes == ["sparse"]
    first.inplace = False
    with gated(model, handle, NO_TEXT):
        assert_close(actual, model.attn(x))
