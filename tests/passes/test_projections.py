"""Learned projections in graphs: handed to the op of their module's call, or said to be missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from attached import LowRank
from attached import Model
from attached import OneStream
from attached import TwoStreams
from gated import CONFIG as GATED
from gated import GATE
from gated import open_gates
from modules import GRID
from modules import Attention
from modules import RecordingBackend
from modules import TinyDiT
from modules import assert_close
from modules import assert_gradients_close
from modules import dit_inputs
from modules import parameter_gradients
from modules import record
from modules import tokens
from projected import BOXES
from projected import CONFIG
from projected import PROJ
from projected import open_projections
from projected import projected
from torch import Tensor
from torch import nn

import compiled_sparse as cs
from compiled_sparse.attach import Handle
from compiled_sparse.config import MechanismConfig

pytestmark = pytest.mark.usefixtures("fresh_compiler")

SLA_OP = torch.ops.compiled_sparse.sla.default
CONFIGS = pytest.mark.parametrize("config", [CONFIG, BOXES], ids=["runs", "boxes"])


def attached(
    attn: nn.Module, config: MechanismConfig = CONFIG, **options: Any
) -> tuple[Model, Handle]:
    """Return a model whose projection is not zero."""
    model = Model(attn, **options)
    handle = cs.attach(model, config, modules="attn")
    assert handle.projections == (f"attn.{PROJ}",)
    open_projections(model, handle.projections)
    return model, handle


def assert_projected(
    model: Model,
    handle: Handle,
    *inputs: Tensor,
    config: cs.SLA = CONFIG,
    text: cs.Text | None = None,
) -> RecordingBackend:
    """Check output and all gradients against the reference."""
    backend, actual = record(model, *inputs, policy="dense", grid_thw=GRID)
    assert backend.outcomes == ["sparse"], [str(each) for each in backend.decisions]
    with projected(model, handle, config, text=text):
        expected = model.attn(*inputs)
    assert_close(actual, expected)
    gradients = parameter_gradients(model, expected)
    assert_gradients_close(parameter_gradients(model, actual), gradients)
    largest = max(float(each.abs().max()) for each in gradients.values())
    found = [float(each.abs().max()) for name, each in gradients.items() if PROJ in name]
    assert found
    assert all(each > 1e-4 * largest for each in found)
    return backend


@CONFIGS
@pytest.mark.parametrize("batch", [1, 2])
def test_the_projection_is_behind_the_linear_branch(batch: int, config: cs.SLA) -> None:
    model, handle = attached(Attention(), config)
    backend = assert_projected(model, handle, tokens(batch), config=config)
    assert "no projection" not in backend.decisions[0].detail
    assert backend.count(backend.after, SLA_OP) == 1


@CONFIGS
@pytest.mark.parametrize("kind", [TwoStreams, OneStream])
def test_text_in_the_sequence_has_its_part(kind: type[nn.Module], config: cs.SLA) -> None:
    model, handle = attached(kind(), config)
    text = cs.Text(before=7) if kind is TwoStreams else cs.Text(after=7)
    with cs.metadata(grid_thw=GRID, text=text):
        assert_projected(model, handle, tokens(), tokens(length=7), config=config, text=text)


def test_a_projection_without_bias_counts() -> None:
    module = Attention()
    module.proj_l = nn.Linear(8, 8, bias=False)
    assert_projected(*attached(module), tokens())


class Adapted(nn.Linear):
    """A linear layer that is its own adapter, as LoRA is sometimes written."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.up = nn.Parameter(torch.randn(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Add the adapter's share."""
        return super().forward(x) + x[..., :2] @ self.up.t()


def test_an_adapter_of_the_projection_counts() -> None:
    model, handle = attached(Attention())
    module = model.attn
    module.proj_l = LowRank(module.proj_l)
    assert_projected(model, handle, tokens())


def test_an_adapter_that_is_a_linear_layer_itself_counts() -> None:
    module = Attention()
    module.proj_l = Adapted(8)
    assert_projected(*attached(module), tokens())


def test_hooks_of_the_projection_count() -> None:
    model, handle = attached(Attention())
    model.attn.proj_l.register_forward_hook(lambda _module, _args, out: out * 2)
    assert_projected(model, handle, tokens())


def test_a_parametrised_projection_counts() -> None:
    model, handle = attached(Attention())
    torch.nn.utils.parametrizations.weight_norm(model.attn.proj_l)
    assert_projected(model, handle, tokens())


@CONFIGS
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_projection_inside_activation_checkpointing_is_recomputed(
    use_reentrant: bool, config: cs.SLA
) -> None:
    options = {"is_checkpointed": True, "use_reentrant": use_reentrant}
    model, handle = attached(Attention(), config, **options)
    assert_projected(model, handle, tokens().requires_grad_(), config=config)


def test_an_adapted_projection_inside_activation_checkpointing_is_recomputed() -> None:
    model, handle = attached(Attention(), is_checkpointed=True)
    model.attn.proj_l = LowRank(model.attn.proj_l)
    assert_projected(model, handle, tokens().requires_grad_())


def test_projections_of_other_shapes_of_modules_are_found() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 2
            self.qkv = nn.Linear(16, 48)

        def forward(self, x: Tensor) -> Tensor:
            parts = (each.unflatten(2, (2, 8)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
            out = nn.functional.scaled_dot_product_attention(*parts)
            return out.transpose(1, 2).flatten(2)

    assert_projected(*attached(Fused()), tokens())


def outcome(model: nn.Module, *inputs: Tensor, policy: Any = "dense") -> RecordingBackend:
    """Compile a module on the test's grid; a call that stays dense computes dense attention."""
    backend, actual = record(model, *inputs, policy=policy, grid_thw=GRID)
    if backend.outcomes != ["sparse"]:
        assert backend.count(backend.after, SLA_OP) == 0
        assert_close(actual, model(*inputs))
    return backend


@pytest.mark.parametrize("config", [CONFIG, cs.SLA(proj=None, block_q=8, block_k=4)])
def test_without_a_projection_the_sparse_branch_is_all(config: cs.SLA) -> None:
    module = Attention()
    backend, actual = record(module, x := tokens(), policy=config, grid_thw=GRID)
    assert backend.outcomes == ["sparse"]
    assert "no projection, so no linear branch" in backend.decisions[0].detail
    with cs.reference.override(config, grid_thw=GRID):
        assert_close(actual, module(x))


def test_a_config_without_a_linear_branch_leaves_the_projection_alone() -> None:
    model, _ = attached(Attention())
    config = cs.SLA(topk_ratio=0.3, block_q=8, block_k=4, proj=None)
    again = cs.attach(model, config, modules="attn")
    assert again.projections == (f"attn.{PROJ}",)
    _, actual = record(model, x := tokens(), policy="dense", grid_thw=GRID)
    with cs.reference.override(config, grid_thw=GRID):
        assert_close(actual, model(x))


def test_a_projection_of_another_name_is_not_taken_for_the_one_named() -> None:
    model, _ = attached(Attention())
    with cs.force(cs.SLA(proj="other", block_q=8, block_k=4)), cs.metadata(grid_thw=GRID):
        (site,) = cs.explain(model, tokens()).sites
    assert site.reason == "projection_unfit"
    assert site.detail == "projection 'other', the module has 'proj_l'"


@pytest.mark.parametrize("sizes", [(16, 16), (8, 16), (16, 8)], ids=str)
def test_a_projection_of_another_size_than_the_heads_is_refused(sizes: tuple[int, int]) -> None:
    module = Attention()
    module.proj_l = nn.Linear(*sizes)
    backend = outcome(attached(module)[0], tokens())
    assert backend.outcomes == ["projection_unfit"]
    assert "heads are of size 8" in backend.decisions[0].detail


def test_what_is_forced_uses_the_projection() -> None:
    model, handle = attached(Attention())
    x = tokens()
    cases = ("sla:topk_ratio=0.5,block_q=4,block_k=8", "dense", "sla:feature_map=relu")
    configs = (cs.SLA(topk_ratio=0.5, block_q=4, block_k=8), None, cs.SLA(feature_map="relu"))
    compiled = torch.compile(
        model, backend="compiled_sparse", fullgraph=True, options={"inner": "eager"}
    )
    for spec, config in zip(cases, configs, strict=True):
        with cs.force(spec), cs.metadata(grid_thw=GRID):
            actual = compiled(x)
        with projected(model, handle, config):
            assert_close(actual, model(x))


def test_a_low_precision_model_computes_with_its_float32_projection() -> None:
    model, handle = attached(Attention().to(torch.bfloat16))
    x = tokens().to(torch.bfloat16)
    _, actual = record(model, x, policy="dense", grid_thw=GRID)
    with projected(model, handle, CONFIG):
        assert_close(actual, model(x), relative=2e-2)
    (gradient,) = torch.autograd.grad(actual.float().sum(), [model.attn.proj_l.weight])
    assert gradient.dtype == torch.float32
    assert bool(gradient.any())


@contextmanager
def low_precision() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


@pytest.mark.parametrize("is_adapted", [False, True], ids=["plain", "adapted"])
def test_autocast_reaches_projection_and_adapter(is_adapted: bool) -> None:
    model, handle = attached(Attention())
    if is_adapted:
        model.attn.proj_l = LowRank(model.attn.proj_l)
    x = tokens()
    with low_precision():
        backend, actual = record(model, x, policy="dense", grid_thw=GRID)
    assert backend.outcomes == ["sparse"]
    with low_precision(), projected(model, handle, CONFIG):
        expected = model(x)
    assert_close(actual, expected, relative=2e-2)
    gradients = parameter_gradients(model, expected)
    assert_gradients_close(parameter_gradients(model, actual), gradients, relative=3e-2)


def test_gates_and_projections_of_one_model_each_belong_to_their_rule() -> None:
    model = TinyDiT()
    handle = cs.attach(model, {"blocks.0.*": GATED, "*": CONFIG})
    assert handle.gates == (f"blocks.0.attn1.{GATE}",)
    assert handle.projections == (f"blocks.1.attn1.{PROJ}",)
    open_gates(model, handle.gates)
    open_projections(model, handle.projections)
    inputs = dit_inputs()
    backend, actual = record(model, *inputs, policy="dense")
    assert sorted(backend.outcomes)[-2:] == ["sparse", "sparse"]
    plain = cs.VSA(sparsity=GATED.sparsity, tile_thw=GATED.tile_thw)
    with projected(model, handle, plain, None, CONFIG, None):
        expected = model(*inputs)
    assert_close(actual, expected)
    assert_gradients_close(parameter_gradients(model, actual), parameter_gradients(model, expected))


@pytest.mark.parametrize("is_adapted", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_keeps_its_projection(strict: bool, is_adapted: bool) -> None:
    model, handle = attached(Attention())
    if is_adapted:
        model.attn.proj_l = LowRank(model.attn.proj_l)
    x = tokens()
    with cs.metadata(grid_thw=GRID):
        exported = torch.export.export(model, (x,), strict=strict)
        program, report = cs.rewrite_exported(exported, policy="dense")
    assert [each.decision for each in report.sites] == ["sparse"]
    with projected(model, handle, CONFIG):
        assert_close(program.module()(x), model(x))


def test_projections_work_with_dynamic_lengths_of_text() -> None:
    model, handle = attached(OneStream(), BOXES)
    backend = RecordingBackend("dense")
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for length in (7, 12, 5):
        inputs = tokens(), tokens(length=length)
        text = cs.Text(after=length)
        with cs.metadata(grid_thw=GRID, text=text):
            actual = compiled(*inputs)
        with projected(model, handle, BOXES, text=text):
            expected = model(*inputs)
        assert_close(actual, expected)
