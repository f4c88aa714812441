"""Captured queries, keys and values: measured as inside the model, and refused where damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from modules import GRID
from modules import TinyDiT
from modules import dit_inputs
from safetensors.torch import load_file
from safetensors.torch import save_file
from torch import Tensor
from torch import nn

import compiled_sparse as cs
from compiled_sparse import calibration
from compiled_sparse.calibration import Call
from compiled_sparse.calibration import CallKey
from compiled_sparse.errors import CalibrationError

CANDIDATES = ("sta:window_thw=1x1x1,tile_thw=2x3x2", "vsa:sparsity=0.5,tile_thw=2x3x2")
KEY = CallKey(sample="a prompt/1", step=3)


@pytest.fixture
def model() -> nn.Module:
    return TinyDiT(2).requires_grad_(False).eval()


def test_a_captured_call_is_measured_as_inside_the_model(
    model: nn.Module, tmp_path: Path, fresh_compiler: None
) -> None:
    inputs = dit_inputs()
    expected = model(*inputs)
    with calibration.capture(tmp_path, grid_thw=GRID, key=KEY):
        assert torch.equal(model(*inputs), expected)
    offline = calibration.measure_captured(tmp_path, CANDIDATES)
    inside = calibration.measure(model, [Call(args=inputs, key=KEY)], CANDIDATES, inner="eager")
    assert list(offline.calls) == [KEY]
    for name in ("squared_error", "absolute_error", "cosine", "captured_mass"):
        torch.testing.assert_close(offline.mean(name), inside.mean(name), rtol=1e-5, atol=1e-9)
    assert [site.path for site in offline.layers] == ["layer.0", "layer.1"]
    assert offline.layers[0].densities == inside.layers[0].densities


def test_masks_scales_and_text_are_kept(tmp_path: Path) -> None:
    q, k, v = torch.randn(3, 2, 2, 65, 8)
    mask = torch.arange(65) < torch.tensor([65, 62])[:, None]
    with calibration.capture(tmp_path, grid_thw=GRID, text=cs.Text(after=5)):
        nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None], scale=0.7)
    (path,) = tmp_path.glob("*.safetensors")
    assert torch.equal(load_file(path)["key_mask"].bool(), mask)
    found = calibration.measure_captured(tmp_path, CANDIDATES[:1])
    (site,) = found.layers
    assert (site.grid_thw, site.text, site.kind) == (GRID, (0, 5), "joint")
    config = cs.STA(window_thw=(1, 1, 1), tile_thw=(2, 3, 2))
    sparse = cs.reference.attention(
        q, k, v, config, grid_thw=GRID, text=cs.Text(after=5), key_mask=mask, scale=0.7
    )
    dense = nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None], scale=0.7)
    shown = mask[:, None, :, None].expand_as(dense)
    error = (sparse - dense).square().where(shown, 0).sum((0, 2, 3)) / (mask.sum() * 8)
    torch.testing.assert_close(torch.tensor(site.squared_error[0]), error, rtol=1e-4, atol=1e-9)


def test_each_prompt_has_files_of_its_own(model: nn.Module, tmp_path: Path) -> None:
    prompts = ("a cat!", "a cat?", "a very " * 60 + "long one", "\u732b" * 200)
    for prompt in prompts:
        with calibration.capture(tmp_path, grid_thw=GRID, key=CallKey(sample=prompt)):
            model(*dit_inputs())
    found = calibration.measure_captured(tmp_path, CANDIDATES[:1])
    assert {key.sample for key in found.calls} == set(prompts)


def test_one_file_at_a_time_is_in_memory(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compiled_sparse.calibration import captured

    with calibration.capture(tmp_path, grid_thw=GRID):
        model(*dit_inputs())
    order: list[str] = []
    load, measure = captured._load, captured.measure_call

    def noted_load(*arguments: Any) -> Any:
        order.append("load")
        return load(*arguments)

    def noted_measure(*arguments: Any) -> Any:
        order.append("measure")
        return measure(*arguments)

    monkeypatch.setattr(captured, "_load", noted_load)
    monkeypatch.setattr(captured, "measure_call", noted_measure)
    calibration.measure_captured(tmp_path, CANDIDATES)
    assert order == ["load", "measure"] * 2


def test_a_journal_is_gone_on_with(model: nn.Module, tmp_path: Path) -> None:
    for step in range(2):
        with calibration.capture(tmp_path / "files", grid_thw=GRID, key=CallKey(step=step)):
            model(*dit_inputs())
    journal = tmp_path / "run.journal"
    whole = calibration.measure_captured(tmp_path / "files", CANDIDATES)

    def stop(key: CallKey) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibration.measure_captured(tmp_path / "files", CANDIDATES, journal=journal, on_call=stop)
    again = calibration.measure_captured(tmp_path / "files", CANDIDATES, journal=journal)
    assert again == whole


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def _foreign(path: Path) -> None:
    save_file({"q": torch.zeros(1)}, path)


def _replace(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def _without_values(path: Path) -> None:
    tensors: dict[str, Tensor] = load_file(path)
    _replace(path, {name: tensors[name] for name in "qk"})


def _shorter(path: Path) -> None:
    _replace(path, {name: tensor[:, :, 1:] for name, tensor in load_file(path).items()})


def _other_heads(path: Path) -> None:
    tensors = load_file(path)
    _replace(path, {**tensors, "k": tensors["k"][..., 1:]})


def _other_mask(path: Path) -> None:
    _replace(path, {**load_file(path), "key_mask": torch.ones(1, 3, dtype=torch.uint8)})


def _twice(path: Path) -> None:
    path.with_name("another.safetensors").write_bytes(path.read_bytes())


@pytest.mark.parametrize(
    "damage",
    [_truncate, _foreign, _without_values, _shorter, _other_heads, _other_mask, _twice],
)
def test_damaged_and_foreign_files_are_named(model: nn.Module, tmp_path: Path, damage: Any) -> None:
    with calibration.capture(tmp_path, grid_thw=GRID):
        model(*dit_inputs())
    path = sorted(tmp_path.glob("*.safetensors"))[1]
    damage(path)
    with pytest.raises(CalibrationError, match="holds no captured attention call") as caught:
        calibration.measure_captured(tmp_path, CANDIDATES)
    assert caught.match(path.name)


def test_missing_layers_and_empty_folders_are_refused(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no \*.safetensors file"):
        calibration.measure_captured(tmp_path, CANDIDATES)
    with calibration.capture(tmp_path, grid_thw=GRID):
        model(*dit_inputs())
    sorted(tmp_path.glob("*.safetensors"))[0].unlink()
    with pytest.raises(CalibrationError, match="layers missing"):
        calibration.measure_captured(tmp_path, CANDIDATES)


def test_a_candidate_that_does_not_fit_is_named(model: nn.Module, tmp_path: Path) -> None:
    with calibration.capture(tmp_path, grid_thw=GRID):
        model(*dit_inputs())
    with pytest.raises(CalibrationError, match="axes_mismatch"):
        calibration.measure_captured(tmp_path, ["sta:window_thw=3x3,tile_thw=2x2"])
