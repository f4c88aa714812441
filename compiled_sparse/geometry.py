"""What a video transformer's shape says: its token grids, and how much of its work is attention.

Plain integers: nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compiled_sparse.errors import LayoutError
from compiled_sparse.layout import Text
from compiled_sparse.layout import ceil_div
from compiled_sparse.layout import sequence_grid

_UNITS = {"frames": "frames", "height": "rows", "width": "columns"}


@dataclass(frozen=True, kw_only=True)
class VideoSize:
    """A video in pixels.

    Args:
        frames: Number of frames.
        height: Rows of a frame.
        width: Columns of a frame.
    """

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.height}x{self.width}"


@dataclass(frozen=True, kw_only=True)
class ModelGeometry:
    """The shape of a published video transformer.

    Args:
        name: Its name here.
        class_name: Its class in diffusers.
        layers: Blocks with attention over the video; refiners of the text do not count.
        heads: Attention heads.
        head_dim: Channels of a head.
        ffn_dim: Hidden channels of a block's feed-forward part.
        size: The video that the model was published with.
        kind: "self" where a call attends to the video alone, "joint" to video and text.
        vae_thw: Frames, rows and columns per latent; the first frame has a latent of its own.
        patch_thw: Latents per token along each axis.
        text: Text tokens in the sequence of a joint call.
        cross_tokens: Text tokens that are attended to by cross-attention.
        ffn_matrices: Weight matrices of a feed-forward part, 3 where it is gated.
        defaults: The fields in which the defaults of the class in diffusers are this model; tests
            compare these. The others are from the published configuration.
        notes: What is uncertain, or has to be known.
    """

    name: str
    class_name: str
    layers: int
    heads: int
    head_dim: int
    ffn_dim: int
    size: VideoSize
    kind: Literal["self", "joint"] = "self"
    vae_thw: tuple[int, int, int] = (4, 8, 8)
    patch_thw: tuple[int, int, int] = (1, 2, 2)
    text: Text = Text()
    cross_tokens: int = 0
    ffn_matrices: int = 2
    defaults: tuple[str, ...] = ()
    notes: str = ""

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim

    @property
    def block_parameters(self) -> int:
        """Weights of a block that every token meets: attention's projections, feed-forward."""
        # Of cross-attention, queries and output; its keys and values are of the text alone.
        projections = 6 if self.cross_tokens else 4
        return projections * self.width**2 + self.ffn_matrices * self.width * self.ffn_dim

    def grid_thw(
        self, frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """Return the token grid of a video.

        Args:
            frames: Number of frames; None for those of `size`, as for the other two.
            height: Rows in pixels.
            width: Columns in pixels.

        Returns:
            Tokens along time, height and width.

        Raises:
            LayoutError: if a size is none that the model takes, with the nearest ones that are.
        """
        usual = (self.size.frames, self.size.height, self.size.width)
        asked = (frames, height, width)
        given = [own if each is None else each for each, own in zip(asked, usual, strict=True)]
        vae, patch = self.vae_thw, self.patch_thw
        # Latents of time are padded to whole patches (CogVideoX 1.5), so any latent is fine there.
        self._check_extent("frames", given[0], vae[0], 1)
        self._check_extent("height", given[1], vae[1] * patch[1], 0)
        self._check_extent("width", given[2], vae[2] * patch[2], 0)
        latents = (given[0] - 1) // vae[0] + 1
        rows, columns = given[1] // (vae[1] * patch[1]), given[2] // (vae[2] * patch[2])
        return ceil_div(latents, patch[0]), rows, columns

    def _check_extent(self, name: str, extent: int, step: int, first: int) -> None:
        least = first or step
        if extent >= least and (extent - first) % step == 0:
            return
        below = max(least, extent - (extent - first) % step)
        nearest = " or ".join(
            map(str, sorted({below, max(least, below + step * (below < extent))}))
        )
        rule = f"{first} + a multiple of {step}" if first else f"a multiple of {step}"
        raise LayoutError(
            f"{self.name} has no token grid for this number of {_UNITS[name]}",
            got=f"{name}={extent}",
            expected=rule,
            next_step=f"the nearest that fits: {name}={nearest}",
        )

    def num_tokens(self, grid_thw: tuple[int, ...]) -> int:
        """Return the length of a call's sequence on a grid, text included."""
        (length,) = sequence_grid(grid_thw, self.text.before, self.text.after)
        return int(length)

    def attention_flops(self, grid_thw: tuple[int, ...]) -> int:
        """Return the FLOPs of dense attention over the video in one forward of batch 1."""
        return attention_flops(self.num_tokens(grid_thw), self.layers, self.heads, self.head_dim)

    def other_flops(self, grid_thw: tuple[int, ...]) -> int:
        """Return the FLOPs of everything else in the blocks: products with weights, text's cross.

        Embeddings, norms and the text's own part of cross-attention are left out.
        """
        tokens = self.num_tokens(grid_thw)
        of_token = 2 * self.block_parameters + 4 * self.cross_tokens * self.width
        return self.layers * tokens * of_token

    def attention_share(self, grid_thw: tuple[int, ...]) -> float:
        """Return the share of dense attention over the video in the FLOPs of a forward."""
        attention = self.attention_flops(grid_thw)
        return attention / (attention + self.other_flops(grid_thw))


def attention_flops(tokens: int, layers: int, heads: int, head_dim: int) -> int:
    """Return the FLOPs of dense attention in one forward: two products of all pairs.

    Args:
        tokens: Length of the sequence.
        layers: Number of calls.
        heads: Heads of a call.
        head_dim: Channels of a head.
    """
    return 4 * layers * tokens**2 * heads * head_dim


def whole_gain(share: float, gain: float) -> float:
    """Return what a faster part makes of the whole: Amdahl's law.

    Args:
        share: Of the part in the whole, from 0 to 1.
        gain: How many times faster the part becomes.
    """
    return 1.0 / (1.0 - share * (1.0 - 1.0 / gain))
