"""Steps, ramps and batches end to end: what is computed at each, and that nothing compiles anew."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import ClassVar

import pytest
import torch
from layered import layered_output
from modules import GRID
from modules import POLICY
from modules import TinyDiT
from modules import assert_close
from modules import dit_inputs
from modules import expected_output
from test_regional import Counting
from test_regional import regional
from torch import Tensor

import compiled_sparse as cs
from compiled_sparse import registry
from compiled_sparse.config import MechanismConfig
from compiled_sparse.errors import ConfigError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.metadata import CallMetadata
from compiled_sparse.ops.checks import KERNEL_CAPABILITIES
from compiled_sparse.runtime import call_tensor
from compiled_sparse.runtime import index_tensor

pytestmark = pytest.mark.usefixtures("fresh_compiler")

LAYERS, STEPS = 2, 50
WINDOWS = ((1, 1, 1), (1, 3, 1), (3, 1, 3), (1, 1, 3))
TABLE = cs.WindowTable(
    windows=WINDOWS,
    choice=[[[(3 * step + 5 * layer) % 4] for layer in range(LAYERS)] for step in range(STEPS)],
)
SCHEDULED = cs.STA(window_thw=TABLE, tile_thw=(2, 3, 2))


def frozen() -> TinyDiT:
    return TinyDiT(LAYERS).requires_grad_(False)


def references(model: TinyDiT, inputs: Any) -> list[Tensor]:
    """The output at each step; few of them differ."""
    known: dict[Any, Tensor] = {}
    for step in range(STEPS):
        configs = tuple(SCHEDULED.at(step, layer) for layer in range(LAYERS))
        if configs not in known:
            known[configs] = layered_output(model, *inputs, configs=configs)
    assert len(known) == len(WINDOWS)
    keys = [tuple(SCHEDULED.at(s, layer) for layer in range(LAYERS)) for s in range(STEPS)]
    return [known[key] for key in keys]


@contextlib.contextmanager
def compiled(model: TinyDiT, how: str, *, sparse: bool = True) -> Iterator[Counting]:
    """Compile a model as a whole or block by block."""
    if how == "blocks":
        if sparse:
            cs.attach(model, SCHEDULED)
        yield regional(model, sparse=sparse)
    else:
        backend = Counting(sparse=sparse, policy=SCHEDULED)
        model.compile(backend=backend, fullgraph=True)
        yield backend


def run_schedule(model: TinyDiT, how: str, *, sparse: bool) -> list[int]:
    """Run fifty steps, then three batch sizes at other steps; count compilations after each."""
    torch._dynamo.reset()
    counts, plain = [], copy.deepcopy(model)
    with compiled(model, how, sparse=sparse) as backend, cs.metadata(grid_thw=GRID):
        inputs = dit_inputs()
        expected = references(plain, inputs) if sparse else [None] * STEPS
        for step in range(STEPS):
            with cs.metadata(step=step, num_steps=STEPS):
                actual = model(*inputs)
            if expected[step] is not None:
                assert_close(actual, expected[step])
        counts.append(backend.calls)
        for batch, step in ((2, 7), (3, 8), (1, 9), (2, 10)):
            inputs = dit_inputs(batch=batch)
            with cs.metadata(step=step):
                actual = model(*inputs)
            if sparse:
                configs = [SCHEDULED.at(step, layer) for layer in range(LAYERS)]
                assert_close(actual, layered_output(plain, *inputs, configs=configs))
            counts.append(backend.calls)
    return counts


@pytest.mark.parametrize("how", ["blocks", pytest.param("whole", marks=pytest.mark.slow)])
def test_fifty_steps_and_three_batch_sizes_compile_as_often_as_they_do_dense(how: str) -> None:
    dense = run_schedule(frozen(), how, sparse=False)
    assert run_schedule(frozen(), how, sparse=True) == dense
    assert dense[0] == 1


# A mechanism that reads the sparsity of the call.


@dataclass(frozen=True, kw_only=True)
class Faint(MechanismConfig):
    """Dense attention, made fainter by the sparsity and shifted by the step."""

    name: ClassVar[str] = "faint"


def _faint(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    sparsity, step, scale = rest[-3:]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    out = out * (1 - sparsity).to(v.dtype) + step.to(v.dtype)
    return out, out.sum(-1).float()


@pytest.fixture
def faint() -> Iterator[type[Faint]]:
    """The mechanism, registered for one test."""

    def lower(config: Faint, tile: Any, *sizes: Any) -> registry.OpCall:
        return registry.OpCall(_faint, (), ("sparsity", "step"))

    def evaluate(config: Faint, layout: BlockLayout, heads: int) -> registry.Chosen:
        return registry.Chosen(config, layout.tile, 1.0, 1.0)

    mechanism = registry.Mechanism(
        config=Faint,
        capabilities=KERNEL_CAPABILITIES,
        evaluate=evaluate,
        lower=lower,
        token_mask=lambda config, queries, keys, grid, tile: torch.ones(
            1, len(queries), len(keys), dtype=torch.bool
        ),
    )
    registry.register(mechanism)
    yield Faint
    registry._mechanisms.pop("faint")


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_ramp_of_thirty_sparsities_compiles_once(faint: type[Faint], inner: str) -> None:
    x = torch.randn(1, 2, 60, 8)
    calls = []

    def attend(x: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    backend = Counting(policy=faint(), inner=inner)
    run = torch.compile(attend, backend=backend, fullgraph=True)
    plain = attend(x)
    for index in range(30):
        sparsity = index / 30
        with cs.metadata(grid_thw=GRID, sparsity=sparsity, step=index):
            assert_close(run(x), plain * (1 - sparsity) + index)
        calls.append(backend.calls)
    assert set(calls) == {1}
    with cs.metadata(grid_thw=GRID):
        assert_close(run(x), plain)


def test_a_sparsity_is_not_rounded_by_autocast(faint: type[Faint]) -> None:
    x = torch.randn(1, 2, 60, 8, dtype=torch.bfloat16)
    run = torch.compile(
        lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x),
        backend=Counting(policy=faint()),
    )
    plain = torch.nn.functional.scaled_dot_product_attention(x, x, x)
    with torch.autocast("cpu", torch.bfloat16), cs.metadata(grid_thw=GRID, sparsity=0.9):
        assert_close(run(x), plain * torch.tensor(1 - 0.9, dtype=torch.bfloat16))


# The tensors themselves.


def test_one_tensor_for_each_value_never_written_to() -> None:
    device = torch.device("cpu")
    first = call_tensor("step", CallMetadata(step=3), device)
    assert call_tensor("step", CallMetadata(step=4), device) is not first
    assert first.item() == 3
    assert call_tensor("step", CallMetadata(step=3, num_steps=9), device) is first
    assert call_tensor("step", CallMetadata(), device).item() == 0
    assert call_tensor("sparsity", CallMetadata(sparsity=0.7), device).item() == 0.7
    assert first.dtype == torch.int64
    assert first.dim() == 0


def test_a_tensor_made_in_inference_mode_serves_training() -> None:
    index_tensor.cache_clear()
    with torch.inference_mode():
        made = index_tensor(5, torch.device("cpu"))
    assert not made.is_inference()


def test_reading_windows_without_a_table_is_an_error() -> None:
    with pytest.raises(ConfigError, match="reads a table of windows that its config does not have"):
        call_tensor("windows", CallMetadata(), torch.device("cpu"))


def test_eagerly_a_mechanism_reads_the_arguments_or_else_the_metadata(faint: type[Faint]) -> None:
    x = torch.randn(1, 2, 60, 8)
    plain = torch.nn.functional.scaled_dot_product_attention(x, x, x)
    with cs.metadata(sparsity=0.5, step=3):
        assert_close(cs.attention(x, x, x, faint(), grid_thw=GRID), plain / 2 + 3)
        assert_close(cs.attention(x, x, x, faint(), grid_thw=GRID, step=7), plain / 2 + 7)
    assert_close(cs.attention(x, x, x, faint(), grid_thw=GRID), plain)


# Threads and pipelines.


def test_two_threads_at_different_steps_do_not_disturb_each_other() -> None:
    model, inputs = frozen(), dit_inputs()
    expected = references(model, inputs)
    cs.attach(model, SCHEDULED)
    regional(model)
    with cs.metadata(grid_thw=GRID, step=0):
        model(*inputs)
    errors: list[float] = []
    together = threading.Barrier(2, timeout=60)

    def work(steps: Sequence[int]) -> None:
        with torch.no_grad(), cs.metadata(grid_thw=GRID):
            for step in steps:
                with cs.metadata(step=step):
                    together.wait()
                    errors.append(float((model(*inputs) - expected[step]).abs().max()))

    threads = [
        threading.Thread(target=work, args=(steps,)) for steps in (range(8), range(8, 0, -1))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 16
    assert max(errors) < 1e-4


class TinyPipeline:
    """What a diffusers pipeline does with its callback."""

    def __init__(self, denoise: Callable[[Tensor], Tensor]) -> None:
        self.denoise = denoise
        self.num_timesteps = 0

    def __call__(
        self, latents: Tensor, num_inference_steps: int, callback_on_step_end: Any
    ) -> list[Tensor]:
        """Return the prediction of each step."""
        self.num_timesteps = num_inference_steps
        predictions = []
        for index, timestep in enumerate(torch.linspace(1000, 0, num_inference_steps)):
            predictions.append(self.denoise(latents))
            kwargs = {"latents": latents}
            latents = callback_on_step_end(self, index, timestep, kwargs)["latents"]
        return predictions


def test_the_callback_leads_a_pipeline_through_the_table() -> None:
    model, (video, *rest) = frozen(), dit_inputs()
    expected = references(model, (video, *rest))
    cs.attach(model, SCHEDULED)
    regional(model)
    with cs.metadata(grid_thw=GRID):
        for _ in range(2):  # a second run starts at step 0 again
            pipe = TinyPipeline(lambda latents: model(latents, *rest))
            seen = pipe(video, 5, cs.step_callback())
            for step in range(5):
                assert_close(seen[step], expected[step])


def test_a_dense_step_is_dense_and_compiles_nothing() -> None:
    model, (video, *rest) = frozen(), dit_inputs()
    dense, sparse = model(video, *rest), expected_output(model, video, *rest)
    policy = cs.Policy({"*": POLICY}, dense_first_steps=1, dense_last_steps=1)
    cs.attach(model, policy)
    backend = regional(model)
    with cs.metadata(grid_thw=GRID):
        pipe = TinyPipeline(lambda latents: model(latents, *rest))
        seen = pipe(video, 4, cs.step_callback(4))
    for actual, expected in zip(seen, (dense, sparse, sparse, dense), strict=True):
        assert_close(actual, expected)
    assert backend.calls == 1
