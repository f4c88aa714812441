"""What the form of a mask costs dense attention: every pair, every key, none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import interleaved_medians

FORMS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "pairs": lambda valid: valid[:, None, :, None] & valid[:, None, None, :],
    "keys": lambda valid: valid[:, None, None, :],
    "none": lambda valid: None,
}

_MEMORY_SCRIPT = """
import json, re, sys, torch
from benchmarks.masks import call, inputs
form, tokens = sys.argv[1], int(sys.argv[2])
call(form, *inputs(64))
arguments = inputs(tokens)
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
open("/proc/self/clear_refs", "w").write("5")  # Linux: the peak starts again from here
before = peak()
out = call(form, *arguments)
print(json.dumps((peak() - before) * 1024))
"""


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return queries, which are keys and values too, and a mask of valid tokens."""
    valid = torch.ones(1, tokens, dtype=torch.bool)
    valid[:, -tokens // 16 :] = False
    return torch.randn(1, 4, tokens, 128, dtype=dtype), valid


def call(form: str, q: Tensor, valid: Tensor) -> Tensor:
    """Make a mask of one form, as a model does in each layer, and attend."""
    with torch.no_grad():
        return F.scaled_dot_product_attention(q, q, q, attn_mask=FORMS[form](valid))


def speed(tokens: int, rounds: int) -> dict[str, Any]:
    """Time all forms in turns."""
    q, valid = inputs(tokens)
    functions = {form: (lambda form=form: call(form, q, valid)) for form in FORMS}
    seconds = interleaved_medians(functions, rounds)
    return {
        "case": f"dense attention under a mask, B1 H4 N{tokens} D128",
        "seconds": seconds,
        "times_of_none": {form: value / seconds["none"] for form, value in seconds.items()},
    }


def peak_memory(tokens: int) -> dict[str, Any]:
    """Measure how far one call raises the process's peak memory, output included; Linux only."""
    mebibytes = {}
    for form in FORMS:
        command = [sys.executable, "-c", _MEMORY_SCRIPT, form, str(tokens)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        mebibytes[form] = json.loads(result.stdout) / 2**20
    return {
        "case": f"peak memory of dense attention under a mask, B1 H4 N{tokens} D128",
        "mebibytes": mebibytes,
    }


def run(rounds: int) -> list[dict[str, Any]]:
    """Measure speed and memory."""
    return [speed(2048, rounds), speed(4096, rounds), peak_memory(4096), peak_memory(16384)]
