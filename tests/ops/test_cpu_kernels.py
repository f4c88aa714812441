"""The CPU kernels against dense attention in float64, and how one of them is chosen."""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from compiled_sparse.errors import BlockListError
from compiled_sparse.ops import cpu
from compiled_sparse.ops.cpu import build
from compiled_sparse.ops.cpu import native
from compiled_sparse.ops.cpu import portable

F32_EPS = torch.finfo(torch.float32).eps


pytestmark = pytest.mark.usefixtures("poisoned_memory")  # an element nobody writes is NaN


@pytest.fixture(params=[native, portable], ids=["native", "portable"])
def kernel(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = request.param
    return module


@dataclass(frozen=True)
class Case:
    """Sizes of a problem; `lists` is how many batch entries and heads the lists tell apart."""

    batch: int = 1
    q_heads: int = 2
    kv_heads: int = 2
    q_len: int = 150
    kv_len: int = 150
    dim: int = 32
    q_block: int = 60
    kv_block: int = 60
    width: int = 2
    lists: tuple[bool, bool] = (True, True)
    dtype: torch.dtype = torch.float32
    masked: bool = False
    magnitude: float = 1.0


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    block_indices: Tensor
    block_counts: Tensor
    key_mask: Tensor | None
    q_tokens: Tensor
    kv_tokens: Tensor
    scale: float

    def forward(self, module: ModuleType) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = module.block_sparse_forward(*vars(self).values())
        return result

    def all_results(
        self, module: ModuleType, grad_out: Tensor, grad_lse: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Output, log-sum-exp and the gradients of q, k and v."""
        out, lse = self.forward(module)
        q, k, v, *rest = vars(self).values()
        return (
            *(out, lse),
            *module.block_sparse_backward(grad_out, grad_lse, q, k, v, out, lse, *rest),
        )


def token_map(length: int, block: int) -> Tensor:
    """Random tokens in blocks; the unused slots are spread over the last two blocks."""
    blocks = -(-length // block)
    used = [block] * blocks
    unused = blocks * block - length
    if blocks > 1:
        used[-2] -= unused // 2
        unused -= unused // 2
    used[-1] -= unused
    tokens = torch.full((blocks, block), -1, dtype=torch.int32)
    tokens[torch.arange(block) < torch.tensor(used)[:, None]] = torch.randperm(length).int()
    return tokens


def make(case: Case, seed: int = 0) -> Inputs:
    torch.manual_seed(seed)
    q_tokens, kv_tokens = (
        token_map(case.q_len, case.q_block),
        token_map(case.kv_len, case.kv_block),
    )
    batch, heads = (case.batch if case.lists[0] else 1), (case.q_heads if case.lists[1] else 1)
    rows = (batch, heads, len(q_tokens))
    indices = torch.rand(*rows, len(kv_tokens)).argsort(-1)[..., : case.width].int()
    counts = torch.randint(0, indices.shape[-1] + 1, rows, dtype=torch.int32)
    # What stands behind the end of a list must not matter.
    behind = torch.arange(indices.shape[-1]) >= counts[..., None]
    q, k, v = (
        torch.randn(case.batch, heads, length, case.dim).to(case.dtype)
        for heads, length in (
            (case.q_heads, case.q_len),
            (case.kv_heads, case.kv_len),
            (case.kv_heads, case.kv_len),
        )
    )
    mask = torch.rand(case.batch, case.kv_len) > 0.4 if case.masked else None
    return Inputs(
        q=q * case.magnitude,
        k=k * case.magnitude,
        v=v,
        block_indices=indices.masked_fill(behind, -7),
        block_counts=counts,
        key_mask=mask,
        q_tokens=q_tokens,
        kv_tokens=kv_tokens,
        scale=float(case.dim) ** -0.5,
    )


def visible(x: Inputs) -> Tensor:
    """Expand the lists to bool [B, Hq, Lq, Lk]."""
    B, H = x.q.shape[:2]
    indices = x.block_indices.expand(B, H, -1, -1)
    counts = x.block_counts.expand(B, H, -1)
    seen = torch.zeros(B, H, x.q.shape[2], x.k.shape[2], dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        keys = x.kv_tokens[indices[b, h, i, : counts[b, h, i]].long()].flatten().long()
        row = torch.zeros(x.k.shape[2], dtype=torch.bool)
        row[keys[keys >= 0]] = True
        tokens = x.q_tokens[i].long()
        seen[b, h, tokens[tokens >= 0]] = row
    return seen if x.key_mask is None else seen & x.key_mask[:, None, None]


def exact_results(x: Inputs, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, ...]:
    """What `all_results` should be: dense attention and autograd in float64."""
    seen = visible(x)
    q, k, v = (t.detach().double().requires_grad_() for t in (x.q, x.k, x.v))
    group = q.shape[1] // k.shape[1]
    scores = (q @ k.repeat_interleave(group, 1).mT * x.scale).masked_fill(~seen, float("-inf"))
    lse, alive = scores.logsumexp(-1), seen.any(-1)
    p = (scores - lse.masked_fill(~alive, 0)[..., None]).exp()
    out = p @ v.repeat_interleave(group, 1)
    loss = (out * grad_out).sum() + lse[alive] @ grad_lse[alive].double()
    return (out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v)))


def plain_results(x: Inputs, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, ...]:
    """The same as anybody would write it in float32, with the rounded output in the backward."""
    seen, low, dtype = visible(x), x.q.dtype, grad_lse.dtype
    q, k, v, grad = (t.to(dtype) for t in (x.q, x.k, x.v, grad_out))
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    k, v = (t.repeat_interleave(groups[1], 1) for t in (k, v))
    scores = (q @ k.mT * x.scale).masked_fill(~seen, float("-inf"))
    lse = scores.logsumexp(-1)
    p = (scores - lse[..., None]).exp().masked_fill(~seen, 0)
    out = (p @ v).to(low)
    delta = (out.to(dtype) * grad).sum(-1) - grad_lse
    grad_scores = p * (grad @ v.mT - delta[..., None]) * x.scale
    grad_k, grad_v = (
        t.unflatten(1, groups).sum(2).to(low) for t in (grad_scores.mT @ q, p.mT @ grad)
    )
    return out, lse, (grad_scores @ k).to(low), grad_k, grad_v


def random_gradients(x: Inputs) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if x.q.dtype == torch.float64 else torch.float32
    return torch.randn_like(x.q), torch.randn(x.q.shape[:-1], dtype=lse_dtype)


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def assert_as_exact_as_dense(x: Inputs, module: ModuleType) -> None:
    """Allow twice the error of plain arithmetic, and a few roundings."""
    gradients = random_gradients(x)
    compute = gradients[1].dtype
    results = (
        x.all_results(module, *gradients),
        plain_results(x, *gradients),
        exact_results(x, *gradients),
    )
    names = ("out", "lse", "grad_q", "grad_k", "grad_v")
    for name, got, plain, exact in zip(names, *results, strict=True):
        assert got.shape == exact.shape, name
        assert got.dtype == (compute if name == "lse" else x.q.dtype), name
        finite = exact.isfinite()
        assert torch.equal(got[~finite].double(), exact[~finite]), name
        error, allowed = (largest((t.double() - exact)[finite]) for t in (got, plain))
        band = 16 * torch.finfo(compute).eps * largest(exact[finite])
        assert error <= 2 * allowed + band, f"{name}: {error:.2e}, plain {allowed:.2e}"


BASE = Case()
CASES = {
    "base": BASE,
    "float64": replace(BASE, dtype=torch.float64, dim=24),
    "bfloat16": replace(BASE, dtype=torch.bfloat16),
    "float16": replace(BASE, dtype=torch.float16),
    "float16 masked": replace(BASE, dtype=torch.float16, masked=True, kv_heads=1),
    "uneven blocks": replace(BASE, q_block=100, kv_block=36, width=4),
    "key blocks of several chunks": replace(BASE, kv_block=130, kv_len=300, q_len=70),
    "query blocks of several parts": replace(BASE, q_block=384, q_len=400, kv_len=90),
    "single-token query blocks": replace(BASE, q_block=1, q_len=9),
    "single-token key blocks": replace(BASE, kv_block=1, kv_len=90, width=70),
    "one token": replace(BASE, q_len=1, kv_len=1, q_block=1, kv_block=1, width=1),
    "grouped heads": replace(BASE, q_heads=6, kv_heads=2),
    "three heads": replace(BASE, q_heads=3, kv_heads=3),
    "batch": replace(BASE, batch=2, q_heads=4),
    "lists for all": replace(BASE, batch=2, lists=(False, False)),
    "lists by batch": replace(BASE, batch=2, lists=(True, False)),
    "lists by head": replace(BASE, batch=2, lists=(False, True)),
    "empty lists": replace(BASE, width=0),
    "mask": replace(BASE, batch=2, masked=True),
    "cross attention": replace(BASE, q_len=77, kv_len=201, q_block=16, kv_block=24, width=5),
    "long lists": replace(BASE, kv_len=900, kv_block=20, q_len=70, width=40),
    "large logits": replace(BASE, magnitude=16.0),
    "large logits in bfloat16": replace(BASE, magnitude=16.0, dtype=torch.bfloat16),
    **{f"dim {dim}": replace(BASE, dim=dim) for dim in (1, 3, 40, 80, 96, 128, 257, 512)},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_results_and_gradients_match_dense(kernel: ModuleType, case: Case) -> None:
    assert_as_exact_as_dense(make(case), kernel)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.tuples(st.integers(1, 140), st.integers(1, 140)),
    blocks=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    dim=st.integers(1, 70),
    width=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_native_matches_dense_at_any_size(
    lengths: tuple[int, int], blocks: tuple[int, int], dim: int, width: int, seed: int
) -> None:
    case = Case(
        q_len=lengths[0],
        kv_len=lengths[1],
        q_block=blocks[0],
        kv_block=blocks[1],
        dim=dim,
        width=width,
        masked=True,
    )
    assert_as_exact_as_dense(make(case, seed), native)


def test_heads_stay_next_to_the_last_dimension(kernel: ModuleType) -> None:
    x = make(replace(BASE, q_heads=4, batch=2))
    out, lse, *gradients = x.all_results(kernel, *random_gradients(x))
    assert all(t.transpose(1, 2).is_contiguous() for t in (out, *gradients))
    assert lse.is_contiguous()


def test_masked_values_never_matter(kernel: ModuleType) -> None:
    clean = make(replace(BASE, batch=2, masked=True))
    assert clean.key_mask is not None
    hidden = ~clean.key_mask[:, None, :, None]
    k, v = (t.masked_fill(hidden, float("nan")) for t in (clean.k, clean.v))
    gradients = random_gradients(clean)
    poisoned = replace(clean, k=k, v=v).all_results(kernel, *gradients)
    for expected, got in zip(clean.all_results(kernel, *gradients), poisoned, strict=True):
        assert torch.equal(expected, got)
    assert not poisoned[3].masked_fill(~hidden, 0).any()
    assert not poisoned[4].masked_fill(~hidden, 0).any()


def test_queries_without_keys_give_zero_and_no_gradient(kernel: ModuleType) -> None:
    x = make(replace(BASE, batch=2, masked=True))
    assert x.key_mask is not None
    x.key_mask[1] = False
    grad_out, grad_lse = random_gradients(x)
    out, lse, *gradients = x.all_results(kernel, grad_out.mul_(float("inf")), grad_lse)
    assert not out[1].any()
    assert (lse[1] == float("-inf")).all()
    assert all(not gradient[1].any() for gradient in gradients)


def test_lse_of_minus_infinity_silences_a_query(kernel: ModuleType) -> None:
    """Whatever its lists say: so much is promised to callers who merge partial results."""
    x = make(BASE)
    grad_out, _ = random_gradients(x)
    out, lse = x.forward(kernel)
    dead = torch.rand(lse.shape) > 0.7
    q, k, v, *rest = vars(x).values()
    nan = torch.where(dead, float("nan"), 0.0)[..., None]
    silent = kernel.block_sparse_backward(
        grad_out.masked_fill(dead[..., None], 0), None, q, k, v, out, lse, *rest
    )
    got = kernel.block_sparse_backward(
        grad_out + nan, None, q + nan, k, v, out + nan, lse.masked_fill(dead, -torch.inf), *rest
    )
    assert not got[0][dead].any()
    for a, b in zip(silent, got, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=16 * F32_EPS * a.abs().max().item())


def test_lse_may_have_no_gradient(kernel: ModuleType) -> None:
    x = make(BASE)
    grad_out, grad_lse = random_gradients(x)
    absent = x.all_results(kernel, grad_out, None)
    zero = x.all_results(kernel, grad_out, torch.zeros_like(grad_lse))
    assert all(torch.equal(a, b) for a, b in zip(absent, zero, strict=True))


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.cat([t, t + 1], dim=-1)[..., : t.shape[-1]],
    ],
    ids=["heads inside", "last stride", "slice of a fused projection"],
)
def test_strides_do_not_matter(kernel: ModuleType, layout: Callable[[Tensor], Tensor]) -> None:
    x = make(replace(BASE, batch=2))
    grad_out, grad_lse = random_gradients(x)
    expected = x.all_results(kernel, grad_out, grad_lse)
    strided = replace(x, q=layout(x.q), k=layout(x.k), v=layout(x.v))
    assert strided.q.stride() != x.q.stride()
    got = strided.all_results(kernel, layout(grad_out), layout(grad_lse[..., None])[..., 0])
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_lists_may_be_strided(kernel: ModuleType) -> None:
    x = make(replace(BASE, batch=2))
    indices = torch.stack([x.block_indices, x.block_indices + 1], -1)[..., 0]
    strided = replace(x, block_indices=indices, block_counts=x.block_counts.mT.contiguous().mT)
    assert torch.equal(strided.forward(kernel)[0], x.forward(kernel)[0])


def test_gradcheck(kernel: ModuleType) -> None:
    x = make(Case(q_len=7, kv_len=9, q_block=4, kv_block=5, dim=3, kv_heads=1, dtype=torch.float64))
    x.block_counts.clamp_(min=1)
    rest = list(vars(x).values())[3:]

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: torch.autograd.function.FunctionCtx, *qkv: Tensor
        ) -> tuple[Tensor, Tensor]:
            out, lse = kernel.block_sparse_forward(*qkv, *rest)
            ctx.save_for_backward(*qkv, out, lse)
            return out, lse

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            return kernel.block_sparse_backward(*gradients, *ctx.saved_tensors, *rest)

    assert torch.autograd.gradcheck(Attention.apply, [t.requires_grad_() for t in (x.q, x.k, x.v)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_to_nearest_even(kernel: ModuleType, dtype: torch.dtype) -> None:
    """Equal keys average the values: neighbours give exact ties, for every value there is."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, 1, 128, 512)
    neighbours = (values.view(torch.int16) + 1).view(dtype)
    tokens = torch.arange(128, dtype=torch.int32)
    x = Inputs(
        q=torch.zeros(1, 1, 128, 512, dtype=dtype),
        k=torch.zeros(1, 1, 256, 512, dtype=dtype),
        v=torch.cat([values, neighbours], 2),
        block_indices=tokens.view(1, 1, 128, 1),
        block_counts=torch.ones(1, 1, 128, dtype=torch.int32),
        key_mask=None,
        q_tokens=tokens.view(128, 1),
        kv_tokens=torch.stack([tokens, tokens + 128], 1),
        scale=1.0,
    )
    expected = ((values.float() + neighbours.float()) / 2).to(dtype)
    torch.testing.assert_close(x.forward(kernel)[0], expected, rtol=0, atol=0, equal_nan=True)


def test_nan_in_a_visible_key_reaches_its_queries_only(kernel: ModuleType) -> None:
    x = make(BASE)
    x.k[:, :, 5] = float("nan")
    poisoned = visible(x)[..., 5]
    assert poisoned.any()
    assert not poisoned.all()
    assert torch.equal(x.forward(kernel)[0].isnan().any(-1), poisoned)


@pytest.mark.usefixtures("two_threads")
def test_results_repeat_bit_for_bit(kernel: ModuleType) -> None:
    x = make(replace(BASE, q_heads=6, kv_heads=3, q_len=600, kv_len=600, width=5))
    gradients = random_gradients(x)
    first = x.all_results(kernel, *gradients)
    for _ in range(3):
        again = x.all_results(kernel, *gradients)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.usefixtures("two_threads")
def test_thread_count_changes_only_the_rounding_of_key_gradients() -> None:
    x = make(replace(BASE, q_heads=3, kv_heads=3, q_len=600, kv_len=600, width=5))
    gradients = random_gradients(x)
    two = x.all_results(native, *gradients)
    torch.set_num_threads(1)
    one = x.all_results(native, *gradients)
    assert all(torch.equal(a, b) for a, b in zip(one[:3], two[:3], strict=True))
    for a, b in zip(one[3:], two[3:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=16 * F32_EPS * a.abs().max().item())


@pytest.mark.usefixtures("two_threads")
def test_heads_too_large_to_be_packed_together() -> None:
    """A head takes the place of another only once all queries of that one are done."""
    x = make(replace(BASE, q_heads=4, kv_heads=4, q_len=300, kv_len=3000, dim=512, width=6))
    alone = [
        replace(
            x,
            **{name: getattr(x, name)[:, h : h + 1] for name in ("q", "k", "v")},
            block_indices=x.block_indices[:, h : h + 1],
            block_counts=x.block_counts[:, h : h + 1],
        ).forward(native)[0]
        for h in range(4)
    ]
    for _ in range(5):
        assert torch.equal(x.forward(native)[0], torch.cat(alone, 1))


@pytest.mark.usefixtures("two_threads")
def test_python_threads_share_the_kernels(kernel: ModuleType) -> None:
    problems = [make(replace(BASE, q_heads=4, q_len=400, kv_len=400), seed) for seed in range(4)]
    gradients = [random_gradients(x) for x in problems]
    expected = [x.all_results(kernel, *g) for x, g in zip(problems, gradients, strict=True)]
    got: dict[int, tuple[Tensor, ...]] = {}

    def work(i: int) -> None:
        for _ in range(5):
            got[i] = problems[i].all_results(kernel, *gradients[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, results in enumerate(expected):
        assert all(torch.equal(a, b) for a, b in zip(results, got[i], strict=True))


@pytest.mark.parametrize(
    "damage",
    [
        lambda x: (x.block_counts[..., 0].fill_(3), x.block_indices.fill_(0)),
        lambda x: x.block_counts.fill_(-1),
        lambda x: (x.block_counts.fill_(1), x.block_indices.fill_(3)),
        lambda x: x.kv_tokens.masked_fill_(x.kv_tokens == 149, 150),
        lambda x: x.kv_tokens.masked_fill_(x.kv_tokens == 149, -1),
        lambda x: x.q_tokens.masked_fill_(x.q_tokens == -1, 0),
    ],
    ids=["count", "negative count", "index", "token", "missing token", "token too many"],
)
def test_native_refuses_to_leave_the_tensors(damage: Callable[[Inputs], object]) -> None:
    x = make(BASE)
    damage(x)
    with pytest.raises(BlockListError, match="point outside the tensors"):
        x.forward(native)


@pytest.fixture
def fresh_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing compiled or chosen yet, and an empty cache folder, which is returned."""

    def forget() -> None:
        build._load.cache_clear()
        cpu._select.cache_clear()

    forget()
    folder = tmp_path / "cache"
    monkeypatch.setenv(build.CACHE_DIR_VARIABLE, str(folder))
    monkeypatch.delenv(cpu.KERNEL_VARIABLE, raising=False)
    yield folder
    monkeypatch.undo()
    forget()


def fake_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> Path:
    path = folder / "fake-c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(path))
    return path


def test_native_is_compiled_once_and_kept(
    fresh_choice: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    compiler = os.environ.get("CXX", "c++")
    fake_compiler(monkeypatch, tmp_path, f'echo "$@" >> {log}\nexec {compiler} "$@"')
    facts = cpu.describe()
    assert facts["kernel"] == "native"
    assert set(facts) == {"kernel", "compiler", "flags", "vector", "library"}
    assert [str(path) for path in fresh_choice.iterdir()] == [facts["library"]]
    build._load.cache_clear()
    assert cpu.describe() == facts
    assert sum(" -o " in line for line in log.read_text().splitlines()) == 1


@pytest.mark.usefixtures("fresh_choice")
def test_portable_takes_over_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake_compiler(monkeypatch, tmp_path, "echo no vectors today >&2; exit 1")
    x = make(BASE)
    with caplog.at_level(logging.WARNING, logger="compiled_sparse.cpu"):
        results = x.all_results(cpu, *random_gradients(x))
    assert torch.equal(results[0], x.forward(portable)[0])
    assert cpu.describe() == {"kernel": "portable"}
    (record,) = caplog.records
    for part in ("no working C++ compiler", "fake-c++", "no vectors today", "CXX", "=portable"):
        assert part in record.getMessage()


@pytest.mark.usefixtures("fresh_choice")
def test_demanded_native_says_why_it_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(cpu.KERNEL_VARIABLE, "native")
    script = 'case "$*" in *-dM*) exit 0;; *) echo disk on fire >&2; exit 3;; esac'
    fake_compiler(monkeypatch, tmp_path, script)
    with pytest.raises(cpu.NativeBuildError, match=r"status 3: disk on fire"):
        cpu.describe()
    monkeypatch.setenv("CXX", "nonexistent-compiler")
    with pytest.raises(cpu.NativeBuildError, match="nonexistent-compiler: not found"):
        cpu.describe()


def test_cache_folder_that_cannot_be_made(
    fresh_choice: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cpu.KERNEL_VARIABLE, "native")
    fresh_choice.write_text("a file where a folder should be")
    with pytest.raises(cpu.NativeBuildError, match=build.CACHE_DIR_VARIABLE):
        cpu.describe()


def test_broken_library_in_the_cache_is_reported(
    fresh_choice: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_key", lambda toolchain: "broken")
    fresh_choice.mkdir()
    (fresh_choice / "block_sparse-broken.so").write_bytes(b"not a library")
    with pytest.raises(cpu.NativeBuildError, match="delete that file"):
        build.native_library()


@pytest.mark.usefixtures("fresh_choice")
def test_kernel_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.KERNEL_VARIABLE, "portable")
    monkeypatch.setenv("CXX", "nonexistent-compiler")
    assert cpu.describe() == {"kernel": "portable"}
    monkeypatch.setenv(cpu.KERNEL_VARIABLE, "fast")
    with pytest.raises(cpu.UnknownKernelError, match=r"'fast'[\s\S]*'native', 'portable'"):
        cpu.describe()
