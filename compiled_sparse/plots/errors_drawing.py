"""Measured errors as a picture: against density on the left, layer by layer on the right."""

from __future__ import annotations

from typing import TYPE_CHECKING
from typing import Any

from compiled_sparse.plots.drawing import MASK
from compiled_sparse.plots.drawing import SPLIT
from compiled_sparse.plots.drawing import new_figure
from compiled_sparse.plots.drawing import whole_numbers
from compiled_sparse.registry import KERNEL_EFFICIENCY

if TYPE_CHECKING:
    from compiled_sparse.calibration.by_density import ErrorsByDensity

_GAINS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
_MAX_NAMED = 12
_MAX_LABELLED_GAINS = 6
_INK = "#212529"
_DENSEST = 0.9  # the part of the colour map that is seen on white


def draw_errors(errors: ErrorsByDensity) -> Any:
    """Return a figure of measured errors.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    figure = new_figure()
    colours = _colours(errors)
    # Not subfigures: the legend below is of both.
    left, right = figure.subplots(1, 2, width_ratios=SPLIT)
    _draw_candidates(left, errors, colours)
    _draw_layers(right, errors, colours)
    handles = right.get_legend_handles_labels()
    if len(errors.candidates) <= _MAX_NAMED:
        columns = 2 if max(map(len, handles[1])) > 40 else 3
        style = {"ncols": columns, "fontsize": 7, "frameon": False}
        figure.legend(*handles, loc="outside lower center", **style)
    figure.suptitle(_title(errors), fontsize=11)
    return figure


def _title(errors: ErrorsByDensity) -> str:
    counts = (
        (errors.num_steps, "step"),
        (len(errors.layers), "layer"),
        (errors.num_heads, "head"),
    )
    over = ", ".join(f"{number} {unit}{'s' * (number > 1)}" for number, unit in counts)
    return f"Relative L2 error of attention, measured; root mean square over {over}"


def _colours(errors: ErrorsByDensity) -> list[Any]:
    """One colour per candidate, by rank of density: the darker the sparser."""
    from matplotlib import colormaps

    order = sorted(range(len(errors.candidates)), key=lambda i: errors.candidates[i].density)
    last = max(1, len(order) - 1)
    return [colormaps["viridis"](_DENSEST * order.index(i) / last) for i in range(len(order))]


def _draw_candidates(axes: Any, errors: ErrorsByDensity, colours: list[Any]) -> None:
    if errors.curve:
        densities = [KERNEL_EFFICIENCY / gain for gain, _ in errors.curve]
        label = "policies fitted to these measurements,\nplaced by predicted gain"
        values = [error for _, error in errors.curve]
        axes.plot(densities, values, color=MASK, linewidth=1.2, label=label, zorder=1)
    for number, (each, colour) in enumerate(zip(errors.candidates, colours, strict=True), 1):
        axes.scatter(each.density, each.relative_error, color=colour, s=36, zorder=2)
        # Neighbours in the list are often neighbours here: one to the right, one to the left.
        offset = (5, 4) if number % 2 else (-10, -9)
        _write_number(axes, number, (each.density, each.relative_error), offset)
    axes.set(xlabel="density", ylabel="relative error", xlim=(0, 1.02))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3, linewidth=0.5)
    if errors.curve:
        axes.legend(loc="upper right", fontsize=8, frameon=False)
    else:
        axes.set_title(f"No fitted curve: {errors.no_curve}", fontsize=8)
        return
    _add_gains(axes, max(gain for gain, _ in errors.curve))


def _add_gains(axes: Any, largest: float) -> None:
    top = axes.secondary_xaxis("top")
    gains = [gain for gain in _GAINS if gain <= max(2.0, largest)]
    gains = gains[:: -(-len(gains) // _MAX_LABELLED_GAINS)]
    top.set_xticks([KERNEL_EFFICIENCY / gain for gain in gains], [f"{gain:g}x" for gain in gains])
    top.tick_params(labelsize=8)
    top.set_xlabel(f"predicted gain of attention, {KERNEL_EFFICIENCY} / density", fontsize=8)


def _draw_layers(axes: Any, errors: ErrorsByDensity, colours: list[Any]) -> None:
    for number, (each, colour) in enumerate(zip(errors.candidates, colours, strict=True), 1):
        label = f"{number}  {each.spec}, density {each.density:.3f}"
        style = {"color": colour, "marker": "o", "markersize": 3, "linewidth": 1.2}
        axes.plot(range(len(each.by_layer)), each.by_layer, label=label, **style)
        offset = (6 if number % 2 else 16, -3)
        _write_number(axes, number, (len(each.by_layer) - 1, each.by_layer[-1]), offset)
    axes.set_title("By layer: the higher, the more sensitive", fontsize=9)
    axes.set(xlabel="layer", ylabel="relative error")
    axes.margins(x=0.06)
    axes.set_ylim(bottom=0)
    whole_numbers(axes.xaxis)
    axes.grid(alpha=0.3, linewidth=0.5)


def _write_number(
    axes: Any, number: int, place: tuple[float, float], offset: tuple[int, int]
) -> None:
    style = {"textcoords": "offset points", "fontsize": 8, "color": _INK}
    axes.annotate(f"{number}", place, xytext=offset, **style)
