"""Results of a mask search: what each window costs each head at each step, and their average."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

from compiled_sparse.calibration.documents import read_published
from compiled_sparse.calibration.documents import refusal
from compiled_sparse.calibration.files import write_atomically
from compiled_sparse.calibration.tables import Place
from compiled_sparse.calibration.tables import Table
from compiled_sparse.calibration.tables import as_table
from compiled_sparse.calibration.tables import as_window
from compiled_sparse.calibration.tables import items
from compiled_sparse.calibration.tables import shape_of
from compiled_sparse.calibration.tables import window_from_text
from compiled_sparse.config import read_text
from compiled_sparse.errors import CalibrationError
from compiled_sparse.windows import Window

Losses = Mapping[Window, Table[float]]

_WHAT = "mask search"
_NORMS = ("L2_loss", "L1_loss")
_PROMPT_CHARACTERS = 50
_HASH_CHARACTERS = 12


@dataclass(frozen=True, kw_only=True)
class MaskSearch:
    """How far each candidate window takes the output of each head from full attention's.

    Args:
        l2_loss: Mean squared differences by window, in tiles, each nested
            `[steps][layers][heads]`. Of two equal losses the window that stands first here counts
            as the smaller.
        l1_loss: Mean absolute differences of the same windows.
        origin: Where they are from, for errors.

    Raises:
        CalibrationError: if a window is not made of three positive integers, a loss is not a finite
            number of at least 0, or windows or sizes differ.
    """

    l2_loss: Losses
    l1_loss: Losses
    origin: str = field(default="a search of no file", compare=False)

    def __post_init__(self) -> None:
        l2, l1 = (
            _checked(losses, norm, self.origin)
            for losses, norm in zip((self.l2_loss, self.l1_loss), _NORMS, strict=True)
        )
        if l1.keys() != l2.keys():
            raise refusal(
                self.origin,
                _WHAT,
                f"windows {sorted(l2.keys() ^ l1.keys())} in one of L2_loss and L1_loss only",
                "the same windows in both",
            )
        shapes = {shape_of(table): window for each in (l1, l2) for window, table in each.items()}
        if len(shapes) > 1:
            shown = ", ".join(f"{shape} of {window}" for shape, window in shapes.items())
            raise refusal(
                self.origin, _WHAT, f"sizes {shown}", "one number of steps, layers and heads"
            )
        object.__setattr__(self, "l2_loss", l2)
        object.__setattr__(self, "l1_loss", {window: l1[window] for window in l2})

    @property
    def candidates(self) -> tuple[Window, ...]:
        """The windows, in order."""
        return tuple(self.l2_loss)

    @property
    def shape(self) -> Place:
        """How many steps, layers and heads there are."""
        return shape_of(next(iter(self.l2_loss.values())))

    def only(self, candidates: Iterable[Window]) -> MaskSearch:
        """Return the losses of some of the windows, in the order given.

        Raises:
            CalibrationError: if one was not searched.
        """
        chosen = [tuple(window) for window in candidates]
        missing = [window for window in chosen if window not in self.l2_loss]
        if missing:
            raise CalibrationError(
                "candidate was not searched",
                got=f"{missing[0]} for {self.origin}",
                expected="windows among " + ", ".join(map(str, self.candidates)),
                next_step="leave it out, or search again with it",
            )
        l2, l1 = ({w: each[w] for w in chosen} for each in (self.l2_loss, self.l1_loss))
        return MaskSearch(l2_loss=l2, l1_loss=l1, origin=self.origin)

    @classmethod
    def from_published(cls, source: str | Path | Mapping[str, Any]) -> MaskSearch:
        """Read a result of the published form.

        Args:
            source: The path of the file, or what is in it: `{"L2_loss": {"[3, 1, 10]":
                [steps][layers][heads]}, "L1_loss": ...}`.

        Raises:
            ConfigFormatError: if the file cannot be read.
            CalibrationError: if it is not of that form; names the file and the reason.
        """
        document, origin = read_published(source, _WHAT)
        if document.keys() != set(_NORMS):
            shown = ", ".join(map(str, document)) or "nothing"
            raise refusal(origin, _WHAT, f"an object of {shown}", "L2_loss and L1_loss")
        l2, l1 = (_with_windows(document[norm], norm, origin) for norm in _NORMS)
        return cls(l2_loss=l2, l1_loss=l1, origin=origin)

    def to_published(self) -> dict[str, dict[str, Table[float]]]:
        """Return the losses in the published form, as JSON values."""
        both = zip(_NORMS, (self.l2_loss, self.l1_loss), strict=True)
        return {
            norm: {str(list(window)): table for window, table in losses.items()}
            for norm, losses in both
        }

    def save(self, directory: str | Path, prompt: str, *, overwrite: bool = False) -> Path:
        """Write the losses in the published form, where `read_mask_searches` finds them.

        Args:
            directory: The folder; it is made if it is not there.
            prompt: What was generated while searching. Its first 50 characters and a hash of the
                whole are in the file's name.
            overwrite: Whether to replace other losses of the same prompt.

        Returns:
            The path of the file.

        Raises:
            ConfigFormatError: if what is there cannot be read.
            CalibrationError: if there are other losses of the prompt, or it cannot be written.
        """
        path = Path(directory) / f"mask_search_{name_of_prompt(prompt)}.json"
        text = json.dumps(self.to_published())
        if path.exists() and not overwrite:
            if read_text(path, _WHAT, "that holds losses") == text:
                return path
            raise CalibrationError(
                "there are other losses of the same prompt",
                got=str(path),
                expected="one search for each prompt in a folder",
                next_step="pass overwrite=True to replace them, or another directory",
            )
        write_atomically(path, text, make_folders=True)
        return path


def read_mask_searches(directory: str | Path) -> tuple[MaskSearch, ...]:
    """Read the results of the published form that lie directly in a folder.

    These are the files whose name contains "mask" and ends with ".json", sorted by name. A file
    `mask_strategy*.json` holds chosen windows and no losses, and is left out.

    Raises:
        ConfigFormatError: if one of them cannot be read.
        CalibrationError: if the folder cannot be read or holds none, or one is not of that form.
    """
    folder = Path(directory)
    paths = sorted(filter(_is_search, folder.iterdir())) if folder.is_dir() else []
    if not paths:
        raise CalibrationError(
            "no results of a mask search",
            got=f"{folder}: " + ("no such file in it" if folder.is_dir() else "not a folder"),
            expected='files directly in it that contain "mask" and end with ".json", and are not '
            "strategies (mask_strategy*.json)",
            next_step="pass the folder that MaskSearch.save wrote to",
        )
    return tuple(map(MaskSearch.from_published, paths))


def average(searches: Sequence[MaskSearch]) -> MaskSearch:
    """Return the arithmetic mean of the losses of each window, each search with equal weight.

    The windows are in the order of the first search.

    Raises:
        CalibrationError: if there is none, or windows or sizes differ; names the one that does.
    """
    if not searches:
        raise CalibrationError(
            "nothing to average",
            got="no searches",
            expected="one search or more",
            next_step="read them with read_mask_searches",
        )
    first = searches[0]
    for search in searches[1:]:
        if set(search.candidates) != set(first.candidates) or search.shape != first.shape:
            raise CalibrationError(
                "searches do not fit each other",
                got=f"{search.origin}: {_described(search)}",
                expected=f"{_described(first)}, as {first.origin} has",
                next_step="average searches of one model with the same candidates and steps",
            )
    return MaskSearch(
        l2_loss={w: _mean([each.l2_loss[w] for each in searches]) for w in first.candidates},
        l1_loss={w: _mean([each.l1_loss[w] for each in searches]) for w in first.candidates},
        origin=f"the average of {len(searches)}, the first of which is {first.origin}",
    )


def _mean(tables: Sequence[Table[float]]) -> Table[float]:
    # Exact sums: the order of the files decides no tie.
    return tuple(
        tuple(
            tuple(math.fsum(values) / len(tables) for values in zip(*rows, strict=True))
            for rows in zip(*layers, strict=True)
        )
        for layers in zip(*tables, strict=True)
    )


def _described(search: MaskSearch) -> str:
    steps, layers, heads = search.shape
    windows = ", ".join(map(str, sorted(search.candidates)))
    return f"windows {windows} for {steps} steps x {layers} layers x {heads} heads"


def _checked(losses: Any, norm: str, origin: str) -> dict[Window, Table[float]]:
    """Return losses as tuples by window, once it is sure that they are losses."""
    if not isinstance(losses, Mapping) or not losses:
        raise refusal(origin, _WHAT, f"{norm} has no windows", "losses by window")
    checked: dict[Window, Table[float]] = {}
    for key, value in losses.items():
        window, table = as_window(key), as_table(value)
        if window is None or table is None:
            reason = f"{norm} of {key!r} is no table of a window"
            raise refusal(origin, _WHAT, reason, "full lists [steps][layers][heads]")
        for place, loss in items(table):
            if not _is_loss(loss):
                shown = "step {}, layer {}, head {}".format(*place)
                reason = f"{norm} of {list(window)} at {shown} is {loss!r}"
                raise refusal(origin, _WHAT, reason, "finite numbers of at least 0")
        checked[window] = table
    return checked


def _is_loss(value: Any) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and 0 <= value < math.inf


def _with_windows(losses: Any, norm: str, origin: str) -> dict[Window, Any]:
    """Return losses by window instead of by its text."""
    found: dict[Window, Any] = {}
    for text, table in losses.items() if isinstance(losses, Mapping) else ():
        bare = text[1:-1] if text[:1] + text[-1:] == "[]" else ""
        window = window_from_text(bare)
        if window is None or window in found:
            reason = f"{norm} has the key {text!r}" + (window is not None) * " for a second time"
            raise refusal(origin, _WHAT, reason, 'each window once, like "[3, 1, 10]"')
        found[window] = table
    return found


def _is_search(path: Path) -> bool:
    is_named_so = "mask" in path.name and path.name.endswith(".json")
    return is_named_so and not path.name.startswith("mask_strategy") and path.is_file()


def name_of_prompt(prompt: str) -> str:
    """Return what stands for a prompt in names of files: its beginning, and a hash of the whole."""
    beginning = re.sub(r"[^0-9A-Za-z_-]", "_", prompt[:_PROMPT_CHARACTERS])
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{beginning}_{digest[:_HASH_CHARACTERS]}"
