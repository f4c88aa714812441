"""What the ops of a calibration sum up, against the definition written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import compiled_sparse as cs
from compiled_sparse.ops import candidate_errors as module
from compiled_sparse.ops.candidate_errors import SUMS
from compiled_sparse.ops.candidate_errors import sampled_positions

OPS = torch.ops.compiled_sparse


def call(
    dtype: torch.dtype = torch.float32, *, key_heads: int = 4
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (torch.randn(2, heads, 30, 16) for heads in (4, key_heads, key_heads))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def test_sums_are_those_of_the_definition() -> None:
    dense, out = torch.randn(2, 2, 3, 30, 8)
    lse, full = torch.randn(2, 3, 30), torch.randn(2, 3, 30)
    positions = sampled_positions(30, 7, torch.device("cpu"))
    sums = OPS.candidate_errors(dense, out, lse, full[:, :, positions], None)
    assert sums.dtype == torch.float64
    for head in range(3):
        a, b = dense[:, head].double(), out[:, head].double()
        expected = {
            "elements": 2 * 30 * 8,
            "squared_error": ((a - b) ** 2).sum(),
            "absolute_error": (a - b).abs().sum(),
            "squared_dense": (a * a).sum(),
            "squared_sparse": (b * b).sum(),
            "product": (a * b).sum(),
            "rows": 2 * 7,
            "captured_mass": (lse - full)[:, head, positions].double().exp().sum(),
        }
        for name, value in zip(SUMS, sums[head], strict=True):
            assert float(value) == pytest.approx(float(expected[name]), rel=1e-5), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_sampled_log_sums_are_those_of_dense_attention(dtype: torch.dtype, key_heads: int) -> None:
    q, k, _ = call(dtype, key_heads=key_heads)
    mask = torch.arange(30) < torch.tensor([30, 17])[:, None]
    for key_mask in (None, mask):
        found = OPS.sampled_log_sums(q, k, key_mask, 5, 0.3)
        scores = 0.3 * q.double() @ k.double().repeat_interleave(4 // key_heads, 1).transpose(2, 3)
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
        rows = scores.logsumexp(-1)[:, :, [0, 6, 12, 18, 24]]
        torch.testing.assert_close(found.double(), rows, rtol=1e-5, atol=1e-5)


def test_more_rows_than_tokens_are_all_tokens() -> None:
    q, k, _ = call()
    assert OPS.sampled_log_sums(q, k, None, 1000, None).shape == (2, 4, 30)
    assert sampled_positions(30, 1000, torch.device("cpu")).tolist() == list(range(30))


def test_what_is_hidden_counts_nowhere() -> None:
    q, k, v = call()
    mask = torch.arange(30) < torch.tensor([30, 17])[:, None]
    dense = F.scaled_dot_product_attention(q, k, v, mask[:, None, None])
    config = cs.STA(window_thw=(1, 1), tile_thw=(2, 3))
    out, lse = cs.attention(q, k, v, config, grid_thw=(5, 6), key_mask=mask, return_lse=True)
    sampled = OPS.sampled_log_sums(q, k, mask, 30, None)
    sums = OPS.candidate_errors(dense, out, lse, sampled, mask)
    for tensor in (dense, out):
        tensor[1, :, 17:] = torch.nan
    poisoned = OPS.candidate_errors(dense, out, lse, sampled, mask)
    assert torch.equal(sums, poisoned)
    assert sums[:, SUMS.index("elements")].tolist() == [47 * 16] * 4
    assert sums[:, SUMS.index("rows")].tolist() == [47] * 4


def test_captured_mass_is_the_share_of_dense_weights_on_the_kept_keys() -> None:
    q, k, v = call()
    config = cs.STA(window_thw=(1, 3), tile_thw=(1, 2))
    _, lse = cs.attention(q, k, v, config, grid_thw=(5, 6), return_lse=True)
    sampled = OPS.sampled_log_sums(q, k, None, 30, None)
    sums = OPS.candidate_errors(v, v, lse, sampled, None)
    weights = (q.double() @ k.double().transpose(2, 3) / 4).softmax(-1)
    row, column = torch.arange(30) // 6, torch.arange(30) % 6 // 2
    start = (column - 1).clamp(0, 0)  # three of three tiles
    kept = (row[:, None] == row) & (column >= start[:, None])
    mass = (weights * kept).sum(-1).mean((0, 2))
    found = sums[:, SUMS.index("captured_mass")] / sums[:, SUMS.index("rows")]
    torch.testing.assert_close(found, mass, rtol=1e-5, atol=1e-6)


def test_a_row_without_keys_has_no_mass_to_capture() -> None:
    dense = torch.zeros(1, 1, 4, 8)
    lse = torch.full((1, 1, 4), -torch.inf)
    sums = OPS.candidate_errors(dense, dense, lse, lse, None)
    assert sums[0, SUMS.index("rows")] == 0
    assert sums[0, SUMS.index("captured_mass")] == 0


def test_the_ops_pass_opcheck() -> None:
    q, k, v = call()
    mask = torch.ones(2, 30, dtype=torch.bool)
    lse = torch.randn(2, 4, 30)
    for key_mask in (None, mask):
        torch.library.opcheck(OPS.sampled_log_sums.default, (q, k, key_mask, 7, None))
        sampled = OPS.sampled_log_sums(q, k, key_mask, 7, None)
        torch.library.opcheck(OPS.candidate_errors.default, (v, q, lse, sampled, key_mask))


def test_one_head_is_worked_on_at_a_time() -> None:
    """What is needed beside inputs and result does not grow with the number of heads."""
    needed = []
    for heads in (2, 8):
        dense, out = torch.randn(2, 1, heads, 512, 64)
        lse = torch.zeros(1, heads, 512)
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            module._candidate_errors(dense, out, lse, lse[..., :16], None)
        needed.append(max(event.cpu_memory_usage for event in profile.function_events))
    assert needed[1] <= 2 * needed[0]
