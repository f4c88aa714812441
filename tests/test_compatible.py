"""The capability query, and that it says what the pass does."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from modules import GRID
from modules import Attention
from modules import Tiny
from modules import raster
from modules import video

import compiled_sparse as cs
from compiled_sparse import registry
from compiled_sparse.errors import LayoutError
from compiled_sparse.reasons import REASONS

CALL: dict[str, Any] = {"grid_thw": (21, 30, 52), "heads": 12, "head_dim": 128}


def ask(**changes: Any) -> Any:
    answers = cs.compatible(**{**CALL, "dtype": torch.bfloat16, **changes})
    return next(answer for answer in answers if answer.mechanism == "sta")


def test_a_call_that_fits_is_answered_with_density_and_gain() -> None:
    answer = ask(text=cs.Text(after=256))
    assert (answer.mechanism, answer.config, answer.ok) == ("sta", cs.STA(), True)
    assert 0.2 < answer.density < 0.4
    assert answer.predicted_gain == pytest.approx(0.8 / answer.density)


def test_the_density_of_selected_tiles_is_that_of_their_number() -> None:
    answers = cs.compatible(**CALL, dtype=torch.bfloat16)
    (answer,) = (each for each in answers if each.mechanism == "vsa")
    assert (answer.ok, answer.config) == (True, cs.VSA(sparsity=0.9))
    assert answer.density == pytest.approx(63 / 624)  # ceil(0.1 * 6 * 8 * 13) of the tiles
    assert answer.predicted_gain == pytest.approx(0.8 / answer.density)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.int32}, "dtype_unsupported"),
        ({"head_dim": 1024}, "head_dim_unsupported"),
        ({"device": "meta"}, "device_unsupported"),
        ({"device": "cuda", "dtype": torch.float64}, "dtype_unsupported"),  # device: only asked
        ({"device": "cuda", "head_dim": 257}, "head_dim_unsupported"),  # device: only asked
        ({"device": torch.device("meta", 0)}, "device_unsupported"),
        ({"grid_thw": (30, 52)}, "axes_mismatch"),
    ],
)
def test_a_call_that_does_not_fit_is_answered_with_the_reason(
    changes: dict[str, Any], reason: str
) -> None:
    answer = ask(**changes)
    assert not answer.ok
    assert answer.reason == reason
    assert reason in REASONS
    assert (answer.density, answer.predicted_gain) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("limits", "changes", "reason"),
    [
        ({"forward_only": True}, {"training": True}, "forward_only"),
        ({"key_mask": False}, {"key_mask": True}, "mask_unsupported"),
        ({"num_axes": frozenset({1})}, {}, "axes_mismatch"),
    ],
)
def test_capabilities_decide_in_query_and_pass_alike(
    limits: dict[str, Any],
    changes: dict[str, Any],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    fresh_compiler: None,
) -> None:
    sta = registry.find("sta")
    assert sta is not None
    limited = dataclasses.replace(sta, capabilities=dataclasses.replace(sta.capabilities, **limits))
    monkeypatch.setattr(registry, "_mechanisms", {"sta": limited})
    assert ask(**changes).reason == reason
    assert ask(**changes, grid_thw=GRID).reason == reason
    mask = torch.ones(1, 1, 1, 60, dtype=torch.bool) if "key_mask" in changes else None
    model = Tiny(lambda m, x: m.attn(raster(x), attn_mask=mask))
    report = cs.explain(model, video(), policy="sta")
    assert [site.reason for site in report.sites] == [reason]
    with torch.no_grad():
        without = cs.explain(Attention(), torch.randn(1, 60, 16), policy="sta").sites[0]
    assert without.reason == "layout_unknown"


def test_forward_only_is_no_matter_without_gradients(
    monkeypatch: pytest.MonkeyPatch, fresh_compiler: None
) -> None:
    sta = registry.find("sta")
    assert sta is not None
    limited = dataclasses.replace(
        sta, capabilities=dataclasses.replace(sta.capabilities, forward_only=True)
    )
    monkeypatch.setattr(registry, "_mechanisms", {"sta": limited})
    with torch.no_grad():
        report = cs.explain(Tiny(lambda m, x: m.attn(raster(x))), video(), policy="sta")
    assert report.num_sparse == 1


def test_a_grid_that_is_none_is_an_error() -> None:
    with pytest.raises(LayoutError, match="grid_thw is not a tuple of axis lengths"):
        ask(grid_thw=(0, 3, 3))
