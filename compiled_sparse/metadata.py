"""Call-time metadata: what the graph alone cannot know.

`metadata` is a re-entrant context manager; each thread (and each asyncio task) sees its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from compiled_sparse.errors import LayoutError
from compiled_sparse.layout import Text
from compiled_sparse.layout import check_extents


@dataclass(frozen=True, slots=True)
class LayoutMetadata:
    """The static part: integers that select a compiled variant.

    Args:
        grid_thw: Token grid after patching, slowest axis first.
        text: Text tokens around the video tokens.
    """

    grid_thw: tuple[int, ...]
    text: Text = Text()

    @property
    def num_tokens(self) -> int:
        """Length of a sequence with this layout."""
        total = self.text.before + self.text.after
        video = 1
        for extent in self.grid_thw:
            video *= extent
        return total + video


_current: ContextVar[LayoutMetadata | None] = ContextVar("compiled_sparse_metadata", default=None)


def current_layout() -> LayoutMetadata | None:
    """Return the layout given by the innermost `metadata` block of this thread, or None."""
    return _current.get()


@contextmanager
def metadata(
    *, grid_thw: tuple[int, ...] | None = None, text: Text | None = None
) -> Iterator[None]:
    """Say how the tokens of the calls inside the block are laid out.

    What is not given is inherited from the enclosing block. A model that was compiled under another
    layout compiles a variant of its own; nothing is reused across layouts.

    Args:
        grid_thw: Token grid after patching, (T, H, W) for video, (H, W) for images.
        text: Text tokens around the video tokens of joint attention.

    Raises:
        LayoutError: if the grid is not one to three positive integers, or text comes without one.
    """
    outer = _current.get()
    if grid_thw is None and outer is not None:
        grid_thw = outer.grid_thw
    if text is None:
        text = outer.text if outer is not None else Text()
    if grid_thw is None:
        raise LayoutError(
            "metadata without a grid",
            got="grid_thw=None and no enclosing metadata block",
            expected="the token grid of the video",
            next_step="pass grid_thw=(T, H, W), counted in tokens after patching",
        )
    grid_thw = tuple(grid_thw)
    check_extents("grid_thw", grid_thw)
    token = _current.set(LayoutMetadata(grid_thw, text))
    try:
        yield
    finally:
        _current.reset(token)
