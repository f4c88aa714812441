"""`compiled-sparse calibrate search`: the published mask search, for any model and grid."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from compiled_sparse.calibration import full_window_of
from compiled_sparse.calibration import mask_searches
from compiled_sparse.calibration import measure
from compiled_sparse.calibration import parse_candidates
from compiled_sparse.cli.arguments import Commands
from compiled_sparse.cli.workload import add_workload_arguments
from compiled_sparse.cli.workload import load_workload
from compiled_sparse.cli.workload import progress
from compiled_sparse.config import STA
from compiled_sparse.errors import CalibrationError

VERSION = 1
_DEMO_WINDOWS = ("1,1,3", "1,3,1")
_DEMO_TILE = (5, 3, 3)


def add_parser(commands: Commands) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "search",
        help="losses of each window for every step, layer and head, in the published form",
        description="Run every candidate window of sliding tile attention beside full attention "
        "and write the L2 and L1 losses of each step, layer and head, one file for each sample.",
        epilog="examples:\n"
        "  compiled-sparse calibrate search --demo --output searches\n"
        '  compiled-sparse calibrate search wan.py:calls --window "3,1,10" --window "1,5,7"\n'
        "      --tile 6 8 8 --output positive --negative-output negative --journal wan.journal",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_workload_arguments(parser)
    parser.add_argument(
        "--window",
        action="append",
        default=[],
        metavar="T,H,W",
        help="candidate, in tiles; as often as there are candidates",
    )
    parser.add_argument(
        "--tile",
        nargs=3,
        type=int,
        metavar=("T", "H", "W"),
        help="sides of a tile, in tokens (default 6 8 8)",
    )
    parser.add_argument(
        "--output",
        default="mask_search",
        metavar="FOLDER",
        help="folder for the losses (default %(default)s)",
    )
    parser.add_argument(
        "--negative-output",
        metavar="FOLDER",
        help="folder for those of calls with a negative prompt (default OUTPUT_negative)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Search and write one file for each sample.

    Raises:
        CompiledSparseError: if the request cannot be carried out.
    """
    texts = arguments.window or (_DEMO_WINDOWS if arguments.demo else ())
    if not texts:
        raise CalibrationError(
            "there is nothing to search",
            got="no --window",
            expected="at least one",
            next_step='pass --window "3,3,3" --window "1,5,5", for instance',
        )
    tile = tuple(arguments.tile or (_DEMO_TILE if arguments.demo else (6, 8, 8)))
    candidates = [STA(window_thw=window, tile_thw=tile) for window in parse_candidates(texts)]
    workload = load_workload(arguments)
    with progress(workload.num_calls) as done:
        found = measure(
            workload.model,
            workload.calls,
            candidates,
            journal=arguments.journal,
            inner=arguments.inner,
            on_call=done,
        )
    folders = {
        "positive": Path(arguments.output),
        "negative": Path(arguments.negative_output or f"{arguments.output}_negative"),
    }
    paths = [
        search.save(folders[branch], sample, overwrite=True)
        for (sample, branch), search in mask_searches(found).items()
    ]
    full = full_window_of(found)
    if arguments.json:
        files = list(map(str, paths))
        print(json.dumps({"version": VERSION, "files": files, "full_window": full}))
    else:
        for path in paths:
            print(path)
        print("full window: " + ",".join(map(str, full)))
    return 0
