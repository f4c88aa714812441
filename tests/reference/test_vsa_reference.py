"""The reference of video sparse attention against loops over tiles that share no code with it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import vsa_oracle
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from strategies import layouts
from torch import Tensor
from vsa_oracle import Case

import compiled_sparse as cs
from compiled_sparse.layout import BlockLayout

GRID, TILE, TEXT = (5, 7, 3), (2, 3, 2), (4, 9)
CASES = {
    "video": Case(GRID, TILE, 0.7),
    "video and text": Case(GRID, TILE, 0.6, TEXT),
    "published odd grid": Case((5, 7, 3), (4, 4, 4), 0.5, (0, 3)),
    "image": Case((13, 11), (3, 4), 0.8, (0, 5)),
    "audio": Case((61,), (4,), 0.85, (7, 0)),
    "more text than video": Case((3, 2), (2, 2), 0.5, (40, 3)),
    "tile larger than the grid": Case((3, 2, 2), (4, 4, 4), 0.9, (2, 0)),
}
LARGE = Case((9, 10, 7), (4, 4, 4), 0.8)
ALL_CASES = [*CASES.values(), pytest.param(LARGE, marks=pytest.mark.slow)]
GATES = ["no gate", "gate", "ungated"]


def reference(
    q: Tensor, k: Tensor, v: Tensor, case: Case, gate: Tensor | None = None, **changes: Any
) -> tuple[Tensor, Tensor]:
    """The reference with the same arguments as the oracle."""
    name = "ungated" if case.ungated else None
    arguments: dict[str, Any] = {
        "config": cs.VSA(sparsity=case.sparsity, tile_thw=case.tile, gate=name),
        "grid_thw": case.grid,
        "text": cs.Text(*case.text),
        "key_mask": case.key_mask,
        "scale": case.scale,
        "gate": gate,
        "return_lse": True,
    }
    return cs.reference.attention(q, k, v, **{**arguments, **changes})


def tensors(case: Case, kv_heads: int = 2, batch: int = 2, head_dim: int = 8) -> list[Tensor]:
    """Queries, keys, values and a gate, float64, of 2 query heads."""
    return [
        torch.randn(batch, heads, case.length, head_dim, dtype=torch.float64).requires_grad_()
        for heads in (2, kv_heads, kv_heads, 2)
    ]


def with_gate(case: Case, kind: str, inputs: list[Tensor]) -> tuple[Case, list[Tensor]]:
    if kind == "gate":
        return case, inputs
    return case._replace(ungated=kind == "ungated"), inputs[:3]


def assert_matches_oracle(inputs: list[Tensor], case: Case) -> None:
    """Check output, log-sum-exp and the gradients of everything that is given."""
    q, k, v, *gate = inputs
    out, lse = reference(q, k, v, case, *gate)
    expected = vsa_oracle.attention(q, k, v, case, *gate)
    torch.testing.assert_close(out, expected.out)
    torch.testing.assert_close(lse, expected.lse)
    weights = torch.randn_like(out), torch.randn_like(lse)
    results = [
        torch.autograd.grad(
            (each * weights[0]).sum() + (other.masked_fill(other.isinf(), 0.0) * weights[1]).sum(),
            inputs,
        )
        for each, other in ((out, lse), (expected.out, expected.lse))
    ]
    for grad, other in zip(*results, strict=True):
        assert bool((grad != 0).any())
        torch.testing.assert_close(grad, other)


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("case", ALL_CASES, ids=[*CASES, "tile of 4x4x4"])
def test_values_and_gradients_match_the_loops(case: Case, kind: str) -> None:
    case, inputs = with_gate(case, kind, tensors(case))
    assert_matches_oracle(inputs, case)


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("case", ALL_CASES, ids=[*CASES, "tile of 4x4x4"])
def test_padding_grouped_heads_and_scale_match_the_loops(case: Case, kind: str) -> None:
    key_mask = torch.rand(2, case.length) < 0.5
    key_mask[0, case.tiles[-1]] = False
    key_mask[0, case.tiles[0][0]] = len(case.tiles) > 1
    key_mask[1, case.tiles[0]] = True
    case, inputs = with_gate(case, kind, tensors(case, kv_heads=1))
    assert_matches_oracle(inputs, case._replace(key_mask=key_mask, scale=0.4))


@given(layouts(), st.floats(0, 0.99), st.booleans())
@settings(max_examples=30)
def test_any_layout_and_sparsity_matches_the_loops(
    layout: BlockLayout, sparsity: float, masked: bool
) -> None:
    case = Case(layout.grid, layout.tile, sparsity, (layout.text_before, layout.text_after))
    if masked:
        case = case._replace(key_mask=torch.rand(1, case.length) < 0.5)
    inputs = [each.detach() for each in tensors(case, batch=1, head_dim=4)]
    out, lse = reference(*inputs[:3], case, inputs[3])
    expected = vsa_oracle.attention(*inputs[:3], case, inputs[3])
    torch.testing.assert_close(out, expected.out)
    torch.testing.assert_close(lse, expected.lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [CASES["video and text"], LARGE], ids=["text", "4x4x4"])
def test_low_precision_rounds_where_the_published_code_does(case: Case, dtype: torch.dtype) -> None:
    inputs = [each.detach().to(dtype) for each in tensors(case)]
    out, lse = reference(*inputs[:3], case, inputs[3])
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    q, k, v, gate = (each.float() for each in inputs)
    expected = vsa_oracle.attention(q, k, v, case, gate, rounding=dtype)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.float(), expected.out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, expected.lse)


def test_nothing_left_out_and_no_compressed_branch_is_dense_attention() -> None:
    case = CASES["video and text"]._replace(sparsity=0.0)
    q, k, v, gate = tensors(case)
    dense = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(reference(q, k, v, case)[0], dense)
    torch.testing.assert_close(reference(q, k, v, case, torch.zeros_like(gate))[0], dense)
    assert not torch.allclose(reference(q, k, v, case._replace(ungated=True))[0], dense)


def visible_tiles(case: Case, **changes: Any) -> Tensor:
    """Number of tiles that reach the output of each video token."""
    q, k, v, _ = tensors(case, batch=1)
    out, _ = reference(q, k, v, case, **changes)
    counts = []
    for token in (tokens[0] for tokens in case.tiles):
        (grad,) = torch.autograd.grad(out[0, 0, token].sum(), v, retain_graph=True)
        reached = [bool((grad[0, 0, tokens] != 0).all()) for tokens in case.tiles]
        counts.append(sum(reached))
    return torch.tensor(counts)


@pytest.mark.parametrize(
    ("tiles", "sparsity", "kept"), [(10, 0.7, 4), (10, 0.4, 6), (20, 0.85, 4), (10, 0.99, 1)]
)
def test_the_number_of_tiles_follows_the_published_arithmetic(
    tiles: int, sparsity: float, kept: int
) -> None:
    case = Case((4 * tiles - 1,), (4,), sparsity)
    assert bool((visible_tiles(case) == kept).all())
    assert bool((visible_tiles(case._replace(sparsity=0.0), sparsity=sparsity) == kept).all())


def test_of_equal_scores_the_first_tiles_are_taken() -> None:
    case = Case((40,), (4,), 0.7)
    _, k, v, _ = tensors(case)
    q = torch.zeros_like(k)
    out, _ = reference(q, k, v, case)
    torch.testing.assert_close(out, v[:, :, :16].mean(2, keepdim=True).expand_as(out))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", GATES)
def test_what_masked_keys_hold_never_matters(bad: float, kind: str) -> None:
    case, inputs = with_gate(CASES["video and text"], kind, tensors(CASES["video and text"]))
    key_mask = torch.rand(2, case.length) < 0.7
    key_mask[0, case.tiles[3]] = False
    key_mask[1] = False
    case = case._replace(key_mask=key_mask)
    results = []
    for fill in (0.0, bad):
        leaves = [each.detach().clone() for each in inputs]
        for each in leaves[1:3]:
            each.masked_fill_(~key_mask[:, None, :, None], fill)
        leaves = [each.requires_grad_() for each in leaves]
        out, lse = reference(*leaves[:3], case, *leaves[3:])
        results.append([out, lse, *torch.autograd.grad(out.sum(), leaves)])
    for each, other in zip(*results, strict=True):
        torch.testing.assert_close(each, other)
    assert bool((results[1][0][1] == 0).all())


def test_it_can_be_differentiated_twice() -> None:
    case = Case((6,), (2,), 0.5, (1, 0))
    leaves = tensors(case, batch=1, head_dim=2)

    def small(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return reference(q, k, v, case, gate)[0]

    assert torch.autograd.gradcheck(small, leaves)
    assert torch.autograd.gradgradcheck(small, leaves)
