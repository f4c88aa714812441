"""The backend over inductor, and what needs a process of its own: caches, logging."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from modules import POLICY
from modules import TinyDiT
from modules import assert_close
from modules import assert_gradients_close
from modules import compile_sparse
from modules import dit_inputs
from modules import expected_output
from modules import parameter_gradients

import compiled_sparse as cs

TESTS = Path(__file__).parent

TRAIN = """
import json

import torch
from modules import TinyDiT, compile_sparse, dit_inputs
from torch._dynamo.utils import counters

torch.manual_seed(0)
model, inputs = TinyDiT(1), dit_inputs()
output = compile_sparse(model, inner="inductor")(*inputs)
output.square().sum().backward()
total = sum(float(p.grad.double().abs().sum()) for p in model.parameters())
hits = {
    "fxgraph": counters["inductor"]["fxgraph_cache_hit"],
    "fxgraph_miss": counters["inductor"]["fxgraph_cache_miss"],
    "autograd": counters["aot_autograd"]["autograd_cache_hit"],
    "bypass": counters["aot_autograd"]["autograd_cache_bypass"],
}
print(json.dumps({**hits, "output": float(output.detach().double().sum()), "gradients": total}))
"""

FORWARD = """
from modules import TinyDiT, compile_sparse, dit_inputs

compile_sparse(TinyDiT(1))(*dit_inputs())
"""


def _run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(TESTS), **environment}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=280,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_computes_values_and_gradients_of_the_reference(dynamic: bool) -> None:
    model = TinyDiT(1)
    compiled = compile_sparse(model, inner="inductor", dynamic=dynamic)
    for grid in ((3, 4, 5), (5, 7, 6)):
        inputs = dit_inputs(grid, batch=2)
        expected = expected_output(model, *inputs, grid_thw=grid)
        actual = compiled(*inputs)
        assert_close(actual, expected)
        assert_gradients_close(
            parameter_gradients(model, actual), parameter_gradients(model, expected)
        )


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor_calls_the_kernel_once_per_attention_call() -> None:
    from torch._inductor.utils import fresh_cache
    from torch._inductor.utils import run_and_get_code

    model, inputs = TinyDiT(2).requires_grad_(False), dit_inputs()
    with fresh_cache():
        _, sources = run_and_get_code(compile_sparse(model, inner="inductor"), *inputs)
    code = "\n".join(sources)
    assert code.count("torch.ops.compiled_sparse.block_sparse_attention.default(") == 2
    assert "compiled_sparse.sta.default" not in code


@pytest.mark.slow
def test_a_second_process_finds_the_compiled_graphs_in_the_caches(tmp_path: Path) -> None:
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    first, second = (json.loads(_run(TRAIN, **cache).stdout.splitlines()[-1]) for _ in range(2))
    assert first["fxgraph"] == first["autograd"] == first["bypass"] == 0
    assert second["fxgraph"] == 2
    assert second["fxgraph_miss"] == 0
    assert second["autograd"] == 1
    assert second["output"] == first["output"]
    assert second["gradients"] == pytest.approx(first["gradients"], rel=1e-9)


@pytest.mark.slow
def test_torch_logs_shows_each_decision() -> None:
    quiet, loud = _run(FORWARD), _run(FORWARD, TORCH_LOGS="+compiled_sparse")
    assert "attn1" not in quiet.stderr
    assert "1 of 2 attention calls sparse, density 0.125, 1 cross_attention" in loud.stderr
    assert "path='blocks.0.attn1'" in loud.stderr
    assert "reason='cross_attention'" in loud.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_another_policy_does_not_reuse_a_cached_graph() -> None:
    model, inputs = TinyDiT(1).requires_grad_(False), dit_inputs()
    wider = cs.STA(window_thw=(1, 3, 1), tile_thw=(2, 3, 2))
    for config in (POLICY, wider, POLICY):
        torch._dynamo.reset()
        actual = compile_sparse(model, inner="inductor", policy=config)(*inputs)
        assert_close(actual, expected_output(model, *inputs, config=config))
