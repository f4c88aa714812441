"""Run an unmodified model eagerly with its video self-attention replaced by the reference."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compiled_sparse.config import MechanismConfig
from compiled_sparse.layout import Text
from compiled_sparse.reference.attention import attention
from compiled_sparse.reference.video_calls import VideoCalls


class override(VideoCalls):  # noqa: N801 - used like a function: with override(...)
    """Replace every self-attention over a given layout by the dense masked reference.

    See `VideoCalls` for which calls these are. Outputs of queries that are not valid are 0. For
    eager code: to see what a compiled sparse model should have computed. The calls count as layers
    0, 1, ... of the config, so that one of these is for one forward of a model.

    Args:
        config: The mechanism.
        grid_thw: Token grid of the video.
        text: Text tokens around the video.
        step: Denoising step, for a config that has a schedule; None means the first.
    """

    def __init__(
        self,
        config: MechanismConfig,
        *,
        grid_thw: tuple[int, ...],
        text: Text | None = None,
        step: int | None = None,
    ) -> None:
        super().__init__(grid_thw=grid_thw, text=text)
        self.config = config
        self.step = step

    def replace(
        self, call: dict[str, Any], keys: Tensor | None, queries: Tensor | None, layer: int
    ) -> Tensor:
        """Return what the reference gives for a call."""
        out = attention(
            call["query"],
            call["key"],
            call["value"],
            self.config,
            grid_thw=self.grid_thw,
            text=self.text,
            key_mask=keys,
            scale=call["scale"],
            step=self.step,
            layer=layer,
        )
        assert isinstance(out, Tensor)
        return out if queries is None else out.masked_fill(~queries[:, None, :, None], 0.0)
