"""Blocks compiled one by one, with windows that differ by step and layer, beside dense attention.

python examples/regional_schedule.py
"""

from __future__ import annotations

import torch
from diffusers import LTXVideoTransformer3DModel

import compiled_sparse as cs

GRID = (4, 6, 8)
STEPS, LAYERS = 3, 2


def main(inner: str = "inductor") -> float:
    """Run three steps; return the largest relative error against plain attention in step 0."""
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=32,
        cross_attention_dim=64, num_layers=LAYERS, caption_channels=16,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4 * 6 * 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": torch.ones(1, 5),
        "return_dict": False,
        **dict(zip(("num_frames", "height", "width"), GRID, strict=True)),
    }
    # Step 0 sees everything, the others less and less, and differently in each layer.
    windows = ((5, 5, 5), (3, 3, 1), (1, 1, 3))
    choice = [[[min(step, 2)], [min(2 * step, 2)]] for step in range(STEPS)]
    table = cs.WindowTable(windows=windows, choice=choice)
    with torch.no_grad():
        dense = model(**inputs)[0]
        print(cs.attach(model, cs.STA(window_thw=table, tile_thw=(2, 2, 2))).report())
        model.compile_repeated_blocks(
            backend="compiled_sparse", fullgraph=True, options={"inner": inner}
        )
        after_step = cs.step_callback(STEPS)
        errors = []
        for step in range(STEPS):
            output = model(**inputs)[0]
            errors.append(float((output - dense).abs().max() / dense.abs().max()))
            print(f"step {step}: {errors[-1]:.1e} from dense attention")
            after_step(None, step, None, {})
    return errors[0]


if __name__ == "__main__":
    main()
