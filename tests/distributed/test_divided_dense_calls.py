"""Calls that stay dense where tokens are divided: right, as on one process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from dividing import GRID
from dividing import STA
from dividing import Refined
from dividing import Single
from dividing import moba_over_heads
from dividing import sequence
from dividing import with_keys_gathered
from processes import values
from torch import Tensor
from torch import distributed
from torch import nn

import compiled_sparse as cs
from compiled_sparse import registry


def _foreign() -> Any:
    sys.path.insert(0, str(Path(__file__).parents[1] / "foreign"))
    import topblocks

    registry.register(topblocks.MECHANISM)
    return topblocks.TopBlocks()


class _Whole(nn.Module):
    """Video among itself, then to refined text."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.refined = Single(), Refined()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.refined(x + self.own(x), text)


def _error(model: nn.Module, policy: Any, *rest: Tensor, alone: nn.Module | None = None) -> float:
    """Run on this rank's half; return how far that is from the same half of the whole."""
    whole, rank = sequence(120), distributed.get_rank()
    torch._dynamo.reset()
    options = {"policy": policy, "inner": "eager"}
    compiled = torch.compile(model, backend="compiled_sparse", fullgraph=True, options=options)
    with torch.no_grad():
        expected = (alone or model)(whole, *rest).chunk(2, 1)[rank]
        with cs.metadata(grid_thw=GRID, mesh=distributed.group.WORLD):
            out = compiled(whole.chunk(2, 1)[rank], *rest)
    return float((out - expected).abs().max())


def _errors() -> dict[str, float]:
    torch.manual_seed(0)
    single, gathering = Single(), Single(with_keys_gathered)
    gathering.load_state_dict(single.state_dict())
    policies = {
        "overall": moba_over_heads("overall"),
        "block": moba_over_heads("block"),
        "foreign": _foreign(),
    }
    found = {name: _error(single, policy) for name, policy in policies.items()}
    found["gathered"] = _error(gathering, STA, alone=single)
    found["with text"] = _error(_Whole(), "dense", sequence(7))
    found["sparse"] = _error(single, STA)
    return found


def test_what_is_refused_is_as_on_one_process() -> None:
    for found in values(2, _errors):
        assert found.pop("sparse") > 1e-2
        assert max(found.values()) < 1e-5, found
