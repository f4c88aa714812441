"""An unmodified Wan transformer of diffusers, made sparse by the compiler and checked.

python examples/wan_compiled.py
"""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel

import compiled_sparse as cs


def main(grid_thw: tuple[int, int, int] = (4, 18, 20), inner: str = "inductor") -> float:
    """Compile, report, compare; returns the relative error."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=64, num_layers=1, ffn_dim=256, text_dim=64
    ).eval()
    frames, height, width = grid_thw
    inputs = {
        "hidden_states": torch.randn(1, 16, frames, 2 * height, 2 * width),  # patches are 1x2x2
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 32, 64),
        "return_dict": False,
    }
    sta = cs.STA(window_thw=(1, 3, 3), tile_thw=(4, 4, 4))  # in tiles, and in tokens

    with torch.no_grad():
        print(cs.explain(model, policy=sta, **inputs))
        options = {"policy": sta, "inner": inner}
        compiled = torch.compile(model, backend="compiled_sparse", options=options)
        output = compiled(**inputs)[0]
        with cs.reference.override(sta, grid_thw=grid_thw):  # eager: dense, masked, slow
            expected = model(**inputs)[0]

    error = ((output - expected).norm() / expected.norm()).item()
    print(f"relative error against the reference: {error:.1e}")
    return error


if __name__ == "__main__":
    main()
