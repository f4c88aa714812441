"""Calibration of a divided model: every process gets the measurements that one process would."""

from __future__ import annotations

from typing import Any

import torch
from divided import Model
from processes import values
from sharded import shard_of
from torch import distributed

import compiled_sparse as cs
from compiled_sparse import calibration
from compiled_sparse.calibration import Call
from compiled_sparse.calibration import CallKey

GRID = (4, 6, 5)
TEXT = cs.Text(after=3)
CANDIDATES = ("sta:window_thw=1x3x1,tile_thw=2x3x2", "vsa:sparsity=0.5,tile_thw=2x3x2")
SUMS = ("squared_dense", "squared_error", "absolute_error", "cosine", "captured_mass")


def _measured(heads: int) -> tuple[dict[str, Any], dict[str, Any], str]:
    torch.manual_seed(0)
    rank, size = distributed.get_rank(), distributed.get_world_size()
    model = Model(heads=heads, key_heads=heads, head_dim=8).requires_grad_(False)
    whole = torch.randn(2, 123, 24)
    part = shard_of(whole[:, None], rank, size, TEXT)[:, 0]
    found = []
    for tokens, mesh in ((whole, None), (part, distributed.group.WORLD)):
        torch._dynamo.reset()
        calls = [Call(args=(tokens,), key=CallKey(sample="a", step=0))]
        with cs.metadata(grid_thw=GRID, text=TEXT, mesh=mesh):
            found.append(calibration.measure(model, calls, CANDIDATES, inner="eager"))
    policies = [calibration.fit(each, max_error=0.4).policy.to_json() for each in found]
    assert policies[0] == policies[1]
    alone, together = ([vars_of(site) for site in next(iter(m.calls.values()))] for m in found)
    return {"sites": alone}, {"sites": together}, policies[1]


def vars_of(site: Any) -> dict[str, Any]:
    numbers = {name: getattr(site, name) for name in SUMS}
    return {"path": site.path, "grid": site.grid_thw, **numbers}


def test_processes_measure_together_what_one_measures_and_fit_one_policy() -> None:
    for heads, size in ((3, 2), (2, 3)):
        results = values(size, _measured, heads)
        for alone, together, policy in results:
            assert policy == results[0][2]
            assert len(alone["sites"]) == len(together["sites"]) == 2
            for one, other in zip(alone["sites"], together["sites"], strict=True):
                assert (one["path"], one["grid"]) == (other["path"], other["grid"])
                for name in SUMS:
                    expected, given = (torch.tensor(each[name]) for each in (one, other))
                    assert given.shape[-1] == heads
                    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-6)
