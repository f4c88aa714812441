"""Geometries of published video models: layers, heads, patches, text, and the usual video.

    geometry("wan2.1-t2v-14b").grid_thw(81, 720, 1280)

Layers, heads, head sizes, patches and feed-forward sizes that `ModelGeometry.defaults` names are
those of the class in diffusers, and tests hold them to it; tests also count the FLOPs of a block of
each class. What else is here is from the published configurations. Nothing here imports torch or
diffusers.
"""

from __future__ import annotations

import dataclasses

from compiled_sparse.errors import UnknownModelError
from compiled_sparse.geometry import ModelGeometry
from compiled_sparse.geometry import VideoSize
from compiled_sparse.layout import Text

__all__ = ["MODELS", "ModelGeometry", "VideoSize", "geometry"]

_WAN_14B = ModelGeometry(
    name="wan2.1-t2v-14b",
    class_name="WanTransformer3DModel",
    layers=40,
    heads=40,
    head_dim=128,
    ffn_dim=13824,
    cross_tokens=512,
    size=VideoSize(frames=81, height=720, width=1280),
    defaults=("layers", "heads", "head_dim", "ffn_dim", "patch_thw"),
)

_WAN_FAMILY = (
    ModelGeometry(
        name="wan2.1-t2v-1.3b",
        class_name="WanTransformer3DModel",
        layers=30,
        heads=12,
        head_dim=128,
        ffn_dim=8960,
        cross_tokens=512,
        size=VideoSize(frames=81, height=480, width=832),
        defaults=("head_dim", "patch_thw"),
    ),
    _WAN_14B,
    dataclasses.replace(
        _WAN_14B,
        name="wan2.2-t2v-a14b",
        notes="Two transformers of this geometry; each denoising step runs one of them.",
    ),
    ModelGeometry(
        name="wan2.2-ti2v-5b",
        class_name="WanTransformer3DModel",
        layers=30,
        heads=24,
        head_dim=128,
        ffn_dim=14336,
        vae_thw=(4, 16, 16),
        cross_tokens=512,
        size=VideoSize(frames=121, height=704, width=1280),
        defaults=("head_dim", "patch_thw"),
    ),
)

_HUNYUAN_FAMILY = (
    ModelGeometry(
        name="hunyuanvideo",
        class_name="HunyuanVideoTransformer3DModel",
        layers=60,
        heads=24,
        head_dim=128,
        ffn_dim=12288,
        kind="joint",
        text=Text(after=256),
        size=VideoSize(frames=129, height=720, width=1280),
        defaults=("layers", "heads", "head_dim", "ffn_dim", "patch_thw"),
        notes="20 blocks of two streams and 40 of one. The text is padded to 256 tokens under a "
        "mask.",
    ),
    ModelGeometry(
        name="hunyuanvideo-1.5",
        class_name="HunyuanVideo15Transformer3DModel",
        layers=54,
        heads=16,
        head_dim=128,
        ffn_dim=8192,
        kind="joint",
        vae_thw=(4, 16, 16),
        patch_thw=(1, 1, 1),
        text=Text(after=1985),
        size=VideoSize(frames=121, height=480, width=848),
        defaults=("layers", "heads", "head_dim", "ffn_dim", "patch_thw"),
        notes="Text length uncertain: 1000 + 256 text and 729 image tokens are the longest, and "
        "those that a prompt does not fill are masked.",
    ),
)

_COGVIDEOX_5B = ModelGeometry(
    name="cogvideox-5b",
    class_name="CogVideoXTransformer3DModel",
    layers=42,
    heads=48,
    head_dim=64,
    ffn_dim=12288,
    kind="joint",
    text=Text(before=226),
    size=VideoSize(frames=49, height=480, width=720),
    defaults=("head_dim", "patch_thw", "text", "size"),
)

_COGVIDEOX_FAMILY = (
    dataclasses.replace(
        _COGVIDEOX_5B,
        name="cogvideox-2b",
        layers=30,
        heads=30,
        ffn_dim=7680,
        defaults=("layers", "heads", "head_dim", "ffn_dim", "patch_thw", "text", "size"),
    ),
    _COGVIDEOX_5B,
    dataclasses.replace(
        _COGVIDEOX_5B,
        name="cogvideox1.5-5b",
        patch_thw=(2, 2, 2),
        size=VideoSize(frames=81, height=768, width=1360),
        defaults=("head_dim", "text"),
        notes="Text length uncertain: pipelines pad to 226 tokens, the configuration says 224. "
        "Latents are padded to an even number of frames.",
    ),
)

_OTHERS = (
    ModelGeometry(
        name="ltx-video",
        class_name="LTXVideoTransformer3DModel",
        layers=28,
        heads=32,
        head_dim=64,
        ffn_dim=8192,
        vae_thw=(8, 32, 32),
        patch_thw=(1, 1, 1),
        cross_tokens=128,
        size=VideoSize(frames=161, height=512, width=704),
        defaults=("layers", "heads", "head_dim", "ffn_dim", "patch_thw"),
    ),
    ModelGeometry(
        name="mochi-1",
        class_name="MochiTransformer3DModel",
        layers=48,
        heads=24,
        head_dim=128,
        ffn_dim=8192,
        ffn_matrices=3,
        kind="joint",
        vae_thw=(6, 8, 8),
        text=Text(after=256),
        size=VideoSize(frames=163, height=480, width=848),
        defaults=("layers", "heads", "head_dim", "ffn_dim", "patch_thw", "text"),
        notes="At most 256 text tokens; padding is cut off. diffusers' attention of this model is "
        "in no graph, so it stays dense there (docs/recipes.md).",
    ),
)

MODELS: dict[str, ModelGeometry] = {
    each.name: each for each in (*_WAN_FAMILY, *_HUNYUAN_FAMILY, *_COGVIDEOX_FAMILY, *_OTHERS)
}
"""The known models by name."""


def geometry(name: str) -> ModelGeometry:
    """Return the geometry of a published model.

    Args:
        name: One of `MODELS`, in any case.

    Raises:
        UnknownModelError: if the model is not known.
    """
    found = MODELS.get(name.strip().lower())
    if found is None:
        raise UnknownModelError(
            "the geometry of this model is not known",
            got=repr(name),
            expected="one of " + ", ".join(MODELS),
            next_step="correct the name, or give grid, heads and head size yourself",
        )
    return found
