"""What calls with GPU tensors do before a kernel runs; fake tensors stand for those of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from messages import Case
from messages import assert_wording
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import compiled_sparse as cs
from compiled_sparse import errors
from compiled_sparse.config import Auto
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops import checks
from compiled_sparse.ops import gpu
from compiled_sparse.selector import CallFacts
from compiled_sparse.selector import Refused
from compiled_sparse.selector import call_supported
from compiled_sparse.selector import capabilities_of

GPU = "cuda"  # device: the tests are about what is different there; nothing is allocated
GRID = (8, 16, 16)


@pytest.fixture
def fake() -> Iterator[None]:
    """Tensors without memory, of any device."""
    with FakeTensorMode():
        yield


def tensor(head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(1, 2, 2048, head_dim, device=GPU, dtype=dtype)


@pytest.mark.parametrize(
    ("config", "grid"),
    [(cs.STA(window_thw=(1, 3, 3), tile_thw=(4, 4, 4)), GRID), (cs.SWBA(block=64), None)],
    ids=["sta", "swba"],
)
def test_a_named_mechanism_is_traced_on_a_gpu(
    config: Any, grid: tuple[int, ...] | None, fake: None
) -> None:
    q = tensor()
    out, lse = cs.attention(q, q, q, config, grid_thw=grid, return_lse=True)
    assert (out.device.type, lse.device.type) == (GPU, GPU)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"head_dim": 256, "value_dim": 256}, None),
        ({"head_dim": 320, "value_dim": 320}, "head_dim_unsupported"),
        ({"dtype": torch.float64}, "dtype_unsupported"),
    ],
    ids=str,
)
def test_a_compiled_call_is_held_against_what_gpus_take(
    changes: dict[str, Any], reason: str | None
) -> None:
    facts = {"dtype": torch.float16, "head_dim": 64, "value_dim": 64, "device": GPU, **changes}
    refused = call_supported(CallFacts(**facts))
    assert (refused.reason if isinstance(refused, Refused) else None) == reason
    assert call_supported(CallFacts(**{**facts, "device": "cpu"})) is None


def test_automatic_mode_stays_off_gpus_until_they_are_verified() -> None:
    automatic = capabilities_of(Auto())
    refused = call_supported(CallFacts(torch.float16, 64, 64, GPU), automatic)
    assert isinstance(refused, Refused)
    assert refused.reason == "device_unsupported"
    assert call_supported(CallFacts(torch.float16, 64, 64, "cpu"), automatic) is None
    assert call_supported(CallFacts(torch.float16, 64, 64, GPU), capabilities_of(cs.STA())) is None


@pytest.mark.parametrize("wish", [None, "0", "1"])
def test_the_range_of_lists_is_checked_on_request(
    wish: str | None, fake: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[object] = []
    monkeypatch.setattr(checks, "_check_list_range", lambda *arguments: checked.append(arguments))
    if wish is not None:
        monkeypatch.setenv(checks.CHECK_LISTS_VARIABLE, wish)
    layout = BlockLayout(GRID, (4, 4, 4))
    indices = torch.empty(1, 1, layout.num_blocks, 3, dtype=torch.int32, device=GPU)
    counts = torch.empty(1, 1, layout.num_blocks, dtype=torch.int32, device=GPU)
    checks.check_lists(indices, counts, tensor(), layout, layout)
    assert bool(checked) == (wish == "1")


def call(**changes: Any) -> None:
    with FakeTensorMode():
        gpu.check_supported(tensor(**changes))


CASES = {
    "dtype": Case(
        errors.DtypeError,
        "do not take this dtype",
        "torch.float64",
        "torch.float32, torch.bfloat16, torch.float16",
        "run these calls on the CPU",
        lambda: call(dtype=torch.float64),
    ),
    "head size": Case(
        errors.ShapeError,
        "do not take this head size",
        "head_dim 257",
        "at most 256",
        "policy 'dense'",
        lambda: call(head_dim=257),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_errors_say_what_to_do(case: Case) -> None:
    assert_wording(case)


def test_lists_for_all_heads_are_stored_once() -> None:
    indices = torch.arange(12, dtype=torch.int32).view(1, 1, 3, 4)
    counts = torch.full((1, 1, 3), 4, dtype=torch.int32)
    shared = gpu._stored_once(indices.expand(2, 5, -1, -1), counts.expand(2, 5, -1))
    assert [each.shape[:2] for each in shared] == [(1, 1), (1, 1)]
    half_shared = gpu._stored_once(indices.expand(2, 5, -1, -1), counts.repeat(2, 5, 1))
    assert [each.shape[:2] for each in half_shared] == [(2, 5), (2, 5)]
    assert all(each.is_contiguous() for each in (*shared, *half_shared))
