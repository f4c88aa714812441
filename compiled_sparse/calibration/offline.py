"""Measuring candidates on given queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_sparse.calibration.measurements import SiteErrors
from compiled_sparse.config import MechanismConfig
from compiled_sparse.errors import CalibrationError
from compiled_sparse.layout import Text
from compiled_sparse.ops.attention import attention
from compiled_sparse.passes.probe import ProbedSite
from compiled_sparse.registry import Chosen
from compiled_sparse.registry import Refused
from compiled_sparse.selector import capabilities_of
from compiled_sparse.selector import choose
from compiled_sparse.selector import tensors_supported


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """One attention call over a video.

    Args:
        q: [batch, query heads, length, head_dim].
        k: [batch, key heads, length, head_dim].
        v: Like `k`.
        grid_thw: Token grid.
        text: Text tokens around the video.
        key_mask: bool [batch, length], True where the key is attended; None for all.
        scale: Softmax scale; None means `head_dim ** -0.5`.
        step: Denoising step.
        layer: Index of the layer.
        path: Name of the module.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grid_thw: tuple[int, ...]
    text: Text = Text()
    key_mask: Tensor | None = None
    scale: float | None = None
    step: int = 0
    layer: int = 0
    path: str = ""


def measure_call(
    call: AttentionCall, candidates: tuple[MechanismConfig, ...], rows: int
) -> SiteErrors:
    """Compare every candidate with dense attention; one output more is alive at a time.

    Args:
        call: The call.
        candidates: The configs.
        rows: Evenly spread query positions that the captured mass is taken from.

    Raises:
        CalibrationError: if a candidate does not fit, or an output is not finite.
        CompiledSparseError: whatever `compiled_sparse.attention` raises for this call.
    """
    ops = torch.ops.compiled_sparse
    chosen = [_chosen(call, candidate) for candidate in candidates]
    mask = None if call.key_mask is None else call.key_mask[:, None, None, :]
    gqa = call.q.shape[1] != call.k.shape[1]
    tensors = (call.q, call.k, call.v)
    dense = F.scaled_dot_product_attention(*tensors, mask, scale=call.scale, enable_gqa=gqa)
    sampled = ops.sampled_log_sums(call.q, call.k, call.key_mask, rows, call.scale)
    sums = []
    for choice in chosen:
        out, lse = attention(
            *tensors,
            choice.config,
            grid_thw=call.grid_thw,
            text=call.text,
            key_mask=call.key_mask,
            scale=call.scale,
            step=call.step,
            layer=call.layer,
            return_lse=True,
        )
        sums.append(ops.candidate_errors(dense, out, lse, sampled, call.key_mask))
        del out, lse
    return SiteErrors.from_sums(_site(call, chosen), torch.stack(sums))


def _chosen(call: AttentionCall, candidate: MechanismConfig) -> Chosen:
    config = candidate.for_layer(call.layer) if candidate.needs_layer else candidate
    has_mask = call.key_mask is not None
    outcome: Chosen | Refused | None = tensors_supported(
        call.q, call.v, capabilities_of(config), key_mask=has_mask
    )
    if outcome is None:
        text = (call.text.before, call.text.after)
        outcome = choose(config, call.grid_thw, *text, call.q.shape[1])
    if isinstance(outcome, Refused):
        raise CalibrationError(
            "a candidate does not fit an attention call",
            got=f"{candidate.describe()}: {outcome.reason} {outcome.detail}".rstrip(),
            expected="candidates that fit every call",
            next_step="leave this candidate out, or change it; docs/report.md explains the reason",
        )
    return outcome


def _site(call: AttentionCall, chosen: list[Chosen]) -> ProbedSite:
    return ProbedSite(
        path=call.path,
        kind="joint" if call.text.before + call.text.after else "self",
        grid_thw=tuple(call.grid_thw),
        text=(call.text.before, call.text.after),
        heads=call.q.shape[1],
        head_dim=call.q.shape[3],
        densities=tuple(choice.density for choice in chosen),
        tiles=tuple(choice.tile for choice in chosen),
    )
