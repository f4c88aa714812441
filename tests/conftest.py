"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Waiting OpenMP threads sleep: spinning ones slow the tests tenfold where cores are shared. It is
# read when torch is loaded, so torch is imported in the fixtures.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# GPU kernels run under Triton's interpreter here, which is chosen when triton is first imported.
# One BLAS thread is faster than many on tiles of 16 rows.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A shared machine has no deadlines, and the same commit tests the same examples.
settings.register_profile("repository", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("repository")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_step_is_left_behind() -> Iterator[None]:
    """`cs.step_callback` sets the step for good: no test sees another one's."""
    from compiled_sparse.metadata import _NOTHING
    from compiled_sparse.metadata import _current

    token = _current.set(_NOTHING)
    yield
    _current.reset(token)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill every fresh allocation with NaN, so that an element nobody wrote is seen."""
    import torch

    outer = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = outer


@pytest.fixture
def gpu_kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ops run their GPU kernels on CPU tensors, under Triton's interpreter."""
    import interpreter

    interpreter.improve()
    monkeypatch.setenv("COMPILED_SPARSE_CPU_KERNEL", "interpreted")


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Give kernels two threads, however many the machine would."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forget everything that was compiled, before and after."""
    import torch

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def importable_examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let tests import the examples, which see the modules beside them as scripts do."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "examples"))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "moving_shapes"]:
        del sys.modules[name]


@pytest.fixture
def loaded_entries() -> Iterator[None]:
    """Take back what loading functions named on the command line adds, as a process's end does."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if "_entry" in name:
            del sys.modules[name]
