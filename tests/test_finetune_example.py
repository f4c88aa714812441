"""The fine-tuning example for sparse-linear attention: a short run of both stages."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("importable_examples")

PROJECTIONS = {
    f"blocks.{block}.attn.attn_impl.proj_l.{parameter}"
    for block in range(2)
    for parameter in ("weight", "bias")
}
"""As in published checkpoints: at the attention module, whatever a model calls that."""


def test_learned_layers_are_told_by_a_whole_part_of_their_names() -> None:
    from moving_shapes import _training

    assert _training.is_learned("blocks.0.attn.proj_l.weight")
    assert _training.is_learned("blocks.0.attn.to_gate_compress.bias")
    assert not _training.is_learned("blocks.0.attn.proj_left.weight")
    assert not _training.is_learned("blocks.0.attn.to_q.weight")


def test_the_optimiser_has_no_group_for_what_is_frozen() -> None:
    from moving_shapes import _training

    model = torch.nn.ModuleDict({"proj_l": torch.nn.Linear(2, 2), "other": torch.nn.Linear(2, 2)})
    assert len(_training.optimiser(model, 1e-3).param_groups) == 2
    model["other"].requires_grad_(False)
    (group,) = _training.optimiser(model, 1e-3).param_groups
    assert group["params"] == list(model["proj_l"].parameters())
    assert group["weight_decay"] == 0


@pytest.mark.slow
def test_a_short_run_trains_in_two_stages_and_reloads_identically(
    tmp_path: Path, fresh_compiler: None, capsys: pytest.CaptureFixture[str]
) -> None:
    import finetune_sla

    results: Any = finetune_sla.main(["--quick", "--out", str(tmp_path)])
    measured = asdict(results)
    compilations = measured.pop("compilations")
    assert all(math.isfinite(value) for value in measured.values())
    assert results.sla <= results.zero_shot
    assert compilations == (1, 1)
    assert results.reload_difference == 0
    check_checkpoints(tmp_path)
    recorded = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert recorded["sla"] == results.sla
    assert (tmp_path / "losses.png").stat().st_size > 0
    assert "SLA, fine-tuned" in capsys.readouterr().out


def check_checkpoints(folder: Path) -> None:
    """The first stage changes nothing but the projections, the second one the rest as well."""
    names = ("dense", "sla_stage1", "sla_stage2")
    dense, first, second = (load_file(folder / f"{name}.safetensors") for name in names)
    assert first.keys() == second.keys() == dense.keys() | PROJECTIONS
    assert all(each.dtype == torch.float32 for each in first.values())
    assert all(torch.equal(first[name], dense[name]) for name in dense)
    assert all(first[name].any() for name in PROJECTIONS)
    assert all(not torch.equal(second[name], first[name]) for name in PROJECTIONS)
    assert not any(torch.equal(second[name], dense[name]) for name in dense if "to_q" in name)
