"""`compiled-sparse explain`: what would be done to each attention call of a model."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack

import torch

from compiled_sparse.cli.arguments import Commands
from compiled_sparse.cli.arguments import count
from compiled_sparse.cli.arguments import require_packages
from compiled_sparse.cli.entry import ModelCall
from compiled_sparse.cli.entry import failures_in_a_line
from compiled_sparse.cli.entry import load_model
from compiled_sparse.cli.wan import build_model
from compiled_sparse.errors import ConfigError
from compiled_sparse.explain import explain
from compiled_sparse.layout import Text
from compiled_sparse.layout import check_extents
from compiled_sparse.metadata import metadata
from compiled_sparse.policy import as_policy
from compiled_sparse.report import Report

CHECK_FAILED = 1

_DEMO_GRID = (5, 30, 52)  # that of `compiled-sparse demo`
_DEMO_SIZES = {"layers": 2, "heads": 4, "head_dim": 64}


def add_parser(commands: Commands) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "explain",
        help="say what would be done to each attention call of a model",
        description="Trace a model as torch.compile would and say for each attention call what the "
        "backend would do to it, and why. The model's mathematics is not done.",
        epilog="examples:\n"
        "  compiled-sparse explain --demo --policy sta\n"
        "  compiled-sparse explain model.py:build --policy vsa:sparsity=0.9 --html report.html\n"
        "  compiled-sparse explain package.models:small --policy policy.json --strict",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "entry",
        nargs="?",
        metavar="FILE.py:FUNCTION",
        help="function that takes nothing and returns (model, kwargs) or (model, args, kwargs); "
        "package.module:function will do as well",
    )
    parser.add_argument("--demo", action="store_true", help="explain the demo's model instead")
    parser.add_argument(
        "--policy",
        metavar="POLICY",
        help="a mechanism's name, a quality level, a spec string such as vsa:sparsity=0.9, or the "
        "path of a policy's JSON file (default automatic)",
    )
    _add_metadata_arguments(parser)
    parser.add_argument(
        "--html", metavar="PATH", help="write the report as a page, too; needs matplotlib"
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="exit with status 1 where the backend with strict=True would raise: a call that the "
        "policy names stays dense, or no rule matches",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Explain the model and print the report.

    Returns:
        0, or 1 with `--strict` where `strict` would raise.

    Raises:
        ConfigError: if both a function and `--demo` are given, or neither.
        EntryError: if the function, or the call of its model, fails.
        CompiledSparseError: if the policy or what is said of the call cannot be right.
    """
    policy = as_policy(arguments.policy)
    if arguments.html:
        require_packages(("matplotlib",), extra="plots", purpose="a page with pictures")
    with ExitStack() as stack:
        # Entered first: a grid that cannot be right is refused before a model is built.
        stack.enter_context(_metadata(arguments))
        call = _model_call(arguments)
        stack.enter_context(
            failures_in_a_line(
                "the model cannot be called with these inputs",
                next_step="call it in Python, eagerly and then under torch.compile",
            )
        )
        report = explain(call.model, *call.args, policy=policy, **call.kwargs)
    _show(report, arguments)
    problems = report.strict_problems if arguments.strict else ()
    for problem in problems:
        print(f"strict: {problem}", file=sys.stderr)
    return CHECK_FAILED if problems else 0


def _add_metadata_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what the graph alone may not show, as for cs.metadata")
    group.add_argument(
        "--grid",
        nargs=3,
        type=int,
        metavar=("T", "H", "W"),
        help="token grid after patching; with --demo that of its video "
        f"(default {' '.join(map(str, _DEMO_GRID))})",
    )
    group.add_argument(
        "--text",
        nargs=2,
        type=int,
        metavar=("BEFORE", "AFTER"),
        help="text tokens around the video; needs --grid",
    )
    group.add_argument(
        "--step", type=count(0), metavar="N", help="denoising step, from 0 (default one not dense)"
    )
    group.add_argument("--num-steps", type=count(1), metavar="N", help="number of denoising steps")


def _metadata(arguments: argparse.Namespace) -> ExitStack:
    grid, text = arguments.grid, arguments.text
    stack = ExitStack()
    stack.enter_context(
        metadata(
            grid_thw=None if grid is None else tuple(grid),
            text=None if text is None else Text(*text),
            step=arguments.step,
            num_steps=arguments.num_steps,
        )
    )
    return stack


def _model_call(arguments: argparse.Namespace) -> ModelCall:
    if arguments.demo == (arguments.entry is not None):
        raise ConfigError(
            "one model is explained at a time",
            got=f"{arguments.entry} and --demo" if arguments.demo else "no model",
            expected="FILE.py:FUNCTION, or --demo",
            next_step="write compiled-sparse explain model.py:build, for instance",
        )
    return _demo_call(arguments) if arguments.demo else load_model(arguments.entry)


def _demo_call(arguments: argparse.Namespace) -> ModelCall:
    require_packages(("diffusers",), extra="diffusers", purpose="the demo's model")
    grid = tuple(arguments.grid or _DEMO_GRID)
    check_extents("--grid", grid)
    demo = build_model(grid, **_DEMO_SIZES, dtype=torch.float32, seed=0)
    return ModelCall(model=demo.module, kwargs=demo.inputs)


def _show(report: Report, arguments: argparse.Namespace) -> None:
    page = report.to_html(arguments.html) if arguments.html else None
    if arguments.json:
        print(report.to_json())
    else:
        print(report)
    if page is not None:
        print(page, file=sys.stderr if arguments.json else sys.stdout)
