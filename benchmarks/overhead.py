"""What is paid beside the arithmetic: time per call at tiny sizes, time of the pass, memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

import compiled_sparse as cs
from benchmarks.timing import interleaved_medians
from compiled_sparse.passes import SparseAttentionPass
from compiled_sparse.passes.fx import clone_dynamo_graph
from compiled_sparse.policy import as_policy

CALLS = 200

_MEMORY_SCRIPT = """
import json, re, sys, torch
from compiled_sparse.ops import block_sparse_attention
tokens, selected, direction = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
blocks = tokens // 64
def inputs(n):
    return [torch.randn(1, 4, n, 128, requires_grad=direction == "backward") for _ in range(3)]
def lists(n, k):
    return torch.arange(k, dtype=torch.int32).expand(1, 4, n, k).contiguous(), torch.full(
        (1, 4, n), k, dtype=torch.int32)
def call(q, k, v, idx, cnt):
    geometry = dict(grid=(q.shape[2],), q_tile=(64,), kv_tile=(64,))
    out, _ = block_sparse_attention(q, k, v, idx, cnt, **geometry)
    if direction == "backward":
        out.sum().backward()
    return out
call(*inputs(64), *lists(1, 1))
q, k, v = inputs(tokens)
idx, cnt = lists(blocks, selected)
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
open("/proc/self/clear_refs", "w").write("5")  # Linux: the peak starts again from here
before = peak()
out = call(q, k, v, idx, cnt)
print(json.dumps((peak() - before) * 1024))
"""


def per_call(rounds: int) -> dict[str, Any]:
    """Measure one tiny call of the op and of SDPA, in microseconds."""
    q = torch.randn(1, 1, 64, 64)
    indices = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    counts = torch.ones(1, 1, 1, dtype=torch.int32)

    def sparse() -> None:
        for _ in range(CALLS):
            cs.ops.block_sparse_attention(
                q, q, q, indices, counts, grid=(64,), q_tile=(64,), kv_tile=(64,)
            )

    def dense() -> None:
        for _ in range(CALLS):
            F.scaled_dot_product_attention(q, q, q)

    with torch.no_grad():
        seconds = interleaved_medians({"dense": dense, "compiled_sparse": sparse}, rounds)
    return {
        "case": "one call, B1 H1 N64 D64",
        "microseconds": {name: 1e6 * value / CALLS for name, value in seconds.items()},
    }


def pass_time() -> dict[str, Any]:
    """Measure the pass itself on a thirty-layer Wan graph."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        text_dim=16,
        freq_dim=16,
        ffn_dim=64,
        num_layers=30,
    ).eval()
    measured: dict[str, Any] = {"case": "the pass on a Wan graph of 30 layers"}

    def backend(graph: fx.GraphModule, _inputs: Any) -> Any:
        start = time.perf_counter()
        decisions = SparseAttentionPass(as_policy("sta"))(clone_dynamo_graph(graph))
        measured["pass_seconds"] = time.perf_counter() - start
        measured["nodes"] = len(graph.graph.nodes)
        measured["sparse_calls"] = sum(decision.is_sparse for decision in decisions)
        return graph.forward

    inputs = (torch.randn(1, 16, 4, 16, 16), torch.tensor([5.0]), torch.randn(1, 8, 16))
    start = time.perf_counter()
    with torch.no_grad():
        torch.compile(model, backend=backend)(*inputs)
    measured["dynamo_seconds"] = time.perf_counter() - start - measured["pass_seconds"]
    return measured


def peak_memory(tokens: int, selected: int, direction: str) -> dict[str, Any]:
    """Measure how far one call raises the process's peak memory, outputs included; Linux only."""
    command = [sys.executable, "-c", _MEMORY_SCRIPT, str(tokens), str(selected), direction]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    one_tensor = 4 * tokens * 128 * 4
    return {
        "case": f"peak memory of one {direction}, B1 H4 N{tokens} D128, {selected} blocks listed",
        "mebibytes": json.loads(result.stdout) / 2**20,
        "mebibytes_of_outputs": one_tensor * (1 if direction == "forward" else 4) / 2**20,
    }


def run(rounds: int) -> list[dict[str, Any]]:
    """Measure all overheads."""
    memory = [
        peak_memory(16384, selected, direction)
        for direction in ("forward", "backward")
        for selected in (6, 60)
    ]
    return [per_call(rounds), pass_time(), *memory]
