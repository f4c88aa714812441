"""Attached models whose parameters are spread over processes: what may be done to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from data_parallel import attached
from data_parallel import compile_blocks
from data_parallel import sharded
from data_parallel import whole
from data_parallel import wholes
from gated import CONFIG
from gated import GATE
from modules import GRID
from modules import TinyDiT
from modules import assert_close
from modules import dit_inputs
from processes import values
from torch import Tensor
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict import set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import compiled_sparse as cs
from compiled_sparse.errors import AttachError

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def output(model: TinyDiT) -> Tensor:
    """Return the model's output, its blocks compiled, for inputs that are always the same."""
    compile_blocks(model)
    torch.manual_seed(3)
    with torch.no_grad(), cs.metadata(grid_thw=GRID):
        result: Tensor = model(*dit_inputs())
    return result


def emptied(model: TinyDiT) -> TinyDiT:
    """Forget what the parameters were."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


# Saved by some processes, loaded by others.


def _save(folder: str) -> dict[str, Any]:
    model = sharded(attached()[0])
    state = get_model_state_dict(model)
    assert all(isinstance(value, DTensor) for value in state.values())
    save(state, checkpoint_id=folder)
    return {"names": sorted(state), "output": output(model)}


def _load(folder: str) -> Tensor:
    model = sharded(emptied(attached()[0]))
    state = get_model_state_dict(model)
    load(state, checkpoint_id=folder)
    set_model_state_dict(model, state)
    return output(model)


def test_what_two_processes_save_one_plain_process_loads(tmp_path: Path) -> None:
    saved = values(2, _save, str(tmp_path))[0]
    model = emptied(attached()[0])
    state = get_model_state_dict(model)
    load(state, checkpoint_id=str(tmp_path), no_dist=True)
    set_model_state_dict(model, state)
    assert saved["names"] == sorted(model.state_dict())
    assert f"blocks.1.attn1.{GATE}.bias" in saved["names"]
    expected = attached()[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name])
    assert_close(output(model), saved["output"])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_what_two_processes_save_others_load(tmp_path: Path, world_size: int) -> None:
    saved = values(2, _save, str(tmp_path))[0]["output"]
    for found in values(world_size, _load, str(tmp_path)):
        assert_close(found, saved)


# Published weights into a model that is sharded.


def _load_published() -> dict[str, Any]:
    source = attached()[0].state_dict()
    published = {name.replace(f"attn1.{GATE}", GATE): value for name, value in source.items()}
    model, handle = attached()
    sharded(emptied(model))
    report = handle.load_state_dict(published)
    found = wholes(model.state_dict())
    lacking = {name: value for name, value in published.items() if GATE not in name}
    filled = handle.load_state_dict(lacking).zero_filled
    return {
        "found": len(report.found),
        "same": all(torch.equal(value, source[name]) for name, value in found.items()),
        "kinds": {type(value) is DTensor for value in model.state_dict().values()},
        "filled": filled,
        "zero": [not bool(whole(model.get_parameter(name)).any()) for name in filled],
    }


def test_the_handle_loads_published_names_into_a_sharded_model() -> None:
    for found in values(2, _load_published):
        assert (found["found"], found["same"], found["kinds"]) == (4, True, {True})
        assert len(found["filled"]) == 4
        assert all(found["zero"])


# Attaching and removing afterwards.


def _attach_afterwards() -> dict[str, Any]:
    torch.manual_seed(0)
    before = sharded(TinyDiT(2))
    messages = [_refused(before), _refused(before.blocks[0], modules="attn1")]
    messages.append(_refused(DistributedDataParallel(TinyDiT(2))))
    windows = cs.attach(before, cs.STA(window_thw=(1, 1, 1), tile_thw=(2, 3, 2))).modules
    model, _ = attached()
    own = cs.attach(sharded(model), CONFIG)
    buffers = dict(model.named_buffers())
    layers = [int(buffers[f"blocks.{i}.attn1.compiled_sparse_layer"]) for i in range(2)]
    expected = output(attached()[0])
    attaching = (output(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    own.remove()
    return {
        "messages": messages,
        "windows": windows,
        "layers": layers,
        "same": bool(attaching),
        "left": [name for name in model.state_dict() if GATE in name],
        "finite": bool(model(*dit_inputs()).isfinite().all()),
    }


def _refused(model: nn.Module, **arguments: Any) -> str:
    names = list(model.state_dict())
    with pytest.raises(AttachError) as caught:
        cs.attach(model, CONFIG, **arguments)
    assert list(model.state_dict()) == names
    return str(caught.value)


@pytest.mark.slow
def test_gates_are_not_added_to_a_model_that_is_spread_but_kept_and_removed() -> None:
    for found in values(2, _attach_afterwards):
        root, block, ddp = found["messages"]
        assert "FSDPTinyDiT at the root; 2 layers" in root
        assert "FSDPBlock at the root; 1 layers" in block
        assert "DistributedDataParallel at the root" in ddp
        assert found["windows"] == ("blocks.0.attn1", "blocks.1.attn1")
        assert (found["layers"], found["same"]) == ([0, 1], True)
        assert (found["left"], found["finite"]) == ([], True)


def _made_without_memory() -> Tensor:
    source = attached()[0].state_dict()
    with torch.device("meta"):
        model = TinyDiT(2)
        for block in model.blocks:
            setattr(block.attn1, GATE, nn.Linear(16, 16))
    sharded(model).to_empty(device="cpu")
    cs.attach(model, CONFIG).load_state_dict(source)
    return output(model)


@pytest.mark.slow
def test_a_model_made_on_the_meta_device_brings_its_gates_along() -> None:
    expected = output(attached()[0])
    for found in values(2, _made_without_memory):
        assert_close(found, expected)
