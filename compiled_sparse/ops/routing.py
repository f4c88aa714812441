"""Whether an op runs on the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from compiled_sparse.ops import cpu


def uses_gpu_kernels(tensor: Tensor) -> bool:
    """Whether the Triton kernels take this tensor: on GPUs, or interpreted where that is asked for.

    Raises:
        DeviceError: if the interpreter is asked for and not switched on.
    """
    return tensor.is_cuda or cpu.interprets_gpu_kernels()
