"""Attached models trained by one process or several, which must come to the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from dataclasses import dataclass
from typing import Any

import torch
from gated import CONFIG
from gated import open_gates
from modules import GRID
from modules import TinyDiT
from modules import dit_inputs
from processes import values
from projected import CONFIG as SLA
from torch import Tensor
from torch import distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import compiled_sparse as cs
from compiled_sparse.attach import Handle

BATCH = 12
POLICIES: dict[str, Any] = {"vsa": CONFIG, "sla": SLA}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a model is trained.

    Args:
        parallel: "fsdp" or "ddp"; empty for one process.
        compiled: "blocks", each alone, or "model".
        learned: Key of `POLICIES`.
        inner: The inner compiler.
        checkpoint: Whether blocks are computed again in the backward pass.
        half: Whether FSDP computes in bfloat16.
        grid: Whether `cs.metadata` says the grid.
        optimize_ddp: What `torch._dynamo.config` has; False where None.
        bucket: Size of the buckets of DDP in bytes.
    """

    parallel: str = ""
    compiled: str = "blocks"
    learned: str = "vsa"
    inner: str = "eager"
    checkpoint: bool = False
    half: bool = False
    grid: bool = True
    optimize_ddp: bool = False
    bucket: int = 2**20


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What two steps of training leave.

    Args:
        losses: Of the steps, over the whole batch.
        gradients: Whole gradients of the first step, by name.
        parameters: Whole parameters after the second, by name.
        messages: What the package logged.
    """

    losses: list[float]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    messages: list[str]


def attached(learned: str = "vsa", **settings: Any) -> tuple[TinyDiT, Handle]:
    """Return a model, the same in each process, and what attached it; its gates are open."""
    torch.manual_seed(0)
    model = TinyDiT(2, **settings)
    handle = cs.attach(model, POLICIES[learned])
    open_gates(model, (*handle.gates, *handle.projections))
    return model, handle


def sharded(model: TinyDiT, *, half: bool = False) -> TinyDiT:
    """Shard each block and what is left, over all processes."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return model


def whole(value: Tensor) -> Tensor:
    """Return a copy of a tensor, gathered if it is spread over processes."""
    value = value.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def wholes(named: dict[str, Any]) -> dict[str, Tensor]:
    """Return such copies of all."""
    return {name: whole(value) for name, value in named.items()}


def compile_blocks(model: TinyDiT, inner: str = "eager") -> None:
    """Compile each block alone."""
    for block in model.blocks:
        block.compile(backend="compiled_sparse", fullgraph=True, options={"inner": inner})


def trained(setup: Setup) -> Trained:
    """Train for two steps; the processes share the batch among them."""
    torch._dynamo.reset()
    torch._dynamo.config.optimize_ddp = setup.optimize_ddp
    with _Messages() as messages:
        model, run = _prepared(setup)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        data = _share(bool(setup.parallel))
        losses: list[float] = []
        gradients: dict[str, Tensor] = {}
        for _ in range(2):
            with cs.metadata(grid_thw=GRID) if setup.grid else nullcontext():
                loss = (run(*data[:-1]) - data[-1]).square().mean()
                loss.backward()
            losses.append(_mean(loss.detach(), bool(setup.parallel)))
            named = {name: each.grad for name, each in model.named_parameters()}
            gradients = gradients or wholes({n: g for n, g in named.items() if g is not None})
            optimiser.step()
            optimiser.zero_grad()
        parameters = wholes(dict(model.named_parameters()))
    return Trained(
        losses=losses, gradients=gradients, parameters=parameters, messages=messages.found
    )


def trained_by(world_size: int, setup: Setup) -> list[Trained]:
    """Return what each of several processes comes to."""
    return [Trained(**each) for each in values(world_size, _plainly_trained, setup)]


def _plainly_trained(setup: Setup) -> dict[str, Any]:
    """Only plain values go from process to process."""
    return asdict(trained(setup))


def _prepared(setup: Setup) -> tuple[TinyDiT, Callable[..., Tensor]]:
    """Return the model, and what is called: attached, compiled, spread."""
    model, _ = attached(setup.learned, checkpoint=setup.checkpoint)
    run: nn.Module = model
    if setup.compiled == "blocks":
        compile_blocks(model, setup.inner)
    if setup.parallel == "fsdp":
        sharded(model, half=setup.half)
    if setup.parallel == "ddp":
        setattr(distributed, "_DEFAULT_FIRST_BUCKET_BYTES", min(2**20, setup.bucket))  # noqa: B010
        run = DistributedDataParallel(model, bucket_cap_mb=setup.bucket / 2**20)
    if setup.compiled == "model":
        options: dict[str, Any] = {"inner": setup.inner}
        return model, torch.compile(run, backend="compiled_sparse", options=options)
    return model, run


def _share(is_parallel: bool) -> list[Tensor]:
    """Return this process's part of inputs and target."""
    torch.manual_seed(5)
    inputs = dit_inputs(batch=BATCH)
    data = [*inputs, torch.randn_like(inputs[0])]
    if not is_parallel:
        return data
    return [each.chunk(distributed.get_world_size())[distributed.get_rank()] for each in data]


def _mean(loss: Tensor, is_parallel: bool) -> float:
    if is_parallel:
        distributed.all_reduce(loss)
        loss /= distributed.get_world_size()
    return float(loss)


class _Messages(logging.Handler):
    """Collects what the package logs."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.found: list[str] = []
        self._logger = logging.getLogger("compiled_sparse")
        self._level = self._logger.level

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())

    def __enter__(self) -> _Messages:
        self._logger.addHandler(self)
        self._logger.setLevel(logging.INFO)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.setLevel(self._level)
