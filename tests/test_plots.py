"""Pictures of patterns show what the reference computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from messages import Case
from messages import assert_wording
from messages import raise_statements
from messages import raised_at

import compiled_sparse as cs
from compiled_sparse import errors
from compiled_sparse import plots
from compiled_sparse.ops.plan import block_tokens
from compiled_sparse.plots import plot_pattern
from compiled_sparse.reference.attention import token_mask

LAYOUTS = {
    "video, no tile divides it": (cs.STA(window_thw=(1, 3, 3), tile_thw=(2, 3, 4)), (3, 7, 10)),
    "window per head": (
        cs.STA(window_thw=((1, 1, 1), (3, 1, 3)), tile_thw=(2, 2, 2)),
        (7, 5, 8),
    ),
    "image": (cs.STA(window_thw=(3, 1), tile_thw=(4, 4)), (18, 11)),
    "sequence": (cs.STA(window_thw=(3,), tile_thw=(7,)), (50,)),
}


@pytest.mark.parametrize("text", [cs.Text(), cs.Text(before=9, after=30)], ids=["", "text"])
@pytest.mark.parametrize(("config", "grid"), LAYOUTS.values(), ids=LAYOUTS)
def test_the_drawn_mask_and_frames_are_those_of_the_reference(
    config: cs.STA, grid: tuple[int, ...], text: cs.Text
) -> None:
    head = len(config.windows) - 1
    pattern = plots._pattern(config, grid, text, None, head)
    length = pattern.layout.num_tokens
    mask = token_mask(config, slice(0, length), length, length, grid, text)[0, head]
    first = block_tokens(pattern.layout)[:, 0].long()  # one token of each block stands for it
    drawn = torch.from_numpy(plots._block_mask(pattern))
    assert torch.equal(drawn > 0, mask[first][:, first])
    query_row = drawn[pattern.query_block]
    assert (query_row == 2).sum() > 0
    assert (drawn == 2).sum() == (query_row == 2).sum()

    classes = torch.from_numpy(plots._token_classes(pattern)).flatten()
    seen = mask[first[pattern.query_block], text.before : text.before + classes.numel()]
    assert torch.equal(classes > 0, seen)
    own = block_tokens(pattern.layout)[pattern.query_block]
    assert (classes == 2).nonzero().flatten().tolist() == sorted(
        (own[own >= 0] - text.before).tolist()
    )


@pytest.mark.parametrize(("config", "grid"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_picture_is_written_where_it_was_asked_for(
    config: cs.STA, grid: tuple[int, ...], tmp_path: Path
) -> None:
    path = plot_pattern(config, grid, text=cs.Text(3, 0), path=tmp_path / "new" / "pattern.png")
    assert path == tmp_path / "new" / "pattern.png"
    height, width, _ = imread(path).shape
    assert width > height > 400


def test_every_frame_is_shown_up_to_a_number_and_then_every_nth() -> None:
    def frames(num_frames: int) -> list[str]:
        figure = plots._figure()
        pattern = plots._pattern(cs.STA(tile_thw=(4, 4, 4)), (num_frames, 8, 8), cs.Text(), None, 0)
        plots._draw_frames(figure, pattern)
        return [axes.get_title() for axes in figure.axes if axes.get_title()]

    assert frames(plots.MAX_FRAMES) == [f"t = {t}" for t in range(plots.MAX_FRAMES)]
    assert frames(2 * plots.MAX_FRAMES) == [f"t = {t}" for t in range(0, 48, 2)]


def test_the_title_states_the_counted_density() -> None:
    config, grid = LAYOUTS["image"]
    pattern = plots._pattern(config, grid, cs.Text(after=6), None, 0)
    length = pattern.layout.num_tokens
    mask = token_mask(config, slice(0, length), length, length, grid, cs.Text(after=6))
    assert f"density {mask.float().mean():.3f}" in plots._title(pattern)


def draw(**changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "config": cs.STA(),
        "grid_thw": (12, 16, 16),
        "path": "unused.png",
    }
    return plot_pattern(**{**arguments, **changes})


CASES = {
    "dense": Case(
        errors.ConfigError,
        "no pattern to draw",
        "Dense()",
        "STA(...)",
        "a fixed window",
        lambda: draw(config=cs.Dense()),
    ),
    "head": Case(
        errors.ConfigError,
        "no window for this head",
        "head 2",
        "from 0 to 1",
        "head=0",
        lambda: draw(config=cs.STA(window_thw=((1, 1, 1), (3, 3, 3))), head=2),
    ),
    "size": Case(
        errors.LayoutError,
        "too many blocks to draw",
        "6000 blocks of tile (1, 1, 1)",
        f"at most {plots.MAX_BLOCKS}",
        "larger tiles",
        lambda: draw(config=cs.STA(tile_thw=(1, 1, 1)), grid_thw=(6, 20, 50)),
    ),
    "query tile": Case(
        errors.LayoutError,
        "query_tile is not on the grid of tiles",
        "(2, 0, 0)",
        "each below (2, 2, 2)",
        "in tiles, not in tokens",
        lambda: draw(query_tile=(2, 0, 0)),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_message_says_what_got_expected_and_next(case: Case) -> None:
    assert_wording(case)


def test_a_missing_matplotlib_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    case = Case(
        errors.MissingExtraError,
        "drawing a pattern needs the optional package 'matplotlib'",
        "import matplotlib failed",
        "matplotlib installed",
        "compiled_sparse[plots]",
        draw,
    )
    assert_wording(case)
    assert raise_statements(("plots",)) == raised_at((*CASES.values(), case))


def test_importing_the_module_does_not_import_matplotlib() -> None:
    code = "import sys, compiled_sparse.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
