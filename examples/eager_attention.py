"""Sliding tile attention as a function: output, log-sum-exp and gradients, without a compiler.

python examples/eager_attention.py
"""

from __future__ import annotations

import torch

import compiled_sparse as cs


def main(grid_thw: tuple[int, int, int] = (5, 14, 18), text_tokens: int = 20) -> dict[str, float]:
    """Compare the sparse kernel with the dense masked reference; returns the largest errors."""
    torch.manual_seed(0)
    length = torch.Size(grid_thw).numel() + text_tokens
    q, k, v = (torch.randn(2, 3, length, 64, requires_grad=True) for _ in range(3))
    sta = cs.STA(window_thw=(1, 3, 3), tile_thw=(4, 4, 4))  # 4 divides none of 5, 14 and 18
    layout = {"grid_thw": grid_thw, "text": cs.Text(after=text_tokens)}

    results = []
    for attention in (cs.attention, cs.reference.attention):  # one signature, one meaning
        out, lse = attention(q, k, v, sta, **layout, return_lse=True)
        grads = torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))
        results.append((out, lse, *grads))

    names = ("output", "log-sum-exp", "gradient of q", "gradient of k", "gradient of v")
    errors = {
        name: (actual - expected).abs().max().item()
        for name, actual, expected in zip(names, *results, strict=True)
    }
    for name, error in errors.items():
        print(f"{name:14} largest difference from the reference {error:.1e}")
    return errors


if __name__ == "__main__":
    main()
