"""What attention over lists of blocks must give, in float64, and how far off plain code is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops.plan import block_tokens
from compiled_sparse.reference.blocks import block_of_token

GRADIENTS = ("grad_q", "grad_k", "grad_v")
HALF = (torch.bfloat16, torch.float16)
_FLOAT64_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Problem:
    """One call and the gradients that flow into it.

    Args:
        q: [batch, query heads, query length, head_dim].
        k: [batch, key heads, key length, head_dim].
        v: like `k`.
        mask: bool, broadcasts to [batch, query heads, query length, key length].
        grad_out: Gradient of the output, like `q`.
        grad_lse: Gradient of the log-sum-exp, [batch, query heads, query length].
        scale: Softmax scale.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    grad_out: Tensor
    grad_lse: Tensor
    scale: float

    @property
    def empty(self) -> Tensor:
        """Which queries see no key, [batch, query heads, query length]."""
        return ~self.mask.any(-1).expand(self.q.shape[:-1])


def list_mask(
    indices: Tensor, counts: Tensor, q_layout: BlockLayout, kv_layout: BlockLayout
) -> Tensor:
    """Expand lists of blocks to which keys each query sees, bool [B|1, H|1, Lq, Lk]."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    # Entries that do not count point at one block too many, which is cut off.
    targets = torch.where(listed, indices.long(), kv_layout.num_blocks)
    seen = torch.zeros(*counts.shape, kv_layout.num_blocks + 1, dtype=torch.bool)
    seen = seen.to(indices.device).scatter(-1, targets, True)[..., :-1]
    rows, columns = (block_of_token(each).to(indices.device) for each in (q_layout, kv_layout))
    return seen[..., rows, :][..., columns]


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return attention and log-sum-exp in the dtype of the inputs; differentiable."""
    groups = q.shape[1] // k.shape[1]
    keys, values = (each.repeat_interleave(groups, dim=1) for each in (k, v))
    scores = (scale * (q @ keys.mT)).masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp()
    return weights @ values, lse


def exact(problem: Problem) -> dict[str, Tensor]:
    """Return outputs and gradients in float64."""
    leaves = [each.detach().double().requires_grad_() for each in (problem.q, problem.k, problem.v)]
    out, lse = masked_attention(*leaves, problem.mask, problem.scale)
    finite = lse.masked_fill(lse.isinf(), 0.0)
    weights = (problem.grad_out.double(), problem.grad_lse.double())
    gradients = torch.autograd.grad((out, finite), leaves, weights)
    named = dict(zip(GRADIENTS, gradients, strict=True))
    return {"out": out.detach(), "lse": lse.detach(), **named}


def plain(problem: Problem) -> Iterator[dict[str, Tensor]]:
    """Yield outputs and gradients of plain code in the precision of the inputs, in float32.

    One implementation may round luckily. These differ in what they multiply by the scale, in the
    base of their exponentials, and, where there are any, in whether the matrix units multiply. The
    arithmetic is float32; what a kernel hands to the matrix units, P and dS, is first rounded to
    the dtype of the inputs.
    """
    for factor_on, base in product(("queries", "keys", "scores"), (math.e, 2.0)):
        yield _textbook(problem, factor_on, base, matrix_units=False)
    if problem.q.dtype in HALF and has_matrix_units(problem.q.device):
        for base in (math.e, 2.0):
            yield _textbook(problem, "scores", base, matrix_units=True)


def _textbook(
    problem: Problem, factor_on: str, base: float, *, matrix_units: bool
) -> dict[str, Tensor]:
    dtype = problem.q.dtype
    groups = problem.q.shape[1] // problem.k.shape[1]
    q = problem.q.float()
    k, v = (each.float().repeat_interleave(groups, dim=1) for each in (problem.k, problem.v))
    factors = dict.fromkeys(("queries", "keys", "scores"), 1.0)
    factors[factor_on] = problem.scale / math.log(base)

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).float()

    def times(a: Tensor, b: Tensor) -> Tensor:
        return _matrix_unit_product(a, b, dtype) if matrix_units else a @ b

    scores = times(q * factors["queries"], (k * factors["keys"]).mT) * factors["scores"]
    scores = scores.masked_fill(~problem.mask, float("-inf"))
    top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    weights = base ** (scores - top)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    out = rounded(times(rounded(weights), v) / total.masked_fill(empty, 1.0))
    lse = (top + total.log() / math.log(base)) * math.log(base)
    lse = lse.masked_fill(empty, float("-inf"))
    p = base ** (scores - lse.masked_fill(empty, 0.0) / math.log(base))
    lse = lse[..., 0]
    grad_out = problem.grad_out.float()
    delta = (grad_out * out).sum(-1) - problem.grad_lse.masked_fill(lse.isinf(), 0.0)
    grad_scores = rounded(p * (times(grad_out, v.mT) - delta[..., None]))
    grouped = (*problem.k.shape[:2], groups, *problem.k.shape[2:])
    return {
        "out": out,
        "lse": lse,
        "grad_q": times(grad_scores, k) * problem.scale,
        "grad_k": (times(grad_scores.mT, q) * problem.scale).view(grouped).sum(2),
        "grad_v": times(rounded(p).mT, grad_out).view(grouped).sum(2),
    }


def _matrix_unit_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply as matrix units do: inputs of `dtype`, sums in float32."""
    batch = a.shape[:-2]
    left, right = (x.to(dtype).flatten(0, -3).contiguous() for x in (a, b.expand(*batch, -1, -1)))
    wide = torch.bmm(left, right, out_dtype=torch.float32)
    return wide.view(*batch, *wide.shape[-2:])


@lru_cache(maxsize=4)
def has_matrix_units(device: torch.device) -> bool:
    """Whether torch multiplies half precision into float32 on a device, as kernels do."""
    if device.type != "cuda":
        return False
    a = torch.randn(2, 32, 32, device=device).bfloat16()
    try:
        wide = torch.bmm(a, a, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return bool(torch.allclose(wide, a.float() @ a.float(), rtol=1e-3, atol=1e-3))


def check_errors(
    results: dict[str, Tensor], truth: dict[str, Tensor], plains: list[dict[str, Tensor]]
) -> dict[str, float]:
    """Check results against float64 with tolerances taken from data.

    The root mean square of the error may be twice that of the worst plain implementation. Each
    element may be off by twice the largest error of a plain one, plus a rounding of its value to
    the result's dtype, plus a rounding of float32 arithmetic on the tensor's largest value.
    Float64 results must agree to nine digits.

    Args:
        results: What was computed, by name.
        truth: The same in float64.
        plains: The same from plain implementations, unrounded.

    Returns:
        Root mean square error over that of the worst plain implementation, by name.

    Raises:
        AssertionError: if a result is off by more, or is NaN; it names all that are.
    """
    ratios, complaints = {}, []
    for name, result in results.items():
        try:
            rounded = [each[name].to(result.dtype) for each in plains]
            ratios[name] = _check_error(name, result, truth[name], rounded)
        except AssertionError as error:
            complaints.append(str(error))
    if complaints:
        raise AssertionError("; ".join(complaints))
    return ratios


def _check_error(name: str, actual: Tensor, true: Tensor, plains: list[Tensor]) -> float:
    assert actual.shape == true.shape, f"{name}: shape {actual.shape}, expected {true.shape}"
    infinite = true.isinf()
    assert torch.equal(actual.double()[infinite], true[infinite]), f"{name}: infinities differ"
    nans = actual.isnan()
    assert not nans.any(), f"{name}: {int(nans.sum())} NaN, first at {_first(nans)}"
    value = true.masked_fill(infinite, 0.0)
    error = (actual.double().masked_fill(infinite, 0.0) - value).abs()
    if actual.dtype == torch.float64:
        limit = _FLOAT64_TOLERANCE * (1 + value.abs())
        assert (error <= limit).all(), f"{name}: float64 error {error.max():.3e}"
        return 0.0
    plain_errors = [(p.double().masked_fill(infinite, 0.0) - value).abs() for p in plains]
    largest = max(float(each.max()) for each in plain_errors)
    rounding = torch.finfo(actual.dtype).eps / 2 * value.abs()
    arithmetic = torch.finfo(torch.float32).eps * value.abs().max()
    excess = error - (2 * largest + rounding + arithmetic)
    assert not (excess > 0).any(), (
        f"{name}: {int((excess > 0).sum())} of {excess.numel()} elements beyond budget, worst at "
        f"{_first(excess == excess.max())}: error {error.max():.3e}, plain at most {largest:.3e}"
    )
    rms, plain_rms = _rms(error), max(_rms(each) for each in plain_errors)
    assert rms <= 2 * plain_rms + _rms(rounding), (
        f"{name}: root mean square error {rms:.3e}, plain {plain_rms:.3e}, largest error "
        f"{error.max():.3e} at {_first(error == error.max())}"
    )
    return rms / plain_rms if plain_rms else 0.0


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


def _first(where: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in where.nonzero()[0])


@dataclass(frozen=True)
class GatheredRows:
    """Some query blocks of one head with the keys they list, each block a batch entry.

    Args:
        queries: Query tokens, [rows, q block size], -1 where a block has fewer.
        keys: Listed key tokens, [rows, K * kv block size], -1 likewise.
    """

    queries: Tensor
    keys: Tensor

    @property
    def mask(self) -> Tensor:
        """Which pairs of slots are pairs of tokens, [rows, 1, queries, keys]."""
        return (self.queries >= 0)[:, None, :, None] & (self.keys >= 0)[:, None, None, :]


def gather_rows(
    indices: Tensor, counts: Tensor, rows: Tensor, q_layout: BlockLayout, kv_layout: BlockLayout
) -> GatheredRows:
    """Return the tokens that some query blocks of one head have to do with.

    Args:
        indices: Lists of one head, [query blocks, K].
        counts: Their lengths, [query blocks].
        rows: Which query blocks.
        q_layout: Layout of the queries.
        kv_layout: Layout of the keys.
    """
    device = indices.device
    q_tokens, kv_tokens = (block_tokens(each).to(device).long() for each in (q_layout, kv_layout))
    listed = torch.arange(indices.shape[-1], device=device) < counts[rows, None]
    blocks = indices[rows].long().masked_fill(~listed, 0)
    keys = kv_tokens[blocks].masked_fill(~listed[..., None], -1).flatten(1)
    return GatheredRows(q_tokens[rows], keys)


def gathered_problem(
    tensors: tuple[Tensor, Tensor, Tensor], grad_out: Tensor, grad_lse: Tensor, rows: GatheredRows
) -> Problem:
    """Return the problem of some query blocks; slots without a token hold another one's values.

    Args:
        tensors: q, k and v of one head, [length, head_dim].
        grad_out: Gradient of the head's output.
        grad_lse: Gradient of its log-sum-exp.
        rows: The blocks.
    """
    queries, keys = rows.queries.clamp_min(0), rows.keys.clamp_min(0)
    padding = (rows.queries < 0)[:, None]
    q, k, v = (
        tensor[tokens][:, None]
        for tensor, tokens in zip(tensors, (queries, keys, keys), strict=True)
    )
    return Problem(
        q,
        k,
        v,
        rows.mask,
        grad_out[queries][:, None].masked_fill(padding[..., None], 0.0),
        grad_lse[queries][:, None].masked_fill(padding, 0.0),
        float(q.shape[-1]) ** -0.5,
    )


def scatter_rows(results: dict[str, Tensor], rows: GatheredRows, length: int) -> dict[str, Tensor]:
    """Bring what a gathered problem gave back to the head's own tokens, adding where keys meet."""
    scattered = {}
    for name, result in results.items():
        tokens = rows.keys if name in ("grad_k", "grad_v") else rows.queries
        valid = tokens >= 0
        values = result[:, 0][valid]
        target = values.new_zeros(length, *values.shape[1:])
        scattered[name] = target.index_add(0, tokens[valid], values)
    return scattered
