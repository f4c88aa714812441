"""Train a small video diffusion transformer densely, then fine-tune it with sparse attention.

python examples/train_moving_shapes.py --out runs/moving_shapes
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moving_shapes._arguments import parsed
from moving_shapes._arguments import parser
from moving_shapes._ramp import RampRun
from moving_shapes._report import gap_percent
from moving_shapes._report import new_console
from moving_shapes._report import plot
from moving_shapes._report import print_table
from moving_shapes._results import Results
from moving_shapes._training import GATE
from moving_shapes._training import predict_zero
from torch._dynamo.utils import counters

import compiled_sparse as cs


@dataclass(frozen=True, kw_only=True)
class VSAResults(Results):
    """What was measured with VSA.

    Args:
        sparse: Sparse, fine-tuned.
        reloaded: Sparse, from the saved checkpoint in a new model.
        gap_percent: By how much `sparse` is above `dense`.
        compilations: How many programs the sparse model was compiled to.
        windows: Sliding windows instead of chosen tiles, fine-tuned alike, where asked for.
    """

    sparse: float
    reloaded: float
    gap_percent: float
    compilations: int
    windows: float | None


def compare(run: RampRun) -> VSAResults:
    """Train dense, fine-tune dense and sparse from the same weights, evaluate, save and plot.

    Args:
        run: The run.
    """
    arguments, start = run.arguments, time.perf_counter()
    vsa = cs.VSA(sparsity=arguments.sparsity, gate=GATE)

    dense_model = run.new_model()
    dense = run.train_dense(dense_model)
    dense_before = run.evaluate(dense)
    checkpoint = run.save(dense_model.state_dict(), "dense")

    programs = counters["stats"]["unique_graphs"]
    sparse_model, sparse = run.attached(vsa, checkpoint)
    zero_shot = run.evaluate(sparse)
    sparse_curve = run.fine_tune_ramped("fine-tuning, VSA", sparse_model, sparse)
    sparse_loss = run.evaluate(sparse)
    saved = run.save(sparse_model.state_dict(), "vsa")
    compilations = counters["stats"]["unique_graphs"] - programs
    reloaded = run.evaluate(run.attached(vsa, saved)[1])

    dense_curve = run.fine_tune("fine-tuning, dense", dense_model, dense)
    dense_loss = run.evaluate(dense)
    run.save(dense_model.state_dict(), "dense_finetuned")
    windows = fine_tuned_windows(run, checkpoint) if arguments.windows else None
    plot(arguments.plot, {"dense": dense_curve, "VSA": sparse_curve})
    return VSAResults(
        trivial=run.evaluate(predict_zero),
        dense_before=dense_before,
        dense=dense_loss,
        zero_shot=zero_shot,
        sparse=sparse_loss,
        reloaded=reloaded,
        gap_percent=gap_percent(sparse_loss, dense_loss),
        compilations=compilations,
        windows=windows,
        seconds=time.perf_counter() - start,
    )


def fine_tuned_windows(run: RampRun, checkpoint: Path) -> float:
    """Return the loss of sliding windows after the same fine-tuning.

    They hold up to six tiles, more than the four that VSA chooses at its default sparsity.

    Args:
        run: The run.
        checkpoint: The dense weights.
    """
    model, compiled = run.attached(cs.STA(window_thw=(3, 1, 3), tile_thw=(4, 4, 4)), checkpoint)
    run.fine_tune("fine-tuning, windows", model, compiled)
    return run.evaluate(compiled)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments.

    Args:
        argv: Words of the command line; None: those of this process.
    """
    own = parser(__doc__.splitlines()[0], out="moving_shapes")
    own.add_argument("--sparsity", type=float, default=0.9, help="share of tiles left out")
    own.add_argument("--windows", action="store_true", help="fine-tune sliding windows, too")
    return parsed(own, argv)


def main(argv: Sequence[str] | None = None) -> VSAResults:
    """Run the example; return what was measured.

    Args:
        argv: Words of the command line; None: those of this process.
    """
    arguments = parse(argv)
    console = new_console()
    results = compare(RampRun(arguments, console))
    losses = {
        **results.dense_losses(),
        "VSA, before fine-tuning": results.zero_shot,
        "VSA, fine-tuned": results.sparse,
        "VSA, saved and loaded": results.reloaded,
    }
    if results.windows is not None:
        losses["sliding windows, fine-tuned"] = results.windows
    print_table(console, losses, "dense, fine-tuned")
    console.print(f"{results.compilations} compilation of the sparse model for all sparsities")
    console.print(f"{results.seconds:.0f} s; files are in {arguments.out}")
    results.save(arguments.out)
    return results


if __name__ == "__main__":
    main()
