"""What the mechanisms would make of a model, before there is one: a dry run, and predictions.

    plan(PlanRequest(grid_thw=(21, 45, 80), heads=40, head_dim=128, layers=40, chip=chip("h100")))

Whether a mechanism fits is decided as the compile backend decides it. How long things take is
predicted from FLOPs and from `KERNEL_EFFICIENCY`; `NOTES` says what such a prediction is worth.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from compiled_sparse.chips import Chip
from compiled_sparse.compatible import Compatibility
from compiled_sparse.compatible import check_sizes
from compiled_sparse.compatible import compatibility
from compiled_sparse.config import MechanismConfig
from compiled_sparse.errors import ConfigError
from compiled_sparse.geometry import ModelGeometry
from compiled_sparse.geometry import attention_flops
from compiled_sparse.geometry import whole_gain
from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import Text
from compiled_sparse.layout import as_grid
from compiled_sparse.layout import check_text
from compiled_sparse.layout import sequence_grid
from compiled_sparse.plan_configs import default_configs
from compiled_sparse.registry import KERNEL_EFFICIENCY
from compiled_sparse.selector import CallFacts

NOTES = (
    f"Gains are predictions, {KERNEL_EFFICIENCY} / density as in every report. Choosing blocks, "
    "linear branches and padding are not in them.",
    "No GPU kernel of this package has been measured yet: milliseconds are predictions, too, from "
    "FLOPs and what dense attention is known or assumed to reach.",
)
"""What has to be said beside every plan."""

_TRAINED_FLOPS = 3.5  # attention's forward has 2 products, and its backward 5 of the same size
_TRAINED_OTHER = 3.0  # a product with weights has 2 more in its backward
_TRAINED_GAIN = 7 / 9  # of the 9 products of the sparse kernels, 2 are made twice


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What a plan is asked for.

    Args:
        grid_thw: Token grid after patching.
        heads: Query heads.
        head_dim: Head size.
        text: Text tokens around the video.
        layers: Attention calls over the video in a forward.
        batch: Videos in a call; two where guidance runs both prompts at once.
        dtype: Dtype of queries, keys and values.
        training: Whether there is a backward.
        chip: The GPU; None for this machine's CPU.
        attention_tflops: What dense attention reaches, in TFLOP/s, in place of the chip's figure.
        model: The model, for the share of attention in its work; None where it is not known.
        configs: The mechanisms; none for one of each at a density of about 0.1, and `Auto`.
    """

    grid_thw: tuple[int, ...]
    heads: int
    head_dim: int
    text: Text = Text()
    layers: int = 1
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    training: bool = False
    chip: Chip | None = None
    attention_tflops: float | None = None
    model: ModelGeometry | None = None
    configs: tuple[MechanismConfig, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Length of a call's sequence, text included."""
        (length,) = sequence_grid(self.grid_thw, self.text.before, self.text.after)
        return int(length)


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """What one mechanism would do.

    Args:
        mechanism: Its name; "auto" for the automatic choice.
        spec: Its config as a spec string, with the automatic parts filled in.
        fits: Whether it takes the calls.
        reason: Code from `compiled_sparse.reasons` if not.
        detail: What stands in the way.
        tile: Sides of a query block; empty if it does not fit, and the next ones None.
        blocks: Number of query blocks, text included.
        padding: Slots of these blocks per token, minus one.
        density: Fraction of token pairs attended, as `choose` counts it.
        gain: Predicted speed-up of attention over the video.
        milliseconds: Predicted time of that in one forward, or with its backward; None where it
            is not known how fast dense attention is.
        whole_gain: Predicted speed-up of the whole transformer; None without a model.
    """

    mechanism: str
    spec: str
    fits: bool
    reason: str = ""
    detail: str = ""
    tile: tuple[int, ...] = ()
    blocks: int | None = None
    padding: float | None = None
    density: float | None = None
    gain: float | None = None
    milliseconds: float | None = None
    whole_gain: float | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer to a `PlanRequest`.

    Args:
        request: What was asked.
        attention_share: Share of attention over the video in the FLOPs of the transformer, dense;
            None without a model.
        dense_milliseconds: Predicted time of dense attention over the video; None as in `PlanRow`.
        rows: One answer per mechanism.
    """

    request: PlanRequest
    attention_share: float | None
    dense_milliseconds: float | None
    rows: tuple[PlanRow, ...]


def plan(request: PlanRequest) -> Plan:
    """Say what mechanisms would make of a model's attention.

    Args:
        request: What is asked.

    Raises:
        LayoutError: if the grid is not one to three positive integers, or text no `Text`.
        ShapeError: if a count or the head size is no positive integer.
        ConfigError: if `attention_tflops` is no number above 0.
    """
    request = dataclasses.replace(request, grid_thw=as_grid(request.grid_thw))
    check_text(request.text)
    check_sizes(
        heads=request.heads,
        head_dim=request.head_dim,
        layers=request.layers,
        batch=request.batch,
    )
    if request.attention_tflops is not None and not request.attention_tflops > 0:
        raise ConfigError(
            "attention_tflops is no rate",
            got=repr(request.attention_tflops),
            expected="a number above 0, in TFLOP/s, or None",
            next_step="leave it out, or pass what dense attention reaches",
        )
    share = _attention_share(request)
    dense = _dense_milliseconds(request)
    configs = request.configs or default_configs(request.grid_thw, request.text)
    rows = tuple(_row(request, config, dense, share) for config in configs)
    return Plan(request=request, attention_share=share, dense_milliseconds=dense, rows=rows)


def _attention_share(request: PlanRequest) -> float | None:
    if request.model is None:
        return None
    share = request.model.attention_share(request.grid_thw)
    if not request.training:
        return share
    attention, other = _TRAINED_FLOPS * share, _TRAINED_OTHER * (1.0 - share)
    return attention / (attention + other)


def _dense_milliseconds(request: PlanRequest) -> float | None:
    tflops = request.attention_tflops
    if tflops is None and request.chip is not None and request.dtype.itemsize == 2:
        tflops = request.chip.attention_tflops
    if tflops is None:
        return None
    flops = request.batch * attention_flops(
        request.num_tokens, request.layers, request.heads, request.head_dim
    )
    return flops * (_TRAINED_FLOPS if request.training else 1.0) / (tflops * 1e9)


def _row(
    request: PlanRequest, config: MechanismConfig, dense: float | None, share: float | None
) -> PlanRow:
    size, device = request.head_dim, "cpu" if request.chip is None else "cuda"
    call = CallFacts(request.dtype, size, size, device, request.training)
    answer = compatibility(config, call, request.grid_thw, request.text, request.heads)
    row = PlanRow(
        mechanism=config.name,
        spec=answer.config.describe(),
        fits=answer.ok,
        reason=answer.reason,
        detail=answer.detail,
    )
    if not answer.ok:
        return row
    gain = answer.predicted_gain * (_TRAINED_GAIN if request.training else 1.0)
    layout = _layout(answer, request)
    return dataclasses.replace(
        row,
        tile=answer.tile,
        blocks=layout.num_blocks,
        padding=layout.padding_ratio,
        density=answer.density,
        gain=gain,
        milliseconds=None if dense is None else dense / gain,
        whole_gain=None if share is None else whole_gain(share, gain),
    )


def _layout(answer: Compatibility, request: PlanRequest) -> BlockLayout:
    """How the chosen config cuts the sequence into query blocks."""
    if answer.config.grid_is_sequence:
        return BlockLayout((request.num_tokens,), answer.tile)
    grid = answer.config.resolve_grid(request.grid_thw)
    return BlockLayout(grid, answer.tile, request.text.before, request.text.after)
