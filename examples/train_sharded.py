"""Train the gates of VSA in several processes, with DDP or FSDP2, and continue with any number.

torchrun --nproc-per-node 2 examples/train_sharded.py --steps 4
torchrun --nproc-per-node 4 examples/train_sharded.py --steps 4 --load sharded --out continued
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from moving_shapes._data import CHANNELS
from moving_shapes._model import VideoDiT
from moving_shapes._processes import joined
from moving_shapes._processes import mean_loss
from moving_shapes._processes import own_batches
from moving_shapes._processes import parsed
from moving_shapes._run import GRID
from moving_shapes._training import GATE
from moving_shapes._training import optimiser
from moving_shapes._training import train
from torch import distributed
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict import set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import compiled_sparse as cs


def new_model(arguments: argparse.Namespace, device: torch.device) -> nn.Module:
    """Return a model with gates and compiled blocks, spread over all processes.

    Args:
        arguments: Those of the command line.
        device: Where it is.
    """
    torch.manual_seed(0)
    model = VideoDiT(CHANNELS, GRID).to(device)
    # Gates first: what is added after wrapping is in no bucket and no shard.
    cs.attach(model, cs.VSA(sparsity=arguments.sparsity, gate=GATE))
    for block in model.blocks:
        options = {"inner": arguments.inner}
        block.compile(backend="compiled_sparse", fullgraph=True, options=options)
    if arguments.parallel == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
    return model


def state_of(model: nn.Module, adam: torch.optim.Optimizer, done: int) -> dict[str, Any]:
    """Return what a checkpoint holds: this process's parts of everything.

    Args:
        model: The model.
        adam: Its optimiser.
        done: Steps done.
    """
    parameters, moments = get_state_dict(model, adam)
    return {"model": parameters, "optimiser": moments, "done": torch.tensor(done)}


def fine_tune(arguments: argparse.Namespace, device: torch.device) -> list[float]:
    """Train, and save; return the losses of the steps.

    Args:
        arguments: Those of the command line.
        device: Where to compute.
    """
    model = new_model(arguments, device)
    adam = optimiser(model, 3e-3)
    state, losses = state_of(model, adam, 0), []
    if arguments.load is not None:
        load(state, checkpoint_id=arguments.load)
        parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimiser"]}
        set_state_dict(model, adam, **parts)
    start = int(state["done"])

    def around(step: int) -> AbstractContextManager[None]:
        ramp = {"target": arguments.sparsity, "rate": arguments.rate}
        return cs.metadata(grid_thw=GRID, sparsity=cs.sparsity_ramp(start + step, **ramp))

    def after(done: int, loss: float) -> None:
        losses.append(mean_loss(loss, device))
        if distributed.get_rank() == 0:
            print(f"step {start + done}: loss {losses[-1]:.6f}", flush=True)

    data = own_batches(arguments.batch, start, device)
    train(model, data, adam, lambda step: 1.0, arguments.steps, around=around, after=after)
    save(state_of(model, adam, start + arguments.steps), checkpoint_id=arguments.out)
    return losses


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Run the example in one of the processes; return the losses.

    Args:
        argv: Words of the command line; None: those of this process.
    """
    arguments = parsed(__doc__.splitlines()[0], argv)
    with joined() as device:
        return fine_tune(arguments, device)


if __name__ == "__main__":
    main()
