"""Whether a helper op runs on the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from compiled_sparse.errors import DeviceError
from compiled_sparse.ops import cpu


def uses_gpu_kernels(tensor: Tensor) -> bool:
    """Whether the Triton kernels take this tensor: on GPUs, or interpreted where that is asked for.

    Raises:
        DeviceError: if tensors on the CPU come without Triton's interpreter.
    """
    if tensor.is_cuda:
        return True
    if not cpu.interprets_gpu_kernels():
        return False
    from compiled_sparse.kernels.tiles import INTERPRETED

    if not INTERPRETED.value:
        raise DeviceError(
            "the GPU kernels were asked for on the CPU, without Triton's interpreter",
            got=f"tensors on {tensor.device}",
            expected="TRITON_INTERPRET=1 in the environment before the first import of triton",
            next_step="set it, or unset COMPILED_SPARSE_CPU_KERNEL",
        )
    return True
