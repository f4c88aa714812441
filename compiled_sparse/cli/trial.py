"""The work of the demo: explain, compile, compare with the reference, time, draw."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import compiled_sparse as cs
from compiled_sparse.cli.compilers import inductor_failure
from compiled_sparse.cli.compilers import require_inductor
from compiled_sparse.cli.measure import Agreement
from compiled_sparse.cli.measure import Timing
from compiled_sparse.cli.measure import compare
from compiled_sparse.cli.measure import dense_attention_call
from compiled_sparse.cli.measure import medians
from compiled_sparse.cli.screen import Steps
from compiled_sparse.cli.wan import DemoModel
from compiled_sparse.cli.wan import build_model
from compiled_sparse.ops import cpu
from compiled_sparse.plots import plot_pattern
from compiled_sparse.report import Report

RESULT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to run.

    Args:
        sta: The mechanism of the sparse model.
        grid_thw: Token grid.
        layers: Number of transformer blocks.
        heads: Attention heads.
        head_dim: Channels per head.
        dtype: Of weights and inputs.
        rounds: Timed rounds, 0 for none.
        seed: For weights and inputs.
        inner: Compiler of both models; None for inductor where it works, else eager.
        output: Picture to write.
    """

    sta: cs.STA
    grid_thw: tuple[int, int, int]
    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    rounds: int
    seed: int
    inner: str | None
    output: Path

    @property
    def num_steps(self) -> int:
        """Number of steps `run_trial` shows."""
        return 8 if self.rounds else 7


@dataclass(frozen=True)
class Result:
    """Everything the trial found out; what was not reached or not asked for is None.

    Args:
        report: The decision for each attention call.
        inner: The compiler of both models.
        kernel: The CPU kernel, as `ops.cpu.describe` says.
        num_parameters: Number of weights.
        agreement: Compiled sparse output against the reference.
        dense_difference: Relative difference of the dense output from the reference: what the
            comparison would have shown, had the model stayed dense.
        timing: Seconds per forward.
        picture: Where the pattern was drawn.
        problems: What did not happen as it should.
    """

    report: Report
    inner: str
    kernel: dict[str, str]
    num_parameters: int
    agreement: Agreement | None = None
    dense_difference: float | None = None
    timing: Timing | None = None
    picture: Path | None = None
    problems: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return the result as a JSON document with a version."""
        timing, agreement = self.timing, self.agreement
        document = {
            "version": RESULT_VERSION,
            "passed": not self.problems,
            "problems": self.problems,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "inner": self.inner,
            "kernel": self.kernel,
            "num_parameters": self.num_parameters,
            "report": self.report.to_dict(),
            "agreement": agreement and {**asdict(agreement), "passed": agreement.passed},
            "dense_difference": self.dense_difference,
            "timing": timing
            and {**asdict(timing), "speedup": timing.speedup, "ideal": timing.ideal},
            "picture": self.picture and str(self.picture),
        }
        return json.dumps(document, indent=2)


def run_trial(settings: Settings, steps: Steps) -> Result:
    """Do everything the settings ask for.

    Args:
        settings: What to run.
        steps: Where progress is shown.

    Returns:
        The result; it stops early, with a problem, where a call that should be sparse is not.

    Raises:
        InnerCompilerError: if the inner compiler asked for does not work here.
        CompiledSparseError: if the settings cannot be right.
    """
    with steps.step("Check the compilers") as note:
        kernel, inner = cpu.describe(), _working_inner(settings.inner)
        note(f"{inner} and the {kernel['kernel']} CPU kernel")
    with steps.step("Build the model"):
        model = _build(settings)
    with steps.step("Explain, before anything is computed"):
        report = cs.explain(model.module, policy=settings.sta, **model.inputs)
    found = functools.partial(Result, report, inner, kernel, model.num_parameters)
    if report.num_sparse != settings.layers:
        return found(
            problems=(f"{report.num_sparse} calls can be sparse, expected {settings.layers}",)
        )
    with steps.step(f"Compile the dense model with {inner}"):
        dense = torch.compile(model.module, backend=inner, fullgraph=True)
        dense_output = model.run(dense)
    with steps.step('Compile the sparse model with backend="compiled_sparse"'):
        options: dict[str, Any] = {"policy": settings.sta, "inner": inner}
        sparse = torch.compile(
            model.module, backend="compiled_sparse", options=options, fullgraph=True
        )
        sparse_output = model.run(sparse)
    with steps.step("Run the same model eagerly under the dense masked reference"):
        problems, expected = _run_reference(model, settings)
        agreement = compare(sparse_output, expected)
        if not agreement.passed:
            problems.append("the sparse model does not agree with the reference")
    timing = _time(model, dense, sparse, settings, report, steps) if settings.rounds else None
    with steps.step("Draw the attention pattern"):
        picture = plot_pattern(settings.sta, settings.grid_thw, path=settings.output)
    return found(
        agreement,
        compare(dense_output, expected).relative_error,
        timing,
        picture,
        tuple(problems),
    )


def _working_inner(asked: str | None) -> str:
    """Return the inner compiler: the one asked for, or the best that works."""
    if asked not in (None, "inductor"):
        return str(asked)
    if asked is None:
        return "eager" if inductor_failure() else "inductor"
    require_inductor(otherwise="pass --inner eager")
    return "inductor"


def _build(settings: Settings) -> DemoModel:
    return build_model(
        settings.grid_thw,
        layers=settings.layers,
        heads=settings.heads,
        head_dim=settings.head_dim,
        dtype=settings.dtype,
        seed=settings.seed,
    )


def _run_reference(model: DemoModel, settings: Settings) -> tuple[list[str], torch.Tensor]:
    """Return problems, and the output that the sparse model should have."""
    with cs.reference.override(settings.sta, grid_thw=settings.grid_thw) as override:
        expected = model.run(model.module)
    replaced, wanted = override.num_replaced, settings.layers
    if replaced == wanted:
        return [], expected
    return [f"the reference replaced {replaced} attention calls, expected {wanted}"], expected


def _time(
    model: DemoModel,
    dense: Callable[..., Any],
    sparse: Callable[..., Any],
    settings: Settings,
    report: Report,
    steps: Steps,
) -> Timing:
    (density,) = {site.density for site in report.sites if site.is_sparse}
    tokens = torch.Size(settings.grid_thw).numel()
    attention = dense_attention_call(
        tokens,
        layers=settings.layers,
        heads=settings.heads,
        head_dim=settings.head_dim,
        dtype=settings.dtype,
    )
    calls: dict[str, Callable[[], object]] = {
        "dense": lambda: model.run(dense),
        "sparse": lambda: model.run(sparse),
        "attention": attention,
    }
    done = 0
    with steps.step(f"Time {settings.rounds} rounds, dense and sparse in turn") as note:

        def count_round() -> None:
            nonlocal done
            done += 1
            note(f"{done} done")

        seconds = medians(calls, settings.rounds, count_round)
    return Timing(
        settings.rounds, seconds["dense"], seconds["sparse"], seconds["attention"], density
    )
