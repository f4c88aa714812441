"""`compiled-sparse completion`: a script that completes commands and options in a shell."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from compiled_sparse.chips import CHIPS
from compiled_sparse.cli.arguments import Commands
from compiled_sparse.cli.arguments import require_packages
from compiled_sparse.presets import MODELS

SHELLS = ("bash", "zsh", "fish", "tcsh")

_NAMES = {"model": tuple(MODELS), "chip": tuple(CHIPS)}
_FILES = ("PATH", "TABLE")  # how options that name a file show it


def add_parser(commands: Commands) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "completion",
        help="print a script that completes commands in your shell",
        description="Print a script that completes commands and options in a shell.",
        epilog="examples:\n"
        '  bash: eval "$(compiled-sparse completion bash)"    in ~/.bashrc\n'
        "  zsh:  compiled-sparse completion zsh > FOLDER/_compiled-sparse    for a folder of "
        "$fpath\n"
        "  fish: compiled-sparse completion fish > "
        "~/.config/fish/completions/compiled-sparse.fish\n"
        "  tcsh: compiled-sparse completion tcsh > FILE, and source FILE in ~/.tcshrc",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell to write for")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the script.

    Raises:
        MissingExtraError: if the package of the completion extra is not installed.
    """
    require_packages(("shtab",), extra="completion", purpose="completion in a shell")
    import shtab

    from compiled_sparse.cli import build_parser

    parser = build_parser()
    for action in _options(parser):
        if action.dest in _NAMES:
            action.choices = _NAMES[action.dest]
        elif action.metavar in _FILES:
            action.complete = shtab.FILE
        if isinstance(action.metavar, tuple):
            action.metavar = " ".join(action.metavar)  # zsh shows it as it is
    print(shtab.complete(parser, shell=arguments.shell))
    return 0


def _options(parser: argparse.ArgumentParser) -> Iterator[Any]:
    """Yield the arguments of a parser and of its commands; argparse has no public way to them."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _options(command)
