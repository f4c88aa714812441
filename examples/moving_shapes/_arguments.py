"""The arguments that both examples have."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def parser(description: str, out: str) -> argparse.ArgumentParser:
    """Return a parser of the arguments that both examples have.

    Args:
        description: What the example does.
        out: The folder it writes by default.
    """
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--steps", type=int, default=500, help="steps of dense training")
    result.add_argument("--finetune-steps", type=int, default=400, help="steps of each copy")
    result.add_argument("--batch", type=int, default=2, help="videos in a batch")
    result.add_argument("--held-out", type=int, default=96, help="videos to evaluate on")
    result.add_argument("--seed", type=int, default=0, help="of weights and training videos")
    result.add_argument("--out", type=Path, default=Path(out), help="folder to write")
    result.add_argument(
        "--plot", type=Path, help="the picture; losses.png in the folder if left out"
    )
    result.add_argument("--inner", default="inductor", help="who compiles; aot_eager starts sooner")
    result.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    return result


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments, with a few steps of everything for a quick run.

    Args:
        parser: What `parser` returned, with what the example added.
        argv: Words of the command line; None: those of this process.
    """
    arguments = parser.parse_args(argv)
    if arguments.plot is None:
        arguments.plot = arguments.out / "losses.png"
    if arguments.quick:
        arguments.steps, arguments.finetune_steps, arguments.held_out = 8, 12, 8
        arguments.inner = "aot_eager"
    return arguments
