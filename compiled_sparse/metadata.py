"""Call-time metadata: what the graph alone cannot know.

`metadata` is a re-entrant context manager; each thread (and each asyncio task) sees its own.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from compiled_sparse.errors import LayoutError
from compiled_sparse.errors import MetadataError
from compiled_sparse.layout import Text
from compiled_sparse.layout import as_grid
from compiled_sparse.layout import check_text
from compiled_sparse.sharding import SequenceGroup
from compiled_sparse.sharding import sequence_group

logger = logging.getLogger("compiled_sparse")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_fraction(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value < 1  # type: ignore[operator]


def check_index(name: str, value: object) -> None:
    """Check that the index of a step or a layer is a count, or None.

    Raises:
        MetadataError: if it is not.
    """
    _require(name, value, _is_count(value), "an integer of at least 0")


def _require(name: str, value: object, valid: bool, expected: str) -> None:
    if value is None or valid:
        return
    raise MetadataError(
        f"{name} is out of range",
        got=repr(value),
        expected=expected,
        next_step=f"pass {name} as {expected}, or leave it out",
    )


@dataclass(frozen=True, slots=True)
class LayoutMetadata:
    """The static part: integers that select a compiled variant.

    Args:
        grid_thw: Token grid after patching, slowest axis first.
        text: Text tokens around the video tokens; None where nobody said, so that only the graph
            can tell where the video is in a longer sequence.
        group: The processes that the video's tokens are divided among; None where each call has
            them all.
    """

    grid_thw: tuple[int, ...]
    text: Text | None = None
    group: SequenceGroup | None = None

    @property
    def num_video_tokens(self) -> int:
        """Tokens on the grid."""
        video = 1
        for extent in self.grid_thw:
            video *= extent
        return video

    @property
    def num_tokens(self) -> int:
        """Length of a sequence with this layout; text nobody mentioned is not counted."""
        text = self.text or Text()
        return text.before + self.num_video_tokens + text.after


@dataclass(frozen=True, slots=True)
class CallMetadata:
    """The part that changes from call to call and never compiles anything again.

    Args:
        step: Index of the denoising step, from 0; None where nobody said.
        num_steps: Number of denoising steps.
        sparsity: Fraction of the work to leave out, for mechanisms that read it at run time.

    Raises:
        MetadataError: if a value is out of range, or the step is not one of the steps.
    """

    step: int | None = None
    num_steps: int | None = None
    sparsity: float | None = None

    def __post_init__(self) -> None:
        check_index("step", self.step)
        positive = _is_count(self.num_steps) and self.num_steps != 0
        _require("num_steps", self.num_steps, positive, "an integer of at least 1")
        _require("sparsity", self.sparsity, _is_fraction(self.sparsity), "a number in [0, 1)")
        if self.step is None or self.num_steps is None or self.step < self.num_steps:
            return
        raise MetadataError(
            "the step is not one of the steps",
            got=f"step={self.step}, num_steps={self.num_steps}",
            expected="step < num_steps; the first step is 0",
            next_step="count steps from 0, or correct num_steps",
        )


@dataclass(frozen=True, slots=True)
class State:
    """All that is said about the calls made now.

    Args:
        layout: The static part, or None where nobody said.
        call: The part that changes from call to call.
    """

    layout: LayoutMetadata | None = None
    call: CallMetadata = CallMetadata()

    def __str__(self) -> str:
        """Return what is said, in words."""
        given = dataclasses.asdict(self.call).items()
        grid = None if self.layout is None else self.layout.grid_thw
        return ", ".join([f"grid {grid}", *(f"{k} {v}" for k, v in given if v is not None)])


_NOTHING = State()
_current: ContextVar[State] = ContextVar("compiled_sparse_metadata", default=_NOTHING)


def current_layout() -> LayoutMetadata | None:
    """Return the layout given by the innermost `metadata` block of this thread, or None."""
    return _current.get().layout


def current_call() -> CallMetadata:
    """Return step, number of steps and sparsity as this thread's blocks give them."""
    return _current.get().call


def current_state() -> State:
    """Return all of it."""
    return _current.get()


@contextmanager
def restored(state: State) -> Iterator[None]:
    """Hold what was said at another time.

    Args:
        state: What `current_state` returned then.
    """
    token = _current.set(state)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def metadata(
    *,
    grid_thw: tuple[int, ...] | None = None,
    text: Text | None = None,
    step: int | None = None,
    num_steps: int | None = None,
    sparsity: float | None = None,
    mesh: Any = None,
) -> Iterator[None]:
    """Say what the calls inside the block are about.

    What is not given is inherited from the enclosing block. A model that was compiled under another
    layout compiles a variant of its own; nothing is reused across layouts. Step and sparsity never
    compile anything.

    Args:
        grid_thw: Token grid after patching, (T, H, W) for video, (H, W) for images.
        text: Text tokens around the video tokens of joint attention; left out, they are looked for
            in the graph.
        step: Index of the denoising step, from 0.
        num_steps: Number of denoising steps.
        sparsity: Fraction of the work to leave out, for mechanisms that read it at run time.
        mesh: `DeviceMesh` with one dimension longer than 1, or `ProcessGroup`, of the processes
            that the video's tokens are divided among: each holds a run of them in raster order, in
            rank order, as long on every rank (what is too much at the end is padding), and all of
            the text. Heads are divided for the calls (Ulysses); with a dimension called "ring",
            keys go round instead.

    Raises:
        LayoutError: if the grid is not one to three positive integers, or text or mesh come without
            one.
        MetadataError: if step, number of steps or sparsity are out of range.
        DistributedError: if several dimensions of the mesh are longer than 1, or it names no
            processes.
    """
    outer = _current.get()
    layout = _layout(outer.layout, grid_thw, text, mesh)
    given = {"step": step, "num_steps": num_steps, "sparsity": sparsity}
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    token = _current.set(State(layout, dataclasses.replace(outer.call, **changed)))
    try:
        yield
    finally:
        _current.reset(token)


def step_callback(
    num_steps: int | None = None, *, sparsity: Callable[[int], float | None] | None = None
) -> Callable[[Any, int, Any, Any], Any]:
    """Return a function that tells this package the step a diffusers pipeline is at.

    Pass it as `pipe(..., callback_on_step_end=cs.step_callback())`. Making it sets step 0 for the
    calls that follow in this thread; after step i it sets i + 1, after the last one 0 again. After
    a run that was broken off, make a new one: the pipeline is met only after its first step.

    Args:
        num_steps: Number of denoising steps, for the first step: after it `num_timesteps` of the
            pipeline holds where there is one. A warning says if they differ.
        sparsity: From a step to the sparsity it runs at, as for `metadata`; left out, nothing is
            said of it.

    Returns:
        A callable for `callback_on_step_end`; it returns the keyword arguments it was given.

    Raises:
        MetadataError: if `num_steps` is not a positive integer, or a sparsity is out of range.
    """
    _set_step(0, num_steps, sparsity)
    has_warned = False

    def after_step(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        nonlocal has_warned
        said = getattr(pipe, "num_timesteps", None)
        total = said if _is_count(said) and said else num_steps
        if not has_warned and num_steps not in (None, total):
            has_warned = True
            logger.warning(
                "cs.step_callback(%d) is in a pipeline of %d steps, which holds from now on; leave "
                "num_steps out, or correct it",
                num_steps,
                total,
            )
        is_last = total is not None and step + 1 >= total
        _set_step(0 if is_last else step + 1, total, sparsity)
        return kwargs

    return after_step


def _set_step(
    step: int, num_steps: int | None, sparsity: Callable[[int], float | None] | None
) -> None:
    state = _current.get()
    call = dataclasses.replace(state.call, step=step, num_steps=num_steps)
    if sparsity is not None:
        call = dataclasses.replace(call, sparsity=sparsity(step))
    _current.set(dataclasses.replace(state, call=call))


def _layout(
    outer: LayoutMetadata | None, grid_thw: tuple[int, ...] | None, text: Text | None, mesh: Any
) -> LayoutMetadata | None:
    if grid_thw is None and text is None and mesh is None:
        return outer
    group = None if mesh is None else sequence_group(mesh)
    if outer is not None:
        grid_thw = outer.grid_thw if grid_thw is None else grid_thw
        text = outer.text if text is None else text
        group = outer.group if group is None else group
    if grid_thw is None:
        given = f"{text}" if mesh is None else f"{text}, a mesh"
        raise LayoutError(
            "metadata without a grid",
            got=f"grid_thw=None, {given} and no enclosing block with a grid",
            expected="the token grid of the video",
            next_step="pass grid_thw=(T, H, W), counted in tokens after patching",
        )
    check_text(text)
    return LayoutMetadata(as_grid(grid_thw), text, group)
