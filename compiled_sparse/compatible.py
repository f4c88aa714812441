"""`compatible`: which mechanisms could take a call, asked before there is a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compiled_sparse import registry
from compiled_sparse.config import MechanismConfig
from compiled_sparse.errors import DeviceError
from compiled_sparse.errors import DtypeError
from compiled_sparse.errors import ShapeError
from compiled_sparse.layout import Text
from compiled_sparse.layout import as_grid
from compiled_sparse.layout import check_text
from compiled_sparse.selector import CallFacts
from compiled_sparse.selector import Refused
from compiled_sparse.selector import call_supported
from compiled_sparse.selector import capabilities_of
from compiled_sparse.selector import choose


@dataclass(frozen=True, kw_only=True)
class Compatibility:
    """What one mechanism would make of a call.

    Args:
        mechanism: Its name.
        config: The config that was asked about: the mechanism's defaults.
        ok: Whether it takes the call.
        reason: Code from `compiled_sparse.reasons` if not.
        detail: What stands in the way.
        density: Fraction of token pairs attended; 1.0 if it does not take the call.
        predicted_gain: Predicted speed-up over dense attention; 1.0 if it does not.
        tile: Sides of a query block; empty if it does not.
    """

    mechanism: str
    config: MechanismConfig
    ok: bool
    reason: str = ""
    detail: str = ""
    density: float = 1.0
    predicted_gain: float = 1.0
    tile: tuple[int, ...] = ()


def compatible(
    *,
    grid_thw: tuple[int, ...],
    text: Text | None = None,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    training: bool = False,
    key_mask: bool = False,
) -> tuple[Compatibility, ...]:
    """Say of each registered mechanism whether it takes a call, and why not.

    The compile backend decides by the same functions.

    Args:
        grid_thw: Token grid after patching.
        text: Text tokens around the video.
        heads: Number of query heads.
        head_dim: Head size.
        dtype: Dtype of queries, keys and values.
        device: Where they are.
        training: Whether a gradient is needed.
        key_mask: Whether there is a key-padding mask.

    Returns:
        One answer per mechanism, by name, for its default config.

    Raises:
        LayoutError: if the grid is not one to three positive integers, or text no `Text`.
        ShapeError: if heads or head size are no positive integers.
        DtypeError: if the dtype is not one.
        DeviceError: if the device is not one.
    """
    grid_thw = as_grid(grid_thw)
    check_text(text)
    check_sizes(heads=heads, head_dim=head_dim)
    if not isinstance(dtype, torch.dtype):
        raise DtypeError(
            "this is no dtype",
            got=repr(dtype),
            expected="a torch.dtype",
            next_step="pass dtype=torch.bfloat16, for instance",
        )
    device_type = _device_type(device)
    call = CallFacts(dtype, head_dim, head_dim, device_type, training, key_mask)
    layout = (grid_thw, text or Text())
    return tuple(
        compatibility(each.config(), call, *layout, heads) for each in registry.mechanisms()
    )


def check_sizes(**sizes: object) -> None:
    """Check that sizes, by name, are positive integers.

    Raises:
        ShapeError: if one is not.
    """
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ShapeError(
                f"{name} is no size",
                got=repr(size),
                expected="an integer of at least 1",
                next_step=f"pass {name}=64, for instance",
            )


def _device_type(device: str | torch.device) -> str:
    try:
        return torch.device(device).type
    except (RuntimeError, TypeError):
        raise DeviceError(
            "this is no device",
            got=repr(device),
            expected='a torch.device or its name, such as "cpu" or "cuda"',
            next_step='pass device="cpu", for instance',
        ) from None


def compatibility(
    config: MechanismConfig, call: CallFacts, grid: tuple[int, ...], text: Text, heads: int
) -> Compatibility:
    """Say whether a config takes a call, and why not.

    Args:
        config: The config.
        call: The call's tensors.
        grid: Token grid.
        text: Text tokens around it.
        heads: Number of query heads.
    """
    outcome = call_supported(call, capabilities_of(config)) or choose(
        config, grid, text.before, text.after, heads
    )
    if isinstance(outcome, Refused):
        reason, detail = outcome.reason, outcome.detail
        return Compatibility(
            mechanism=config.name, config=config, ok=False, reason=reason, detail=detail
        )
    return Compatibility(
        mechanism=config.name,
        config=outcome.config.resolved(outcome.tile),
        ok=True,
        density=outcome.density,
        predicted_gain=outcome.predicted_gain,
        tile=outcome.tile,
    )
