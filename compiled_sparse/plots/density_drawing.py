"""The densities of a policy as a heat map of layers by steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING
from typing import Any

from compiled_sparse.plots.drawing import new_figure
from compiled_sparse.plots.drawing import whole_numbers
from compiled_sparse.plots.words import tokens_on

if TYPE_CHECKING:
    from compiled_sparse.policy_density import PolicyDensity

_MAX_NUMBERED = (12, 20)  # layers and steps
_MAX_NAME = 80
_LIGHT = 0.5  # densities above it have a light cell


def draw_density(table: PolicyDensity) -> Any:
    """Return a figure of the densities of a policy.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    figure = new_figure()
    axes = figure.subplots()
    image = axes.imshow(
        table.densities,
        cmap="cividis",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        aspect="auto",
    )
    axes.set(xlabel="denoising step", ylabel="layer")
    whole_numbers(axes.xaxis, axes.yaxis)
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_label("density: share of (query, key) pairs attended to; 1 is dense", fontsize=8)
    if all(map(int.__le__, (table.num_layers, table.num_steps), _MAX_NUMBERED)):
        _write_numbers(axes, table)
    figure.suptitle(density_title(table), fontsize=11)
    return figure


def density_title(table: PolicyDensity) -> str:
    """Return the title of the picture."""
    name = table.policy
    name = name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 3]}..."
    heads = f", mean over {table.heads} heads" if table.heads > 1 else ""
    return (
        f"Density of {name} by layer and step{heads}\n"
        f"Grid {tokens_on(table.grid_thw, table.text)}: mean density {table.mean:.3f}"
    )


def _write_numbers(axes: Any, table: PolicyDensity) -> None:
    for layer, row in enumerate(table.densities):
        for step, density in enumerate(row):
            axes.text(
                step,
                layer,
                "1" if math.isclose(density, 1.0) else f"{density:.2f}",
                fontsize=7,
                color="black" if density > _LIGHT else "white",
                ha="center",
                va="center",
            )
