"""`compiled-sparse calibrate`: measure windows and sparsities on a model's own calls, choose."""

from __future__ import annotations

from compiled_sparse.cli import calibrate_run
from compiled_sparse.cli import calibrate_search
from compiled_sparse.cli import calibrate_tune
from compiled_sparse.cli.arguments import Commands


def add_parser(commands: Commands) -> None:
    """Add this command and those under it to the parser."""
    parser = commands.add_parser(
        "calibrate",
        help="measure candidates on a model's own calls and choose among them",
        description="Measure how far each candidate is from dense attention, layer by layer, and "
        "choose. `run` makes a policy of any candidates; `search`, `tune` and `tune-cfg` are the "
        "published mask search of sliding tile attention, with its files.",
    )
    inner = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    calibrate_run.add_parser(inner)
    calibrate_search.add_parser(inner)
    calibrate_tune.add_parsers(inner)
