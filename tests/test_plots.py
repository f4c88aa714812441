"""Pictures of patterns show what the reference computes."""

from __future__ import annotations

import math
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
from torch import Tensor

import compiled_sparse as cs
from compiled_sparse import errors
from compiled_sparse.block_lists import BlockLists
from compiled_sparse.block_lists import block_lists
from compiled_sparse.config import MechanismConfig
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops.plan import block_tokens
from compiled_sparse.plots import drawing
from compiled_sparse.plots import plot_pattern
from compiled_sparse.plots.chunks import chunk_pattern
from compiled_sparse.plots.pattern import MAX_BLOCKS
from compiled_sparse.plots.pattern import Pattern
from compiled_sparse.plots.pattern import View
from compiled_sparse.plots.pattern import pattern_of
from compiled_sparse.plots.words import words_for
from compiled_sparse.reference.attention import token_mask
from compiled_sparse.synthetic import made_up_tokens

LAYOUTS = {
    "video, no tile divides it": (cs.STA(window_thw=(1, 3, 3), tile_thw=(2, 3, 4)), (3, 7, 10)),
    "window per head": (
        cs.STA(window_thw=((1, 1, 1), (3, 1, 3)), tile_thw=(2, 2, 2)),
        (7, 5, 8),
    ),
    "image": (cs.STA(window_thw=(3, 1), tile_thw=(4, 4)), (18, 11)),
    "sequence": (cs.STA(window_thw=(3,), tile_thw=(7,)), (50,)),
}


CONTENT = {
    "VSA": (cs.VSA(sparsity=0.6, tile_thw=(2, 3, 2)), (3, 7, 4)),
    "SLA, runs": (cs.SLA(topk_ratio=0.3, block_q=16, block_k=7, proj=None), (3, 7, 4)),
    "SLA, boxes": (
        cs.SLA(topk_ratio=0.3, block_q=(2, 4, 2), block_k=(1, 3, 2), proj=None),
        (3, 7, 4),
    ),
    "SageSLA": (cs.SageSLA(topk_ratio=0.3, block_q=16, block_k=7, proj=None), (64,)),
}
MECHANISMS = LAYOUTS | {
    "SWBA": (cs.SWBA(block=11, window=2), (3, 7, 4)),
    "Dense": (cs.Dense(), (3, 7, 4)),
}
DRAWN = {name: (MECHANISMS | CONTENT)[name] for name in (*LAYOUTS, "SWBA", "SLA, boxes")}
DRAWN["VMoBA"] = (cs.VMoBA(), (3, 7, 4))
TEXTS = pytest.mark.parametrize("text", [cs.Text(), cs.Text(before=9, after=30)], ids=["", "text"])


def assert_drawn(pattern: Pattern, mask: Tensor, layouts: list[BlockLayout], text: cs.Text) -> None:
    """Check block mask and tokens against a mask of tokens, bool [queries, keys]."""
    queries, keys = (block_tokens(layout) for layout in layouts)
    first = queries[:, 0].long(), keys[:, 0].long()  # one token of each block stands for it
    assert torch.equal(pattern.mask > 0, mask[first[0]][:, first[1]])
    assert (pattern.mask[pattern.row] == 2).sum() > 0
    assert (pattern.mask == 2).sum() == (pattern.mask[pattern.row] == 2).sum()

    tokens = pattern.tokens.flatten()
    video = slice(text.before, text.before + tokens.numel())
    own = torch.zeros(len(mask), dtype=torch.bool)
    own[queries[pattern.row][queries[pattern.row] >= 0].long()] = True
    assert torch.equal(tokens == 2, own[video])
    assert torch.equal(tokens > 0, (mask[first[0][pattern.row]] | own)[video])
    assert f"density {mask.float().mean():.3f}" in pattern.title


def layouts_of(config: MechanismConfig, grid: tuple[int, ...], text: cs.Text) -> list[BlockLayout]:
    """How queries and keys are cut into blocks."""
    if config.grid_is_sequence:
        grid, text = (math.prod(grid) + text.before + text.after,), cs.Text()
    tile = config.resolve_tile(grid)
    tiles = tile, getattr(config, "key_tile", tile)
    return [BlockLayout(grid, each, text.before, text.after) for each in tiles]


@TEXTS
@pytest.mark.parametrize(("config", "grid"), MECHANISMS.values(), ids=MECHANISMS)
def test_what_is_drawn_of_a_fixed_pattern_is_that_of_the_reference(
    config: MechanismConfig, grid: tuple[int, ...], text: cs.Text
) -> None:
    head = len(config.windows) - 1 if isinstance(config, cs.STA) else 0
    pattern = pattern_of(config, View(grid, text, head=head))
    length = math.prod(grid) + text.before + text.after
    mask = token_mask(config, slice(0, length), length, length, grid, text)[0, head]
    assert_drawn(pattern, mask, layouts_of(config, grid, text), text)


@TEXTS
@pytest.mark.parametrize(("config", "grid"), CONTENT.values(), ids=CONTENT)
def test_what_is_drawn_of_a_selection_is_what_the_reference_attends_to(
    config: MechanismConfig, grid: tuple[int, ...], text: cs.Text
) -> None:
    q, k, _ = (x / 8 for x in made_up_tokens(grid, 2, 64, text=text, seed=3))
    values = torch.eye(q.shape[2]).expand(1, 2, -1, -1)  # so that outputs are weights
    if isinstance(config, cs.SageSLA):  # whose small weights are zero in eight bits
        fields = {name: getattr(config, name) for name in ("topk_ratio", "block_q", "block_k")}
        exact: MechanismConfig = cs.SLA(**fields, proj=None)
    else:
        exact = config
    weights = cs.reference.attention(q, k, values, exact, grid_thw=grid, text=text)
    pattern = pattern_of(config, View(grid, text, head=1, qk=(q, k)))
    assert_drawn(pattern, weights[0, 1] > 0, layouts_of(config, grid, text), text)
    assert "Head 1 of the given queries and keys" in pattern.title


@TEXTS
@pytest.mark.parametrize("kind", ["temporal", "spatial", "st"])
def test_what_is_drawn_of_a_query_s_own_selection_is_what_the_reference_attends_to(
    kind: str, text: cs.Text
) -> None:
    grid, place = (3, 7, 4), (2, 5, 1)
    layers = {f"{each}_layer": int(each == kind) for each in ("temporal", "spatial", "st")}
    config = cs.VMoBA(
        temporal_chunk_size=1,
        spatial_chunk_size=(3, 2),
        st_chunk_size=(2, 3, 2),
        first_full_step=12,
        first_full_layer=1,
        **layers,
    )
    q, k, _ = (x / 8 for x in made_up_tokens(grid, 2, 64, text=text, seed=3))
    values = torch.eye(q.shape[2]).expand(1, 2, -1, -1)
    weights = cs.reference.attention(
        q, k, values, config, grid_thw=grid, text=text, step=12, layer=1
    )
    seen = weights[0, 1] > 0
    pattern = chunk_pattern(config, View(grid, text, place, head=1, qk=(q, k)))
    query = (2 * 7 + 5) * 4 + 1
    video = slice(text.before, text.before + 84)
    tokens = pattern.tokens.flatten()
    assert (tokens == 2).nonzero().tolist() == [[query]]
    assert torch.equal(tokens > 0, seen[text.before + query, video])
    assert f"density {seen.float().mean():.3f}" in pattern.title
    layer = config.for_layer(1)
    assert isinstance(layer, cs.VMoBA)
    layout = BlockLayout(
        layer.resolve_grid(grid), layer.resolve_tile(grid), text.before, text.after
    )
    slots = block_tokens(layout)
    rows = [seen[row[row >= 0].long()].any(0)[slots[:, 0].long()] for row in slots]
    rows[pattern.row] = seen[text.before + query][slots[:, 0].long()]
    assert text.before + query in slots[pattern.row]
    assert torch.equal(pattern.mask > 0, torch.stack(rows))


def test_lists_are_found_of_inference_tensors_and_not_where_there_are_none() -> None:
    with torch.inference_mode():
        q, k, _ = made_up_tokens((4, 8, 8), 2, 64)
        found = block_lists(cs.VSA(sparsity=0.5), q, k, grid_thw=(4, 8, 8))
        assert isinstance(found, BlockLists)
        assert found.counts.unique().tolist() == [2]
        assert found.density == 0.5
        assert block_lists(cs.Dense(), q, k, grid_thw=(4, 8, 8)) is None


def test_a_seed_decides_what_is_made_up_and_the_title_says_that_it_is() -> None:
    def pattern(seed: int) -> Pattern:
        return pattern_of(cs.VSA(tile_thw=(2, 2, 2)), View((4, 8, 8), seed=seed))

    assert torch.equal(pattern(0).mask, pattern(0).mask)
    assert not torch.equal(pattern(0).mask, pattern(1).mask)
    assert "made-up queries and keys" in pattern(0).title


@pytest.mark.parametrize(
    ("config", "hidden"),
    [
        (cs.STA(), "not attended to"),
        (cs.SLA(proj=None), "not attended to"),
        (cs.SLA(), "all others through the linear branch alone"),
        (cs.VSA(gate="ungated"), "all others through the compressed branch alone"),
        (cs.VSA(), "not attended to, but for the compressed branch of a gate"),
    ],
)
def test_the_legend_says_what_becomes_of_the_other_keys(
    config: MechanismConfig, hidden: str
) -> None:
    assert words_for(config, (4, 4, 4), 0).hidden == hidden


@pytest.mark.parametrize(("config", "grid"), DRAWN.values(), ids=DRAWN)
def test_a_picture_is_written_where_it_was_asked_for(
    config: MechanismConfig, grid: tuple[int, ...], tmp_path: Path
) -> None:
    path = plot_pattern(config, grid, text=cs.Text(3, 0), path=tmp_path / "new" / "pattern.png")
    assert path == tmp_path / "new" / "pattern.png"
    height, width, _ = imread(path).shape
    assert width > height > 400


def test_every_frame_is_shown_up_to_a_number_and_then_every_nth() -> None:
    def frames(num_frames: int) -> list[str]:
        figure = drawing.new_figure()
        drawing.draw_frames(
            figure, pattern_of(cs.STA(tile_thw=(4, 4, 4)), View((num_frames, 8, 8)))
        )
        return [axes.get_title() for axes in figure.axes if axes.get_title()]

    assert frames(drawing.MAX_FRAMES) == [f"t = {t}" for t in range(drawing.MAX_FRAMES)]
    assert frames(2 * drawing.MAX_FRAMES) == [f"t = {t}" for t in range(0, 48, 2)]


def draw(**changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "config": cs.STA(),
        "grid_thw": (12, 16, 16),
        "path": "unused.png",
    }
    return plot_pattern(**{**arguments, **changes})


MODULES = ("plots/__init__", "plots/drawing", "plots/files", "plots/pattern")
CASES = {
    "auto": Case(
        errors.ConfigError,
        "no pattern to draw",
        "Auto(",
        "STA(...)",
        "of one mechanism",
        lambda: draw(config=cs.Auto()),
    ),
    "keys": Case(
        errors.ConfigError,
        "not given together",
        "q without k",
        "both, or neither",
        "pass q= and k=",
        lambda: draw(q=torch.zeros(1, 1, 12 * 16 * 16, 8)),
    ),
    "head": Case(
        errors.ConfigError,
        "no pattern for this head",
        "head 2",
        "from 0 to 1",
        "head=0",
        lambda: draw(config=cs.STA(window_thw=((1, 1, 1), (3, 3, 3))), head=2),
    ),
    "size": Case(
        errors.LayoutError,
        "too many blocks to draw",
        "6000 blocks of tile (1, 1, 1)",
        f"at most {MAX_BLOCKS}",
        "larger tiles",
        lambda: draw(config=cs.STA(tile_thw=(1, 1, 1)), grid_thw=(6, 20, 50)),
    ),
    "suffix": Case(
        errors.ConfigError,
        "suffix of a picture's path is no known format",
        "pattern.gif",
        ".png, .svg, .pdf",
        "picture.png",
        lambda: draw(path="pattern.gif"),
    ),
    "folder": Case(
        errors.ConfigError,
        "the picture cannot be written",
        "File exists",
        "a folder that may be written to",
        "choose another path",
        lambda: draw(path=Path(__file__, "pattern.png")),
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
    reached = raised_at(CASES.values())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    case = Case(
        errors.MissingExtraError,
        "drawing a picture needs the optional package 'matplotlib'",
        "import matplotlib failed",
        "matplotlib installed",
        "compiled_sparse[plots]",
        draw,
    )
    assert_wording(case)
    assert raise_statements(MODULES) == reached | raised_at((case,))


@pytest.mark.parametrize(
    ("suffix", "start"), [(".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")]
)
def test_the_suffix_says_the_format_and_equal_pictures_are_equal_bytes(
    suffix: str, start: bytes, tmp_path: Path
) -> None:
    config = cs.STA(tile_thw=(2, 4, 4))
    first, second = (
        plot_pattern(config, (4, 8, 8), path=tmp_path / f"{name}{suffix}") for name in "ab"
    )
    assert first.read_bytes().startswith(start)
    assert first.read_bytes() == second.read_bytes()


def test_importing_the_module_does_not_import_matplotlib() -> None:
    code = "import sys, compiled_sparse.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
