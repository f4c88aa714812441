"""One attention call of any mechanism, timed beside dense attention and flex_attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_sparse.block_lists import BlockLists
from compiled_sparse.block_lists import ChunkSelection
from compiled_sparse.block_lists import block_lists
from compiled_sparse.cli.compilers import require_inductor
from compiled_sparse.cli.measure import TOLERANCE
from compiled_sparse.cli.measure import medians
from compiled_sparse.config import MechanismConfig
from compiled_sparse.errors import ConfigError
from compiled_sparse.geometry import attention_flops
from compiled_sparse.layout import Text
from compiled_sparse.ops.attention import attention
from compiled_sparse.registry import Chosen
from compiled_sparse.selector import Refused
from compiled_sparse.selector import choose
from compiled_sparse.synthetic import made_up_tokens

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}

Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure.

    Args:
        config: The mechanism.
        grid: Token grid.
        text: Text tokens around it.
        heads: Number of heads.
        head_dim: Channels of a head.
        dtype: Of queries, keys and values.
        layer: Which layer's call, where layers differ.
        rounds: How often each call is timed.
        flex: Whether to time flex_attention, too.
    """

    config: MechanismConfig
    grid: tuple[int, ...]
    text: Text
    heads: int
    head_dim: int
    dtype: torch.dtype
    layer: int
    rounds: int
    flex: bool


def measure(settings: Settings) -> dict[str, Any]:
    """Time the calls in turn.

    Learned parts that the config names take part with made-up weights.

    Args:
        settings: What to measure.

    Returns:
        Milliseconds, density and ratios, as plain JSON values.

    Raises:
        ConfigError: if the config takes no such call.
        CompiledSparseError: if the settings cannot be right.
    """
    chosen = _chosen(settings)
    config = chosen.config.resolved(chosen.tile)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        q, k, v = _tokens(settings, device)
        learned = _learned(config, q)
        lists = _lists(config, q, k, settings)
        given = {"grid_thw": settings.grid, "text": settings.text, **learned}
        calls: dict[str, Call] = {
            "dense": lambda: F.scaled_dot_product_attention(q, k, v),
            "sparse": lambda: attention(q, k, v, config, **given),
        }
        if settings.flex:
            calls["flex"] = _flex(config, lists, q, k, v)
        seconds = _seconds(calls, settings.rounds, device)
    density = chosen.density if lists is None else lists.density
    facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "config": config.describe(),
        "learned": ", ".join(learned) or "none",
        "grid": list(settings.grid),
        "text": list(asdict(settings.text).values()),
        "density": density,
    }
    return {**facts, **_ratios(seconds, density, settings, q.shape[2])}


def _chosen(settings: Settings) -> Chosen:
    # Past the steps that stay dense, as most of a run is.
    config = settings.config.at(settings.config.dense_first_steps, settings.layer)
    text = settings.text
    outcome = choose(config, settings.grid, text.before, text.after, settings.heads)
    if isinstance(outcome, Refused):
        raise ConfigError(
            "there is nothing sparse to time",
            got=f"{settings.config.describe()}: {outcome.reason} {outcome.detail}".rstrip(),
            expected="a mechanism that takes this grid, and a layer that is not dense",
            next_step="ask `compiled-sparse plan` which ones do",
        )
    return outcome


def _tokens(settings: Settings, device: torch.device) -> list[Tensor]:
    """Made-up tokens, laid out as projections make them: heads side by side."""
    made = made_up_tokens(settings.grid, settings.heads, settings.head_dim, text=settings.text)
    return [
        each.transpose(1, 2).contiguous().to(device, settings.dtype).transpose(1, 2)
        for each in made
    ]


def _learned(config: MechanismConfig, q: Tensor) -> dict[str, Any]:
    learned: dict[str, Any] = {}
    if config.gate_name is not None:
        learned["gate"] = torch.ones_like(q)
    if config.projection_name is not None:
        learned["proj"] = (torch.eye(q.shape[-1]).to(q), q.new_zeros(q.shape[-1]))
    return learned


def _lists(
    config: MechanismConfig, q: Tensor, k: Tensor, settings: Settings
) -> BlockLists | ChunkSelection | None:
    q, k = q.cpu(), k.cpu()
    gate = _learned(config, q).get("gate")
    return block_lists(config, q, k, grid_thw=settings.grid, text=settings.text, gate=gate)


def _flex(config: MechanismConfig, lists: object, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """flex_attention with the same blocks, as if tokens had been moved into their order before."""
    from torch.nn.attention.flex_attention import flex_attention

    from compiled_sparse.flex import flex_block_mask

    if not isinstance(lists, BlockLists):
        raise ConfigError(
            "flex_attention has no form of what this mechanism selects",
            got=config.describe(),
            expected="a mechanism that lists key blocks for blocks of queries",
            next_step="leave --flex out",
        )
    mask = flex_block_mask(lists, q.shape[1]).to(q.device)
    require_inductor(otherwise="leave --flex out")
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask)


def _seconds(calls: dict[str, Call], rounds: int, device: torch.device) -> dict[str, float]:
    waiting = {name: _waiting_for(device, call) for name, call in calls.items()}
    for call in waiting.values():
        call()
    return medians(waiting, rounds, lambda: None)


def _waiting_for(device: torch.device, call: Call) -> Callable[[], None]:
    def wait() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return wait


def _ratios(
    seconds: dict[str, float], density: float, settings: Settings, tokens: int
) -> dict[str, float]:
    dense = seconds["dense"]
    flops = attention_flops(tokens, 1, settings.heads, settings.head_dim)
    result = {
        "dense_ms": 1e3 * dense,
        "dense_tflops": flops / dense / 1e12,
        "sparse_ms": 1e3 * seconds["sparse"],
        "speed_up": dense / seconds["sparse"],
        "limit": 1 / density,
        "share_of_limit": density * dense / seconds["sparse"],
    }
    if "flex" in seconds:
        result |= {
            "flex_ms": 1e3 * seconds["flex"],
            "flex_speed_up": dense / seconds["flex"],
            "flex_share_of_limit": density * dense / seconds["flex"],
        }
    return result
