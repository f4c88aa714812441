"""Models whose parameters are spread over processes: what may be added, how values get in.

A layer that is added later is in no bucket of DDP and no group of FSDP: nobody averages its
gradients, and the copies of the processes drift apart without a word.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch import nn

from compiled_sparse.errors import AttachError


def check_addable(model: nn.Module, added: list[str]) -> None:
    """Check that layers can still be added to a model, without changing it.

    DDP around `model` cannot be seen from within it, only where `model` has the wrapper.

    Args:
        model: The model.
        added: Paths of the layers.

    Raises:
        AttachError: if the model's parameters are already spread over processes.
    """
    wrapper = next(_wrappers(model), None) if added else None
    if wrapper is not None:
        raise AttachError(
            "the model is already spread over processes, which would not share what is added now",
            got=f"{wrapper}; {len(added)} layers to add, the first {added[0]!r}",
            expected="a model that no fully_shard, parallelize_module or DDP has changed yet",
            next_step="call cs.attach(model, policy) first, then compile the blocks and wrap",
        )


def placed_like(value: Tensor, own: Tensor) -> Tensor:
    """Return a value as a parameter's is placed: this process's part of it if that is sharded.

    Args:
        value: The whole value, the same in each process.
        own: The parameter's present value.
    """
    if not torch.distributed.is_available():
        return value
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import distribute_tensor

    if not isinstance(own, DTensor) or isinstance(value, DTensor):
        return value
    local = value.to(own.device)
    return distribute_tensor(local, own.device_mesh, own.placements, src_data_rank=None)


def _wrappers(model: nn.Module) -> Iterator[str]:
    """Yield what spreads parts of a model, in words."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    kinds = (FSDPModule, FullyShardedDataParallel, DistributedDataParallel)
    for path, module in model.named_modules():
        if isinstance(module, kinds):
            yield f"{type(module).__name__} at {repr(path) if path else 'the root'}"
    for path, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            yield f"the DTensor {path!r}"
