"""The demo's model: an unmodified `WanTransformer3DModel` of diffusers with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from compiled_sparse.errors import ConfigError

_CHANNELS = 16
_TEXT_TOKENS = 32
_TEXT_DIM = 64
_FFN_FACTOR = 2
_TIMESTEP = 500
_PATCH = 2  # along height and width
_QUERY_SCALE = 4.0
_MIN_HEAD_DIM = 6  # rotary embedding: two channels at least for each of T, H and W


@dataclass(frozen=True)
class DemoModel:
    """The model, its inputs, and how its attention sees them.

    Args:
        module: The transformer, in evaluation mode.
        inputs: Keyword arguments of one forward.
        num_parameters: Number of weights.
    """

    module: torch.nn.Module
    inputs: dict[str, Any]
    num_parameters: int

    def run(self, forward: Any) -> torch.Tensor:
        """Return what `forward`, the module or a compiled form of it, makes of the inputs."""
        output: torch.Tensor = forward(**self.inputs)[0]
        return output


def build_model(
    grid_thw: tuple[int, int, int],
    *,
    layers: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    seed: int,
) -> DemoModel:
    """Build the transformer and inputs that patch to a given token grid.

    Args:
        grid_thw: Token grid; the latent video is twice as high and wide.
        layers: Number of transformer blocks.
        heads: Attention heads.
        head_dim: Channels per head.
        dtype: Of weights and inputs.
        seed: For weights and inputs.

    Returns:
        The model.

    Raises:
        ConfigError: if Wan's rotary embedding cannot take the head size.
    """
    if head_dim < _MIN_HEAD_DIM or head_dim % 2:
        raise ConfigError(
            "Wan's rotary embedding cannot take this head size",
            got=str(head_dim),
            expected=f"an even number of at least {_MIN_HEAD_DIM}",
            next_step="pass --head-dim 64, for instance",
        )
    import diffusers

    torch.manual_seed(seed)
    width = heads * head_dim
    build: Any = diffusers.WanTransformer3DModel
    module = build(
        patch_size=(1, _PATCH, _PATCH),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        text_dim=_TEXT_DIM,
        freq_dim=_TEXT_DIM,
        ffn_dim=_FFN_FACTOR * width,
        num_layers=layers,
        rope_max_seq_len=max(1024, *grid_thw),
    )
    # At its initial scale attention is nearly a mean over all keys, and a wrong mask would hardly
    # show in the output; trained models attend to few.
    for block in module.blocks:
        torch.nn.init.constant_(block.attn1.norm_q.weight, _QUERY_SCALE)
    # Not module.to(): diffusers' own warns about loaded weights, of which there are none.
    module = torch.nn.Module.to(module, dtype).eval().requires_grad_(False)
    frames, height, columns = grid_thw
    inputs = {
        "hidden_states": torch.randn(
            1, _CHANNELS, frames, _PATCH * height, _PATCH * columns, dtype=dtype
        ),
        "timestep": torch.tensor([_TIMESTEP]),
        "encoder_hidden_states": torch.randn(1, _TEXT_TOKENS, _TEXT_DIM, dtype=dtype),
        "return_dict": False,
    }
    return DemoModel(module, inputs, sum(p.numel() for p in module.parameters()))


def video_size(grid_thw: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return frames, height and width of the video whose latents Wan patches to this grid.

    Wan's autoencoder compresses time by 4, after the first frame, and space by 8.
    """
    frames, height, width = grid_thw
    return 4 * (frames - 1) + 1, 8 * _PATCH * height, 8 * _PATCH * width
