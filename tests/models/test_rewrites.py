"""Each model compiled: outcomes as expected, no wrong layout, values of the reference."""

from __future__ import annotations

import functools

import harness
import pytest
from builders import BUILDERS
from measure import Measured
from measure import Row
from measure import measure

pytestmark = pytest.mark.usefixtures("fresh_compiler")

FAST = ("wan", "cogvideox 5b", "ltx")
SLOW = (
    "hunyuan video",
    "flux",
    "wan vace",
    "wan animate",
    "skyreels v2",
    "chronoedit",
    "hunyuan video framepack",
    "hunyuan video image, token replace",
    "hunyuan video 1.5",
    "cogvideox 1.5",
    "mochi",
    "allegro",
    "easyanimate",
    "sd3",
    "qwen image",
)

_UNKNOWN = "layout_unknown"
_MASK = "mask_unsupported"

# What each kind of call becomes, and below where it is something else, for each kind or call.
OUTCOMES = {
    "video": "sparse",
    "cross": "cross_attention",
    "text": "not_video",
    "partial": "partial_grid",
}
EXCEPTIONS: dict[str, dict[str, str] | list[str]] = {
    # Only the processor of the prompt's pooling is compiled: the rest loops over the batch.
    "mochi": ["cross_attention"],
    # Both blocks share one graph, which does not see the patch embedding.
    "hunyuan video 1.5": ["not_video", _UNKNOWN],
    "hunyuan video framepack": {"video": _UNKNOWN},
    # Packed tokens and a list of positions: nothing in the graph shows the grid.
    "flux": {"video": _UNKNOWN},
    "flux 2": {"video": _UNKNOWN},
    "flux 3": {"video": _UNKNOWN, "text": _UNKNOWN},
    "chroma": {"video": _UNKNOWN},
    "ltx coordinates": {"video": _UNKNOWN},
    # Sound is one more sequence of packed tokens, and what it is made of is not known.
    "ltx 2": {"text": _UNKNOWN},
    # A mask of zeros and ones that is added to the scores hides nothing.
    "cogview 4": {"video": _MASK},
    # Causal from frame to frame.
    "skyreels v2 causal": {"video": _MASK},
}


def _marks(name: str) -> list[pytest.MarkDecorator]:
    """A model is measured once for all its tests, where one worker runs them."""
    group = pytest.mark.xdist_group(f"rewrites of {name}")
    return [group] if name in FAST else [group, pytest.mark.slow]


models = pytest.mark.parametrize("name", [pytest.param(n, marks=_marks(n)) for n in BUILDERS])
EXPLAINED = (
    *FAST,
    *SLOW,
    "wan image",
    "wan timesteps",
    "skyreels v2 causal",
    "hunyuan video image, channels",
    "cogvideox 2b",
    "consisid",
    "ltx coordinates",
    "ltx 2",
    "latte",
    "cosmos",
    "sana video",
    "motif video",
    "kandinsky 5",
    "joyimage edit",
    "helios",
    "anyflow",
    "flux 2",
    "flux 3",
    "chroma",
    "pixart",
    "auraflow",
    "dit",
    "sana",
    "cogview 3+",
    "cogview 4",
    "ernie image",
    "prx",
    "nucleus image",
)


@functools.cache
def _row(name: str) -> Row:
    return measure(BUILDERS[name])


def _ways(name: str) -> tuple[Measured, ...]:
    return _row(name).ways


def _expected(name: str) -> list[str]:
    exceptions = EXCEPTIONS.get(name, {})
    if isinstance(exceptions, list):
        return exceptions
    outcomes = {**OUTCOMES, **exceptions}
    return [outcomes[truth.kind] for truth in harness.truths(BUILDERS[name])]


@pytest.mark.parametrize("name", [pytest.param(n, marks=_marks(n)) for n in EXPLAINED])
def test_every_attention_call_is_explained(name: str) -> None:
    assert list(_ways(name)[0].outcomes) == _expected(name)


@models
def test_no_layout_is_wrong_and_the_narrowest_window_gives_what_the_reference_gives(
    name: str,
) -> None:
    for way in _ways(name):
        assert not way.wrong, way.way
        assert way.narrow_error < way.tolerance, way.way


@models
def test_a_window_over_the_whole_grid_gives_what_dense_attention_gives(name: str) -> None:
    for way in _ways(name):
        assert way.exact_error < way.tolerance, way.way


@models
def test_no_graph_break_is_added(name: str) -> None:
    for way in _ways(name):
        assert way.graphs == way.dense_graphs, way.way
