"""Train a small video diffusion transformer densely, then fine-tune it with SLA in two stages.

python examples/finetune_sla.py --out runs/finetune_sla
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path

import torch
from moving_shapes._arguments import parsed
from moving_shapes._arguments import parser
from moving_shapes._report import gap_percent
from moving_shapes._report import new_console
from moving_shapes._report import plot
from moving_shapes._report import print_table
from moving_shapes._results import Results
from moving_shapes._run import Run
from moving_shapes._training import PROJECTION
from moving_shapes._training import Curve
from moving_shapes._training import Velocity
from moving_shapes._training import is_learned
from moving_shapes._training import predict_zero
from torch import Tensor
from torch import nn
from torch._dynamo.utils import counters

import compiled_sparse as cs

BLOCK_Q, BLOCK_K = (2, 4, 4), (1, 4, 4)


@dataclass(frozen=True, kw_only=True)
class SLAResults(Results):
    """What was measured with SLA. Before fine-tuning it is its sparse branch alone.

    Args:
        first_stage: SLA, after training the projections alone.
        sla: SLA, after both stages.
        sparse: The sparse branch alone, fine-tuned.
        sla_gap_percent: By how much `sla` is above `dense`.
        sparse_gap_percent: By how much `sparse` is above `dense`.
        reload_difference: Largest difference between predictions of the fine-tuned model and of a
            new one with its checkpoint.
        compilations: To how many programs the SLA model was compiled, by stage.
    """

    first_stage: float
    sla: float
    sparse: float
    sla_gap_percent: float
    sparse_gap_percent: float
    reload_difference: float
    compilations: tuple[int, ...]

    def losses(self) -> dict[str, float]:
        """Return the rows of the table."""
        return {
            **self.dense_losses(),
            "SLA, before fine-tuning": self.zero_shot,
            "SLA, projections trained": self.first_stage,
            "SLA, fine-tuned": self.sla,
            "sparse branch alone, fine-tuned": self.sparse,
        }


class Stages:
    """Fine-tuning with SLA: first the projections alone, which start at zero, then everything.

    Args:
        run: The run.
        sla: The mechanism.
        checkpoint: The dense weights.
    """

    def __init__(self, run: Run, sla: cs.SLA, checkpoint: Path) -> None:
        self._run = run
        self._data = run.finetuning_data()
        self.model, self.compiled = run.attached(sla, checkpoint)
        self.curve = Curve()
        self.compilations: list[int] = []

    def train(self, title: str, steps: int, *, projections_only: bool) -> Path:
        """Train a stage on the batches that come next; return its checkpoint.

        Args:
            title: What is done.
            steps: Number of steps.
            projections_only: Whether all other weights are frozen.
        """
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(is_learned(name) or not projections_only)
        if self.curve.train:
            self.curve.stages.append(len(self.curve.train))
        programs = counters["stats"]["unique_graphs"]
        self._run.fine_tune(
            title, self.model, self.compiled, steps=steps, data=self._data, curve=self.curve
        )
        self.compilations.append(counters["stats"]["unique_graphs"] - programs)
        return self._run.save(published(self.model), f"sla_stage{len(self.compilations)}")


def published(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters, its projections by the names of published checkpoints.

    Args:
        model: The model.
    """
    ours, theirs = f".{PROJECTION}.", f".attn_impl.{PROJECTION}."
    return {name.replace(ours, theirs): each for name, each in model.state_dict().items()}


def compare(run: Run) -> SLAResults:
    """Train dense, fine-tune dense, SLA and its sparse branch from the same weights, and compare.

    Args:
        run: The run.
    """
    arguments, start = run.arguments, time.perf_counter()
    sla = cs.SLA(topk_ratio=arguments.topk_ratio, block_q=BLOCK_Q, block_k=BLOCK_K)

    dense_model = run.new_model()
    dense = run.train_dense(dense_model)
    checkpoint = run.save(dense_model.state_dict(), "dense")

    stages = Stages(run, sla, checkpoint)
    first = max(1, round(arguments.projection_share * arguments.finetune_steps))
    stages.train("SLA, projections", first, projections_only=True)
    saved = stages.train("SLA, all", arguments.finetune_steps - first, projections_only=False)
    reloaded = run.attached(sla, saved)[1]
    difference = largest_difference(run, stages.compiled, reloaded)

    sparse_curve = run.fine_tune(
        "sparse branch alone", *run.attached(replace(sla, proj=None), checkpoint)
    )
    dense_curve = run.fine_tune("dense", dense_model, dense)
    plot(
        arguments.plot,
        {"dense": dense_curve, "SLA": stages.curve, "sparse branch alone": sparse_curve},
    )
    (dense_before, *_, dense_loss), (zero_shot, *_, sla_loss), (*_, sparse_loss) = (
        each.evaluated.values() for each in (dense_curve, stages.curve, sparse_curve)
    )
    return SLAResults(
        trivial=run.evaluate(predict_zero),
        dense_before=dense_before,
        dense=dense_loss,
        zero_shot=zero_shot,
        first_stage=stages.curve.evaluated[first],
        sla=sla_loss,
        sparse=sparse_loss,
        sla_gap_percent=gap_percent(sla_loss, dense_loss),
        sparse_gap_percent=gap_percent(sparse_loss, dense_loss),
        reload_difference=difference,
        compilations=tuple(stages.compilations),
        seconds=time.perf_counter() - start,
    )


def largest_difference(run: Run, one: Velocity, other: Velocity) -> float:
    """Return the largest difference between the predictions of two models.

    Args:
        run: The run.
        one: A model.
        other: Another one.
    """
    batch = run.held_out[0]
    video = torch.cat([batch.noise, torch.zeros_like(batch.noise[:, :1])], dim=1)
    return (one(video, batch.time) - other(video, batch.time)).abs().max().item()


def main(argv: Sequence[str] | None = None) -> SLAResults:
    """Run the example; return what was measured.

    Args:
        argv: Words of the command line; None: those of this process.
    """
    own = parser(__doc__.splitlines()[0], out="finetune_sla")
    own.add_argument("--topk-ratio", type=float, default=0.02, help="share of key blocks kept")
    own.add_argument(
        "--projection-share", type=float, default=0.1, help="of the steps, for projections alone"
    )
    arguments = parsed(own, argv)
    console = new_console()
    results = compare(Run(arguments, console))
    results.save(arguments.out)
    print_table(console, results.losses(), "dense, fine-tuned")
    console.print(f"compilations of the SLA model by stage: {results.compilations}")
    console.print(f"saved and loaded, predictions differ by {results.reload_difference:.1e}")
    console.print(f"{results.seconds:.0f} s; files are in {arguments.out}")
    return results


if __name__ == "__main__":
    main()
