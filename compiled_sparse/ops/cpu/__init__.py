"""Block-sparse attention on the CPU: compiled kernels, or plain torch without a compiler.

The environment variable COMPILED_SPARSE_CPU_KERNEL chooses: `native` (C++, compiled on first use),
`portable` (torch operations), `interpreted` (the GPU kernels under Triton's interpreter, to debug
them: slow); unset means native where it compiles, else portable.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable
from typing import Final
from typing import NamedTuple

from torch import Tensor

from compiled_sparse.errors import CompiledSparseError
from compiled_sparse.errors import DeviceError
from compiled_sparse.ops.cpu import native
from compiled_sparse.ops.cpu import native_chunks
from compiled_sparse.ops.cpu import native_quantized
from compiled_sparse.ops.cpu import native_selection
from compiled_sparse.ops.cpu import portable
from compiled_sparse.ops.cpu import portable_chunks
from compiled_sparse.ops.cpu import quantized
from compiled_sparse.ops.cpu.build import NativeBuildError
from compiled_sparse.ops.cpu.build import native_library

__all__ = [
    "KERNEL_VARIABLE",
    "NativeBuildError",
    "UnknownKernelError",
    "block_sparse_backward",
    "block_sparse_forward",
    "chunk_backward",
    "chunk_forward",
    "describe",
    "interprets_gpu_kernels",
    "quantized_forward",
    "select_per_query",
    "selects_per_query",
]

KERNEL_VARIABLE: Final = "COMPILED_SPARSE_CPU_KERNEL"
INTERPRETED: Final = "interpreted"

_logger = logging.getLogger("compiled_sparse.cpu")
_lock = threading.Lock()


class UnknownKernelError(CompiledSparseError, ValueError):
    """COMPILED_SPARSE_CPU_KERNEL names no kernel."""


class _Kernel(NamedTuple):
    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    quantized: Callable[..., tuple[Tensor, Tensor]]
    chunk_forward: Callable[..., tuple[Tensor, Tensor]]
    chunk_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    select_per_query: Callable[..., Tensor] | None


_NATIVE: Final = _Kernel(
    "native",
    native.block_sparse_forward,
    native.block_sparse_backward,
    native_quantized.quantized_forward,
    native_chunks.chunk_forward,
    native_chunks.chunk_backward,
    native_selection.select_per_query,
)
_PORTABLE: Final = _Kernel(
    "portable",
    portable.block_sparse_forward,
    portable.block_sparse_backward,
    quantized.quantized_forward,
    portable_chunks.chunk_forward,
    portable_chunks.chunk_backward,
    None,
)


def block_sparse_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_counts: Tensor,
    key_mask: Tensor | None,
    q_tokens: Tensor,
    kv_tokens: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend from every query block to its listed key blocks.

    Arithmetic is float32 (float64 for float64 inputs). A query without a visible key gives zeros
    and a log-sum-exp of -inf; values at masked keys never matter, even NaN.

    Args:
        q: [B, Hq, Lq, D] of any strides; float32, float64, bfloat16 or float16.
        k: [B, Hk, Lk, D] of q's dtype; Hq is a multiple of Hk.
        v: like `k`.
        block_indices: int32 [B or 1, Hq or 1, Nq, K], key blocks of each query block without
            repetition.
        block_counts: int32 [B or 1, Hq or 1, Nq], how many leading entries of a row are valid.
        key_mask: bool [B, Lk], True where a key is attended, or None.
        q_tokens: contiguous int32 [Nq, Eq], the token in each slot of each query block, -1 in
            unused slots, which come last.
        kv_tokens: contiguous int32 [Nk, Ek], the same for keys.
        scale: Softmax scale.

    Returns:
        The output [B, Hq, Lq, D] of q's dtype over [B, Lq, Hq, D] memory, and the natural
        log-sum-exp of the scaled scores [B, Hq, Lq], float32 (float64 for float64 inputs).

    Raises:
        NativeBuildError: if the native kernels are demanded and do not compile.
        UnknownKernelError: if COMPILED_SPARSE_CPU_KERNEL names no kernel.
        BlockListError: if the native kernels meet a list or map that is out of range.
    """
    return _kernel().forward(
        q, k, v, block_indices, block_counts, key_mask, q_tokens, kv_tokens, scale
    )


def block_sparse_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor,
    block_counts: Tensor,
    key_mask: Tensor | None,
    q_tokens: Tensor,
    kv_tokens: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `block_sparse_forward` for fixed lists.

    Deterministic for a given number of threads.

    Args:
        grad_out: [B, Hq, Lq, D] of q's dtype, any strides.
        grad_lse: [B, Hq, Lq] or None for zero.
        q: As in the forward, like all arguments not described here.
        k: See `q`.
        v: See `q`.
        out: The output of the forward.
        lse: The log-sum-exp of the forward.
        block_indices: See `q`.
        block_counts: See `q`.
        key_mask: See `q`.
        q_tokens: See `q`.
        kv_tokens: See `q`.
        scale: See `q`.

    Returns:
        The gradients of q, k and v, shaped and typed like them, each over memory with heads next
        to the last dimension.

    Raises:
        NativeBuildError: as in the forward.
        UnknownKernelError: as in the forward.
        BlockListError: as in the forward.
    """
    return _kernel().backward(
        grad_out,
        grad_lse,
        q,
        k,
        v,
        out,
        lse,
        block_indices,
        block_counts,
        key_mask,
        q_tokens,
        kv_tokens,
        scale,
    )


def quantized_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_counts: Tensor,
    key_mask: Tensor | None,
    q_tokens: Tensor,
    kv_tokens: Tensor,
    scale: float,
    values: str,
) -> tuple[Tensor, Tensor]:
    """Attend in eight bits from every query block to its listed key blocks.

    The native kernel rounds weights chunk by chunk, of at most 64 keys, the portable one block by
    block; blocks of up to 64 keys give the same.

    Args:
        q: As in `block_sparse_forward`, like all arguments not described here; no float64.
        k: See `q`.
        v: See `q`.
        block_indices: See `q`.
        block_counts: See `q`.
        key_mask: See `q`.
        q_tokens: See `q`.
        kv_tokens: See `q`.
        scale: See `q`.
        values: What values and weights are rounded to, "float8" or "float16".

    Returns:
        As `block_sparse_forward`.

    Raises:
        NativeBuildError: as in `block_sparse_forward`.
        UnknownKernelError: as in `block_sparse_forward`.
    """
    return _kernel().quantized(
        q, k, v, block_indices, block_counts, key_mask, q_tokens, kv_tokens, scale, values
    )


def chunk_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected: Tensor,
    key_mask: Tensor | None,
    kv_tokens: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend from every query to the chunks that it selects.

    Args:
        q: As in `block_sparse_forward`, like all arguments not described here.
        k: See `q`; of the same length.
        v: See `q`.
        selected: int32 [B, Hq, Nk, ceil(L / 32)], bit i of word w for query 32 w + i; bits past
            the length do not matter.
        key_mask: See `q`.
        kv_tokens: See `q`.
        scale: See `q`.

    Returns:
        As `block_sparse_forward`.

    Raises:
        NativeBuildError: as in `block_sparse_forward`.
        UnknownKernelError: as in `block_sparse_forward`.
        BlockListError: as in `block_sparse_forward`.
    """
    return _kernel().chunk_forward(q, k, v, selected, key_mask, kv_tokens, scale)


def chunk_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selected: Tensor,
    key_mask: Tensor | None,
    kv_tokens: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `chunk_forward` for a fixed selection.

    Deterministic for a given number of threads.

    Args:
        grad_out: [B, Hq, L, D] of q's dtype, any strides.
        grad_lse: [B, Hq, L] or None for zero.
        q: As in the forward, like all arguments not described here.
        k: See `q`.
        v: See `q`.
        out: The output of the forward.
        lse: The log-sum-exp of the forward.
        selected: See `q`.
        key_mask: See `q`.
        kv_tokens: See `q`.
        scale: See `q`.

    Returns:
        As `block_sparse_backward`.

    Raises:
        NativeBuildError: as in `block_sparse_forward`.
        UnknownKernelError: as in `block_sparse_forward`.
        BlockListError: as in `block_sparse_forward`.
    """
    return _kernel().chunk_backward(
        grad_out, grad_lse, q, k, v, out, lse, selected, key_mask, kv_tokens, scale
    )


def selects_per_query() -> bool:
    """Whether the kernel in use has `select_per_query`.

    Raises:
        NativeBuildError: as in `block_sparse_forward`.
        UnknownKernelError: as in `block_sparse_forward`.
    """
    return _kernel().select_per_query is not None


def select_per_query(
    q: Tensor,
    means: Tensor,
    own: Tensor,
    chunk_visible: Tensor | None,
    query_visible: Tensor | None,
    *,
    text_before: int,
    text_after: int,
    runs_before: int,
    runs_after: int,
    mode: str,
    count: int,
    threshold: float,
) -> Tensor:
    """Select chunks for every query, by its product with the mean keys of chunks: the gate.

    Every query selects all text, and text selects everything. A video query also selects its own
    chunk and, if it is visible, others among the visible ones: the `count` of highest gates, or as
    few as have a share of the gates, scaled to [0, 1], of `threshold` together with the own chunk,
    but one at least. Gates are unscaled, in the dtype of the means; among equal ones the lower
    chunk comes first, NaN is the lowest.

    Args:
        q: [B, Hq, L, D] of any strides; float32, float64, bfloat16 or float16.
        means: [B, Hk, C, D], the mean keys of the chunks of video; float32, or float64 for
            float64 queries.
        own: int32 [S], the chunk of each video token, of L - text_before - text_after.
        chunk_visible: bool [B, C], True where any key is attended, or None.
        query_visible: bool [B, S], True where a video query selects by its gates, or None.
        text_before: Tokens in front of the video.
        text_after: Tokens behind the video.
        runs_before: Chunks of the text in front.
        runs_after: Chunks of the text behind.
        mode: "topk" or "threshold".
        count: How many others "topk" selects.
        threshold: The share that "threshold" selects.

    Returns:
        int32 [B, Hq, runs_before + C + runs_after, ceil(L / 32)], bit i of word w for query
        32 w + i; bits past the length are 0.

    Raises:
        UnknownKernelError: if the kernel in use has no such function.
        NativeBuildError: as in `block_sparse_forward`.
        BlockListError: if `own` is out of range.
    """
    kernel = _kernel()
    if kernel.select_per_query is None:
        raise UnknownKernelError(
            "the kernel in use cannot select chunks for each query",
            got=repr(kernel.name),
            expected=repr(_NATIVE.name),
            next_step="ask `selects_per_query` first",
        )
    return kernel.select_per_query(
        q,
        means,
        own,
        chunk_visible,
        query_visible,
        text_before=text_before,
        text_after=text_after,
        runs_before=runs_before,
        runs_after=runs_after,
        mode=mode,
        count=count,
        threshold=threshold,
    )


def interprets_gpu_kernels() -> bool:
    """Whether COMPILED_SPARSE_CPU_KERNEL asks for the GPU kernels under Triton's interpreter.

    Raises:
        DeviceError: if it does and the interpreter is not switched on.
    """
    if os.environ.get(KERNEL_VARIABLE) != INTERPRETED:
        return False
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise DeviceError(
            f"{KERNEL_VARIABLE} asks for the GPU kernels without Triton's interpreter",
            got=f"TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET')!r}",
            expected="TRITON_INTERPRET=1, set before triton is first imported",
            next_step=f"set it, or unset {KERNEL_VARIABLE}",
        )
    return True


def describe() -> dict[str, str]:
    """Say which kernel is in use, compiling it where that has not happened yet.

    Returns:
        `kernel`, the name; for the native kernel also `compiler`, `flags`, `vector` and `library`.

    Raises:
        NativeBuildError: if the native kernels are demanded and do not compile.
        UnknownKernelError: if COMPILED_SPARSE_CPU_KERNEL names no kernel.
    """
    if interprets_gpu_kernels():
        return {"kernel": INTERPRETED}
    kernel = _kernel()
    if kernel is _PORTABLE:
        return {"kernel": kernel.name}
    library = native_library()
    return {
        "kernel": kernel.name,
        "compiler": library.compiler,
        "flags": " ".join(library.flags),
        "vector": f"{library.vector_bits} bits",
        "library": str(library.path),
    }


def _kernel() -> _Kernel:
    with _lock:
        return _select(os.environ.get(KERNEL_VARIABLE) or None)


@functools.cache
def _select(name: str | None) -> _Kernel:
    """Return the kernel called `name`, or the best one here; cached, so that it warns once."""
    if name == _PORTABLE.name:
        return _PORTABLE
    if name not in (None, _NATIVE.name):
        raise UnknownKernelError(
            f"{KERNEL_VARIABLE} names no kernel",
            got=repr(name),
            expected=f"{_NATIVE.name!r}, {_PORTABLE.name!r}, {INTERPRETED!r}, or unset for the "
            "best that works",
            next_step=f"correct or unset {KERNEL_VARIABLE}",
        )
    try:
        native_library()
    except NativeBuildError as error:
        if name is not None:
            raise
        _logger.warning(
            "attention runs on the slower portable kernel: %s\nTo silence this, set %s=%s.",
            error,
            KERNEL_VARIABLE,
            _PORTABLE.name,
        )
        return _PORTABLE
    return _NATIVE
