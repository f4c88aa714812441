"""From losses to windows: the window with the least loss for each head of each layer and step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compiled_sparse.calibration.mask_search import MaskSearch
from compiled_sparse.calibration.mask_search import average
from compiled_sparse.calibration.mask_search import read_mask_searches
from compiled_sparse.calibration.strategy import Strategy
from compiled_sparse.calibration.strategy import require_window
from compiled_sparse.calibration.tables import make_table
from compiled_sparse.calibration.tables import window_from_text
from compiled_sparse.config import is_count
from compiled_sparse.errors import CalibrationError
from compiled_sparse.windows import Window

DENSE_FIRST_STEPS = 12


def select_windows(
    average: MaskSearch,
    *,
    full_window: Window,
    dense_first_steps: int = DENSE_FIRST_STEPS,
    num_steps: int | None = None,
) -> Strategy:
    """Choose for each head the window with the least averaged L2 loss.

    Args:
        average: The losses, of one search or averaged. Of equal ones the first window wins.
        full_window: The window that is dense attention; never chosen for its loss.
        dense_first_steps: Steps at the beginning at which all heads have the full window.
        num_steps: Steps of the strategy, at most as many as there are losses for; None for all.

    Raises:
        CalibrationError: if there is no other window than the full one, or a number of steps or
            the full window is out of range.
    """
    full = require_window(full_window, "full_window")
    steps, layers, heads = average.shape
    num_steps = steps if num_steps is None else num_steps
    if not (is_count(num_steps) and num_steps <= steps and is_count(dense_first_steps, least=0)):
        raise CalibrationError(
            "number of steps is out of range",
            got=f"num_steps={num_steps}, dense_first_steps={dense_first_steps}",
            expected=f"num_steps from 1 to {steps}, for which {average.origin} has losses, and "
            "dense_first_steps of at least 0",
            next_step="leave num_steps out, or search at more steps",
        )
    losses = {window: table for window, table in average.l2_loss.items() if window != full}
    if not losses:
        raise CalibrationError(
            "no window to choose from",
            got=f"full_window {full}, and only that in {average.origin}",
            expected="losses of smaller windows",
            next_step="search with more candidates",
        )

    def choose(step: int, layer: int, head: int) -> Window:
        if step < dense_first_steps:
            return full
        return min(losses, key=lambda window: losses[window][step][layer][head])

    return Strategy(windows=make_table((num_steps, layers, heads), choose))


def tune(
    directory: str | Path,
    *,
    full_window: Window,
    candidates: Sequence[Window] | None = None,
    dense_first_steps: int = DENSE_FIRST_STEPS,
    num_steps: int | None = None,
    save_directory: str | Path | None = None,
) -> Strategy:
    """Choose windows by the average of all searches in a folder.

    Args:
        directory: The folder with the results, see `read_mask_searches`.
        full_window: The window that is dense attention.
        candidates: The windows to choose from, the first of equal ones first; None for all that
            were searched, in the order of the first file.
        dense_first_steps: Steps at the beginning at which all heads have the full window.
        num_steps: Steps of the strategy; None for as many as were searched.
        save_directory: A folder to write `mask_strategy_s<dense_first_steps>.json` to, which is
            made if it is not there; None writes nothing.

    Returns:
        The strategy.

    Raises:
        ConfigFormatError: if a file cannot be read.
        CalibrationError: if there are no results, they do not fit each other, or an argument is out
            of range.
    """
    found = average(read_mask_searches(directory))
    return _tune(found, full_window, candidates, dense_first_steps, num_steps, save_directory)


def tune_cfg(
    positive_directory: str | Path,
    negative_directory: str | Path,
    *,
    full_window: Window,
    candidates: Sequence[Window] | None = None,
    dense_first_steps: int = DENSE_FIRST_STEPS,
    num_steps: int | None = None,
    save_directory: str | Path | None = None,
) -> Strategy:
    """Choose windows where classifier-free guidance runs the model twice, for both runs alike.

    Each file of both folders has the same weight. The other arguments are those of `tune`.

    Args:
        positive_directory: The folder with the results of the runs with the prompt.
        negative_directory: The folder with those of the runs with the negative prompt.
        full_window: The window that is dense attention.
        candidates: The windows to choose from; None for all.
        dense_first_steps: Steps at the beginning at which all heads have the full window.
        num_steps: Steps of the strategy; None for as many as were searched.
        save_directory: A folder to write the strategy to; None writes nothing.

    Returns:
        The strategy.

    Raises:
        ConfigFormatError: if a file cannot be read.
        CalibrationError: if there are no results, they do not fit each other, or an argument is out
            of range.
    """
    both = (*read_mask_searches(positive_directory), *read_mask_searches(negative_directory))
    found = average(both)
    return _tune(found, full_window, candidates, dense_first_steps, num_steps, save_directory)


def parse_candidates(texts: Sequence[str]) -> tuple[Window, ...]:
    """Return the windows written like "3, 1, 10", in tiles.

    Raises:
        CalibrationError: if one is anything else or occurs twice, or there is none.
    """
    listed = [] if isinstance(texts, str) else list(texts)
    windows = [window_from_text(text) for text in listed]
    wrong = [text for i, text in enumerate(listed) if windows[i] in (None, *windows[:i])]
    if wrong or not listed:
        raise CalibrationError(
            "not a list of candidate windows",
            got=repr(wrong[0]) if wrong else repr(texts),
            expected='different windows of three positive integers, like "3, 1, 10"',
            next_step='pass ["3, 1, 10", "1, 5, 7"], for instance',
        )
    return tuple(window for window in windows if window is not None)


def _tune(
    found: MaskSearch,
    full_window: Window,
    candidates: Sequence[Window] | None,
    dense_first_steps: int,
    num_steps: int | None,
    save_directory: str | Path | None,
) -> Strategy:
    strategy = select_windows(
        found if candidates is None else found.only(candidates),
        full_window=full_window,
        dense_first_steps=dense_first_steps,
        num_steps=num_steps,
    )
    if save_directory is not None:
        strategy.save(Path(save_directory) / f"mask_strategy_s{dense_first_steps}.json")
    return strategy
