"""What a mechanism written for another framework's metadata finds here: docs/extending.md.

There, a builder makes a metadata object before each step and a global holds it. Here the same facts
are a frozen record that is entered like any other metadata, per thread and with an end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from compiled_sparse.layout import Text
from compiled_sparse.layout import latent_grid
from compiled_sparse.metadata import metadata


@dataclass(frozen=True, kw_only=True)
class StepMetadata:
    """What is known of one denoising step.

    Args:
        step: Index of the step, from 0; not the noise level.
        grid_thw: Token grid after patching.
        num_steps: Number of denoising steps.
        sparsity: Fraction of the work to leave out.
        text: Text tokens around the video.
    """

    step: int
    grid_thw: tuple[int, ...]
    num_steps: int | None = None
    sparsity: float | None = None
    text: Text | None = None

    def as_dict(self, skip_fields: Collection[str] = ()) -> dict[str, Any]:
        """Return the fields by name without copying their values, those to skip left out."""
        names = [field.name for field in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names if name not in skip_fields}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let it hold for the calls inside the block, as `cs.metadata` does."""
        with metadata(**self.as_dict()):
            yield


def build_metadata(
    *,
    step: int,
    raw_latent_shape: tuple[int, ...],
    patch_size: tuple[int, ...],
    num_steps: int | None = None,
    sparsity: float | None = None,
    text: Text | None = None,
) -> StepMetadata:
    """Build the metadata of a step from the shape of the latents.

    Args:
        step: Index of the step, from 0.
        raw_latent_shape: Latent extents (T, H, W) before patching.
        patch_size: Latents per token along each axis; what does not fill a patch is dropped, as a
            patch embedding drops it.
        num_steps: Number of denoising steps.
        sparsity: Fraction of the work to leave out.
        text: Text tokens around the video.

    Raises:
        LayoutError: if shape and patch differ in their number of axes, or a patch does not fit.
    """
    grid = latent_grid(raw_latent_shape, patch_size)
    return StepMetadata(step=step, grid_thw=grid, num_steps=num_steps, sparsity=sparsity, text=text)
