"""What the doctor looks at beyond plain facts: kernels, compilers, whether results are right."""

from __future__ import annotations

from dataclasses import asdict
from dataclasses import dataclass
from typing import Any

import torch

from compiled_sparse import registry
from compiled_sparse.cli.compilers import first_line
from compiled_sparse.cli.compilers import inductor_failure
from compiled_sparse.cli.machine import environment
from compiled_sparse.cli.measure import compare
from compiled_sparse.config import STA
from compiled_sparse.config import MechanismConfig
from compiled_sparse.config_vsa import VSA
from compiled_sparse.environment import policy_from_environment
from compiled_sparse.errors import CompiledSparseError
from compiled_sparse.layout import Text
from compiled_sparse.ops import cpu
from compiled_sparse.ops.attention import attention
from compiled_sparse.ops.cpu.build import native_library
from compiled_sparse.reference.attention import attention as reference_attention

_GRID, _TEXT, _HEADS, _HEAD_DIM = (5, 7, 6), Text(after=3), 2, 32
_CONFIGS: tuple[MechanismConfig, ...] = (
    STA(window_thw=(1, 3, 3), tile_thw=(2, 3, 2)),
    VSA(sparsity=0.7, tile_thw=(2, 3, 2)),
)
_DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One result beside the reference.

    Args:
        name: Mechanism, direction and device.
        passed: Whether they agree.
        detail: The error and the tolerance, or what failed.
    """

    name: str
    passed: bool
    detail: str


def cpu_kernel() -> dict[str, str]:
    """Return which kernel runs on the CPU and why, or what is wrong with the choice."""
    try:
        described = cpu.describe()
    except CompiledSparseError as error:
        return {"kernel": "none", "why": str(error)}
    return {**described, "why": _why(described["kernel"])}


def _why(kernel: str) -> str:
    if cpu.KERNEL_VARIABLE in environment():
        return f"{cpu.KERNEL_VARIABLE} asks for it"
    if kernel == "native":
        return "it compiles here"
    try:
        native_library()
    except cpu.NativeBuildError as error:
        return f"the native one does not compile: {error}"
    return "the native one did not compile at first use"


def gpu_kernel() -> dict[str, str]:
    """Return the part of the table of tiles that kernels of the present GPU are cut by."""
    if not torch.cuda.is_available():
        return {"table": "not used: no GPU"}
    from compiled_sparse.kernels import tuning

    return tuning.describe(tuning.current_chip())


def compiler() -> dict[str, str]:
    """Return whether inductor works, and whether Dynamo and mechanisms are found."""
    failure = inductor_failure()
    is_listed = "compiled_sparse" in torch._dynamo.list_backends()
    return {
        "inductor": "works" if failure is None else f"does not work: {first_line(failure)}",
        "backend": "registered with Dynamo" if is_listed else "NOT registered with Dynamo",
        "mechanisms": ", ".join(each.name for each in registry.mechanisms()),
        "override": _override(),
    }


def _override() -> str:
    """What the environment makes of every policy, or what is wrong with it."""
    try:
        policy = policy_from_environment()
    except CompiledSparseError as error:
        return str(error)
    rules = () if policy is None else policy.rules
    return ", ".join(f"{glob} {config.describe()}" for glob, config in rules) or "none"


def checks() -> list[Check]:
    """Compare small results and gradients with the reference, on every kind of device there is."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [_check(config, device) for device in devices for config in _CONFIGS]


def _check(config: MechanismConfig, device: str) -> Check:
    name = f"{config.name}, forward and backward, {device}"
    try:
        actual = _output_and_gradients(attention, config, device)
        expected = _output_and_gradients(reference_attention, config, device)
    except Exception as error:  # noqa: BLE001 - whatever fails is what the doctor is asked for
        return Check(name=name, passed=False, detail=f"{type(error).__name__}: {error}")
    found = [compare(*pair) for pair in zip(actual, expected, strict=True)]
    worst = max(each.relative_error for each in found)
    return Check(
        name=name,
        passed=all(each.passed for each in found),
        detail=f"relative error {worst:.1e}, tolerance {found[0].tolerance:.0e}",
    )


def _output_and_gradients(attend: Any, config: MechanismConfig, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    length = torch.Size(_GRID).numel() + _TEXT.before + _TEXT.after
    shape = (1, _HEADS, length, _HEAD_DIM)
    inputs = [
        torch.randn(shape, generator=generator).to(device, _DTYPES[device]).requires_grad_()
        for _ in range(3)
    ]
    with torch.enable_grad():
        out = attend(*inputs, config, grid_thw=_GRID, text=_TEXT)
        gradients = torch.autograd.grad(out.square().sum(), inputs)
    return [out.detach(), *gradients]


def as_dicts(found: list[Check]) -> list[dict[str, Any]]:
    """Return checks as plain JSON values."""
    return [asdict(each) for each in found]
