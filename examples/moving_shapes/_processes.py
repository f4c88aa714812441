"""What examples/train_sharded.py needs beside training: arguments, processes and batches."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from torch import distributed

from moving_shapes._data import Batch
from moving_shapes._data import batches


def parsed(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments.

    Args:
        description: What the example does.
        argv: Words of the command line; None: those of this process.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--parallel", choices=("fsdp", "ddp"), default="fsdp")
    parser.add_argument("--steps", type=int, default=100, help="steps of this run")
    parser.add_argument("--batch", type=int, default=4, help="videos in a step, of all processes")
    parser.add_argument("--sparsity", type=float, default=0.9, help="where the ramp ends")
    parser.add_argument("--rate", type=float, default=0.3, help="what the ramp adds in a step")
    parser.add_argument("--load", type=Path, help="sharded checkpoint to continue")
    parser.add_argument("--out", type=Path, default=Path("sharded"), help="the one to write")
    parser.add_argument("--inner", default="inductor", help="who compiles; aot_eager starts sooner")
    return parser.parse_args(argv)


@contextmanager
def joined() -> Iterator[torch.device]:
    """Join the processes that torchrun started; yield the device of this one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    distributed.init_process_group()
    try:
        if accelerator is not None:
            torch.accelerator.set_device_index(distributed.get_node_local_rank())
        yield accelerator or torch.device("cpu")
    finally:
        distributed.destroy_process_group()


def own_batches(size: int, done: int, device: torch.device) -> Iterator[Batch]:
    """Yield this process's part of each batch; together they are the same for any number of them.

    Args:
        size: Videos in a batch, of all processes.
        done: Steps of training done: their batches are left out.
        device: Where to.

    Raises:
        SystemExit: if the processes would have parts of different sizes.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    if size % world_size:
        raise SystemExit(f"--batch {size} cannot be shared evenly by {world_size} processes")
    for batch in islice(batches(size, seed=0), done, None):
        parts = (each[rank::world_size] for each in (batch.clean, batch.noise, batch.time))
        yield Batch(*(part.to(device) for part in parts))


def mean_loss(loss: float, device: torch.device) -> float:
    """Return the mean of all processes' losses.

    Args:
        loss: This process's.
        device: Where to compute.
    """
    total = torch.tensor(loss, device=device)
    distributed.all_reduce(total)
    return float(total) / distributed.get_world_size()
