"""The wording of the errors of measuring and fitting; see `test_messages.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from calibration_cases import in_folder
from messages import Case
from safetensors.torch import save_file
from torch import nn

import compiled_sparse as cs
from compiled_sparse import calibration
from compiled_sparse import cli
from compiled_sparse.calibration import Call
from compiled_sparse.calibration import CallKey
from compiled_sparse.calibration import Measurements
from compiled_sparse.calibration import SiteErrors
from compiled_sparse.calibration import captured
from compiled_sparse.calibration import results
from compiled_sparse.calibration import search
from compiled_sparse.calibration.documents import with_checksum
from compiled_sparse.calibration.entries import open_entries
from compiled_sparse.calibration.journal import Journal
from compiled_sparse.calibration.offline import AttentionCall
from compiled_sparse.calibration.offline import measure_call
from compiled_sparse.calibration.run import _require_new
from compiled_sparse.cli.entry import EntryError
from compiled_sparse.config import MechanismConfig
from compiled_sparse.errors import CalibrationError
from compiled_sparse.errors import MissingExtraError

MODULES = (
    *(
        f"calibration/{name}"
        for name in (
            *("captured", "entries", "fit", "measurements", "offline", "results", "run"),
            "search",
        )
    ),
    *(f"cli/{name}" for name in ("calibrate_run", "calibrate_search", "workload")),
)

TILE = (2, 2, 2)
STA = cs.STA(window_thw=(1, 1, 1), tile_thw=TILE)
VSA = cs.VSA(sparsity=0.5)
ZEROS = torch.zeros(1, 1, 8, 4)


def site(path: str = "attn", heads: int = 1, tile: tuple[int, ...] = TILE) -> SiteErrors:
    """One call with one candidate."""
    rows = (((0.5,) * heads),)
    return SiteErrors(
        path=path,
        kind="self",
        grid_thw=(4, 4, 4),
        text=(0, 0),
        head_dim=4,
        densities=(0.1,),
        tiles=(tile,),
        squared_dense=(1.0,) * heads,
        squared_error=rows,
        absolute_error=rows,
        cosine=rows,
        captured_mass=rows,
    )


def measured(*sites: SiteErrors, candidate: MechanismConfig = STA, step: int = 0) -> Measurements:
    """What one call of a model gave."""
    return Measurements(candidates=(candidate,), calls={CallKey(step=step): sites})


def measure(
    *calls: Call, candidates: tuple[str, ...] = ("sta",), rows: int = 8
) -> Callable[[], object]:
    model = nn.Linear(2, 2)
    return lambda: calibration.measure(model, calls, candidates, inner="eager", rows=rows)


def record_without_a_step() -> None:
    model = nn.Linear(2, 2)
    with calibration.recording(model, ["sta"], inner="eager"):
        model(torch.zeros(1, 2))


def load_an_empty_file(folder: Path) -> None:
    path = folder / "a.json"
    document = with_checksum({"format": results.FORMAT, "version": results.VERSION})
    path.write_text(json.dumps(document))
    calibration.load_measurements(path)


def go_on_with_an_empty_entry(folder: Path) -> None:
    path = folder / "journal"
    header = {"candidates": [STA.to_dict()], "rows": 8}
    with Journal.open(path, json.loads(json.dumps(header))) as journal:
        journal.append(str(CallKey()), {})
    with open_entries(path, (STA,), 8):
        pass


def measure_infinity() -> None:
    q = torch.full((1, 1, 8, 4), torch.inf)
    measure_call(AttentionCall(q=q, k=q, v=q, grid_thw=TILE), (STA,), 4)


def capture_without_safetensors(folder: Path) -> None:
    with mock.patch.dict(sys.modules, {"safetensors.torch": None}):
        calibration.capture(folder, grid_thw=TILE)


def capture_nothing(folder: Path) -> None:
    with calibration.capture(folder, grid_thw=TILE):
        pass


def measure_a_foreign_file(folder: Path) -> None:
    (folder / "a.safetensors").write_bytes(b"0")
    calibration.measure_captured(folder, ["sta"])


def captured_file(folder: Path, name: str, length: int) -> None:
    q = torch.zeros(1, 1, length, 4)
    about = captured._About(layer=0, key=CallKey(), grid_thw=TILE, text=(0, 0), scale=None)
    tensors = {letter: q.clone() for letter in "qkv"}
    save_file(tensors, folder / f"{name}.safetensors", about.to_metadata())


def measure_a_shorter_call(folder: Path) -> None:
    captured_file(folder, "a", 7)
    calibration.measure_captured(folder, ["sta"])


def measure_a_call_twice(folder: Path) -> None:
    captured_file(folder, "a", 8)
    captured_file(folder, "b", 8)
    calibration.measure_captured(folder, ["sta"])


def run(*arguments: str) -> Callable[[], object]:
    """Run a command without catching its errors."""

    def command() -> object:
        parsed = cli.build_parser().parse_args(["calibrate", *arguments])
        return parsed.run(parsed)

    return command


def run_entry(folder: Path) -> object:
    (folder / "entry.py").write_text("def calls():\n    return 3\n")
    return run("run", f"{folder}/entry.py:calls", "--candidate", "sta")()


INPUT = Call(args=(torch.zeros(1, 2),))

CASES = {
    "calibration key": Case(
        CalibrationError,
        "this names no call of a model",
        "branch='both'",
        "one of positive, negative",
        'pass sample="0"',
        lambda: CallKey(branch="both"),
    ),
    "calibration site fields": Case(
        CalibrationError,
        "holds no measurement of an attention call",
        "fields path",
        "squared_error",
        "measure again",
        lambda: SiteErrors.from_dict({"path": ""}),
    ),
    "calibration site shape": Case(
        CalibrationError,
        "holds no measurement of an attention call",
        "cosine of another shape",
        "1 rows of 1 numbers",
        "measure again",
        lambda: SiteErrors.from_dict({**site().to_dict(), "cosine": []}),
    ),
    "calibration site number": Case(
        CalibrationError,
        "holds no measurement of an attention call",
        "densities ('a',)",
        "finite numbers of at least 0",
        "measure again",
        lambda: SiteErrors.from_dict({**site().to_dict(), "densities": ["a"]}),
    ),
    "calibration site layer": Case(
        CalibrationError,
        "holds no measurement of an attention call",
        "layer 3 of 2",
        "an index below the number",
        "measure again",
        lambda: SiteErrors.from_dict({**site().to_dict(), "layer": 3, "num_layers": 2}),
    ),
    "calibration site tiles": Case(
        CalibrationError,
        "holds no measurement of an attention call",
        "0 tiles",
        "1, one for each candidate",
        "measure again",
        lambda: SiteErrors.from_dict({**site().to_dict(), "tiles": []}),
    ),
    "calibration of other candidates": Case(
        CalibrationError,
        "these are measurements of other candidates",
        "2 candidates, figures of [1]",
        "figures of each candidate",
        "measure again",
        lambda: Measurements(candidates=(STA, VSA), calls={CallKey(): (site(),)}),
    ),
    "calibration file of something else": Case(
        CalibrationError,
        "not a compiled_sparse measurements that can be used",
        "a.json: KeyError: 'candidates'",
        "what save_measurements wrote",
        "or write it again",
        in_folder(load_an_empty_file),
    ),
    "calibration journal of something else": Case(
        CalibrationError,
        "not a journal that can be used",
        "journal, line 2: KeyError: 'sites'",
        "what a calibration wrote",
        "or write it again",
        in_folder(go_on_with_an_empty_entry),
    ),
    "calibration of nothing": Case(
        CalibrationError,
        "nothing was measured",
        "1 candidates, 0 calls",
        "at least one call with video attention",
        "compiled_sparse.explain",
        lambda: Measurements(candidates=(STA,), calls={}),
    ),
    "calibration of two models": Case(
        CalibrationError,
        "do not have the same layers",
        "1 attention calls in 1/positive/0, 2 in 0/positive/0",
        "the same module paths",
        "in a run of its own",
        lambda: Measurements(
            candidates=(STA,),
            calls={CallKey(step=0): (site("a"), site("b")), CallKey(step=1): (site("a"),)},
        ),
    ),
    "calibration of unequal layers": Case(
        CalibrationError,
        "layers have different numbers of heads",
        "heads [1, 2]",
        "the same number in every layer",
        "one by one",
        lambda: measured(site("a"), site("b", heads=2)),
    ),
    "calibration of infinity": Case(
        CalibrationError,
        "gives values that are not finite",
        "NaN or infinity at an attention call",
        "finite outputs of dense attention",
        "check its inputs",
        measure_infinity,
    ),
    "calibration without video": Case(
        CalibrationError,
        "nothing was measured in a call of the model",
        "no attention call over the video",
        "at least one",
        "compiled_sparse.explain(model",
        measure(INPUT),
    ),
    "calibration candidates": Case(
        CalibrationError,
        "these are no candidates",
        "()",
        "at least one mechanism, each once",
        "sta:window_thw=3x3x3",
        measure(INPUT, candidates=()),
    ),
    "calibration of no call": Case(
        CalibrationError,
        "this is no call of a model",
        "dict",
        "compiled_sparse.calibration.Call",
        "[Call(args=",
        lambda: calibration.measure(nn.Linear(2, 2), [{}], ["sta"]),  # type: ignore[list-item]
    ),
    "calibration rows": Case(
        CalibrationError,
        "rows is not a count",
        "0",
        "at least 1",
        "rows=256",
        measure(INPUT, rows=0),
    ),
    "calibration keys": Case(
        CalibrationError,
        "two calls have the same key",
        "0/positive/0",
        "another sample, branch or step",
        "key=CallKey(",
        lambda: _require_new(CallKey(), {CallKey()}),
    ),
    "calibration of a pipeline": Case(
        CalibrationError,
        "not known which call of a pipeline this is",
        "no step",
        "the step of each call",
        "callback_on_step_end=cs.step_callback()",
        record_without_a_step,
    ),
    "calibration gain": Case(
        CalibrationError,
        "cannot be as fast as that",
        "min_gain=100",
        "at most 8",
        "lower min_gain",
        lambda: calibration.fit(measured(site()), min_gain=100),
    ),
    "calibration target": Case(
        CalibrationError,
        "a policy is fitted to one target",
        "max_error=None, min_gain=None",
        "max_error of at least 0, or min_gain of at least 1",
        "max_error=0.1",
        lambda: calibration.fit(measured(site())),
    ),
    "calibration dense steps": Case(
        CalibrationError,
        "dense_first_steps is not a count",
        "-1",
        "at least 0",
        "dense_first_steps=0",
        lambda: calibration.fit(measured(site()), max_error=1, dense_first_steps=-1),
    ),
    "calibration paths": Case(
        CalibrationError,
        "told apart by their module path",
        "''",
        "each call in a module of its own",
        "windows of STA",
        lambda: calibration.fit(measured(site(""), candidate=VSA), max_error=1),
    ),
    "calibration palette": Case(
        CalibrationError,
        "cannot stand in one table",
        "tiles [(1, 1, 1), (2, 2, 2)]",
        "one tile, one grid",
        "one tile_thw",
        lambda: calibration.fit(measured(site("a"), site("b", tile=(1, 1, 1))), max_error=1),
    ),
    "captured nothing": Case(
        CalibrationError,
        "does not hold captured calls of a model",
        "no *.safetensors file",
        "files of layers 0, 1",
        "calibration.capture(directory",
        in_folder(lambda folder: calibration.measure_captured(folder, ["sta"])),
    ),
    "captured something else": Case(
        CalibrationError,
        "holds no captured attention call",
        "a.safetensors: SafetensorError",
        "tensors q, k and v",
        "capture it again",
        in_folder(measure_a_foreign_file),
    ),
    "captured another shape": Case(
        CalibrationError,
        "holds no captured attention call",
        "(1, 1, 7, 4), (1, 1, 7, 4), (1, 1, 7, 4) for grid (2, 2, 2)",
        "tensors q, k and v of one call",
        "capture it again",
        in_folder(measure_a_shorter_call),
    ),
    "captured twice": Case(
        CalibrationError,
        "holds no captured attention call",
        "layer 0 of 0/positive/0, as in a.safetensors",
        "once in a folder",
        "remove it from the folder",
        in_folder(measure_a_call_twice),
    ),
    "captured no call": Case(
        CalibrationError,
        "nothing was captured",
        "no self-attention over grid (2, 2, 2) and Text(before=0, after=0)",
        "of this length, in eager",
        "correct grid_thw and text",
        in_folder(capture_nothing),
    ),
    "captured without safetensors": Case(
        MissingExtraError,
        "captured attention needs the optional package 'safetensors'",
        "import safetensors failed",
        "safetensors installed",
        "compiled_sparse[calibrate]",
        in_folder(capture_without_safetensors),
    ),
    "captured misfit": Case(
        CalibrationError,
        "a candidate does not fit an attention call",
        "axes_mismatch",
        "candidates that fit every call",
        "leave this candidate out",
        lambda: measure_call(AttentionCall(q=ZEROS, k=ZEROS, v=ZEROS, grid_thw=(8,)), (STA,), 4),
    ),
    "search grids": Case(
        CalibrationError,
        "not counted in tiles of one size",
        "((4, 4, 4), (1, 1, 1))",
        "one grid and one tile",
        "one resolution at a time",
        lambda: search.full_window_of(measured(site("a"), site("b", tile=(1, 1, 1)))),
    ),
    "search steps": Case(
        CalibrationError,
        "a search needs every step",
        "steps [3] of '0'",
        "without a gap",
        "all denoising steps",
        lambda: search.mask_searches(measured(site(), step=3)),
    ),
    "search mechanisms": Case(
        CalibrationError,
        "compares windows of sliding tile attention",
        "vsa:",
        "STA with one window each",
        "tile_thw=6x8x8",
        lambda: search.mask_searches(measured(site(), candidate=VSA)),
    ),
    "calibrate no candidate": Case(
        CalibrationError,
        "there is nothing to measure",
        "no --candidate",
        "at least one",
        "--candidate sta",
        run("run", "model.py:calls"),
    ),
    "calibrate no window": Case(
        CalibrationError,
        "there is nothing to search",
        "no --window",
        "at least one",
        '--window "3,3,3"',
        run("search", "model.py:calls"),
    ),
    "calibrate two things": Case(
        CalibrationError,
        "a model or of captured calls",
        "--captured folder and a model",
        "one of them",
        "leave the other out",
        run("run", "--demo", "--captured", "folder"),
    ),
    "calibrate nothing": Case(
        CalibrationError,
        "a calibration is of one model",
        "none",
        "one of FILE.py:FUNCTION, --demo, --captured FOLDER",
        "--demo",
        run("run", "--candidate", "sta"),
    ),
    "calibrate no calls": Case(
        EntryError,
        "returned no model with its calls",
        "int",
        "(model, calls)",
        "[Call(kwargs=inputs)]",
        in_folder(run_entry),
    ),
}
