"""The command line: `compiled-sparse COMMAND`, one module for each command.

Exit status 0 means that everything asked for happened, 1 that a check failed, 2 that the request
could not be carried out, 130 that it was interrupted, 141 that nobody read the output to its end.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import metadata

from compiled_sparse.cli import bench
from compiled_sparse.cli import calibrate
from compiled_sparse.cli import completion
from compiled_sparse.cli import demo
from compiled_sparse.cli import doctor
from compiled_sparse.cli import explain
from compiled_sparse.cli import plan
from compiled_sparse.cli import plot
from compiled_sparse.errors import CompiledSparseError

__all__ = ["build_parser", "main"]

USAGE_ERROR = 2
INTERRUPTED = 130
NO_READER = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit status.
    """
    arguments = build_parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except CompiledSparseError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes standard output once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER
    return status


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; `run` of what it parses takes that and does the work."""
    parser = argparse.ArgumentParser(
        prog="compiled-sparse",
        description="Block-sparse attention for unmodified video diffusion transformers.",
    )
    version = f"compiled_sparse {metadata.version('compiled-sparse')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (bench, calibrate, completion, demo, doctor, explain, plan, plot):
        command.add_parser(commands)
    return parser
