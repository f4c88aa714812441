"""Pictures as files: the suffix says the format, and equal pictures are equal bytes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from compiled_sparse.errors import ConfigError

_DPI = 110
_DIGITS = 6  # of the places of axes, relative to the figure
# Formats, and what is left out of a file: the time at which it was written.
_METADATA: dict[str, dict[str, None]] = {
    ".png": {},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}


def picture_path(path: str | Path) -> Path:
    """Return the absolute path of a picture.

    Raises:
        ConfigError: if its suffix is no format of a picture.
    """
    target = Path(path).expanduser().resolve()
    if target.suffix.lower() not in _METADATA:
        raise ConfigError(
            "the suffix of a picture's path is no known format",
            got=str(path),
            expected="a path that ends in " + ", ".join(_METADATA),
            next_step="write picture.png, for instance",
        )
    return target


def write_picture(figure: Any, target: Path) -> Path:
    """Write a figure to a path of `picture_path`, whose folder is made if it is not there.

    Returns:
        The path.

    Raises:
        ConfigError: if it cannot be written.
    """
    content = picture_bytes(figure, target.suffix.lower())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    except OSError as error:
        raise ConfigError(
            "the picture cannot be written",
            got=f"{target}: {error.strerror}",
            expected="a path in a folder that may be written to",
            next_step="choose another path",
        ) from None
    return target


def picture_bytes(figure: Any, suffix: str = ".png") -> bytes:
    """Return what a file of a figure holds; the same figure gives the same bytes."""
    import matplotlib

    _settle(figure)
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "compiled_sparse"}):
        figure.savefig(stream, dpi=_DPI, format=suffix[1:], metadata=_METADATA[suffix])
    return stream.getvalue()


def _settle(figure: Any) -> None:
    """Lay a figure out for good: the layout's solver does not always round the same way."""
    from matplotlib.transforms import Bbox

    figure.set_dpi(_DPI)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        place = axes.get_position(original=True)
        axes.set_position(Bbox(place.get_points().round(_DIGITS)))
