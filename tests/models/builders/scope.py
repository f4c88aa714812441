"""The transformer classes of diffusers that have no builder, each with its reason."""

from __future__ import annotations

_SOUND = "sound, not images"
_PART = "a part of U-Nets, not a model"
_CACHE = "needs a cache of keys and values that its pipeline fills"
_LANGUAGE = "a language model whose sequence its pipeline lays out sample by sample"

OUT_OF_SCOPE = {
    "AceStepTransformer1DModel": _SOUND,
    "LongCatAudioDiTTransformer": _SOUND,
    "MiniMaxMusic3RVQDepthDecoder": _SOUND,
    "MiniMaxMusic3Transformer1DModel": _SOUND,
    "StableAudio3DiTModel": _SOUND,
    "StableAudioDiTModel": _SOUND,
    "T5FilmDecoder": _SOUND,
    "PriorTransformer": "image embeddings, no grid",
    "RFD4ProteinaTransformer": "proteins, not images",
    "DreamLiteTransformer2DModel": _PART,
    "DualTransformer2DModel": _PART,
    "Transformer2DModel": _PART,
    "TransformerTemporalModel": _PART,
    "Cosmos3OmniTransformer": _LANGUAGE,
    "AnyFlowFARTransformer3DModel": "its attention is `flex_attention` over chunks",
    "Kandinsky6SRTransformer3DModel": "its attention is sparse already, by `flex_attention`",
    "WanAnimate2Transformer3DModel": _CACHE,
}
