"""What the kernels can reach on an H100, from counts and from what the compiler made of them.

python -m benchmarks.audit.predict RECORD [--head-dim 128]

RECORD is what `python -m benchmarks.audit --chips sm_90 --output RECORD` wrote. A prediction, to be
held against `make gpu-check`: products, softmax and cache traffic each take their time; programs on
one multiprocessor overlap, steps of one program do not.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLOCK = 1.83e9
MULTIPROCESSORS = 132
PRODUCT_FLOPS = 4096  # per clock and multiprocessor, bfloat16
EXPONENTIALS = 16
FLOAT_OPERATIONS = 128
CACHE_BYTES = 5.5e12 / CLOCK / MULTIPROCESSORS  # second-level cache, assumed
SHARED_BYTES = 232_448
REGISTERS = 65_536
OPERATIONS_PER_SCORE = 4.5  # scale, maximum, mask, sum, and half a conversion

PRODUCTS = {
    "attention_forward": 2,
    "attention_forward_boxes": 2,
    "attention_backward_queries": 3,
    "attention_backward_keys": 4,
}
USEFUL_PRODUCTS = {
    "attention_forward": 2,
    "attention_forward_boxes": 2,
    "attention_backward_queries": 2,
    "attention_backward_keys": 3,
}
"""Of the customary five of a backward; the other two are computed a second time."""


@dataclass(frozen=True)
class Prediction:
    """Clocks of one step of one program, and the rate that follows.

    Args:
        kernel: Its name.
        queries: Rows of queries at a step.
        keys: Rows of keys at a step.
        programs: Programs that fit on one multiprocessor.
        product: Clocks of the matrix instructions.
        softmax: Clocks of exponentials and float32 arithmetic.
        cache: Clocks of the loads from the second-level cache.
        tflops: Useful operations per second, in 10^12.
    """

    kernel: str
    queries: int
    keys: int
    programs: int
    product: float
    softmax: float
    cache: float
    tflops: float


def predict(record: dict[str, Any]) -> Prediction:
    """Predict one kernel from its record in the audit."""
    kernel, head_dim = record["kernel"], record["head_dim"]
    queries, keys = record["queries"], record["keys"]
    scores = queries * keys
    product = PRODUCTS[kernel] * 2 * scores * head_dim / PRODUCT_FLOPS
    softmax = scores / EXPONENTIALS + scores * OPERATIONS_PER_SCORE / FLOAT_OPERATIONS
    fetched = queries if kernel == "attention_backward_keys" else keys
    cache = 2 * fetched * head_dim * 2 / CACHE_BYTES
    threads = 32 * record["warps"]
    by_registers = REGISTERS // (record["registers"] * threads)
    programs = max(1, min(SHARED_BYTES // (record["shared"] + 1024), by_registers))
    clocks = max(product, softmax, cache, (product + softmax) / programs)
    useful = USEFUL_PRODUCTS[kernel] * 2 * scores * head_dim
    tflops = useful / clocks * CLOCK * MULTIPROCESSORS / 1e12
    return Prediction(kernel, queries, keys, programs, product, softmax, cache, tflops)


def predictions(records: list[dict[str, Any]], head_dim: int) -> Iterator[Prediction]:
    """Yield a prediction for every attention kernel on whole tiles in bfloat16, each cut once."""
    seen = set()
    for record in records:
        wanted = record["kernel"] in PRODUCTS and record["dtype"] == "bfloat16"
        if not wanted or record["chip"] != "sm_90" or record["head_dim"] != head_dim:
            continue
        cut = (record["kernel"], record["queries"], record["keys"])
        if cut not in seen:
            seen.add(cut)
            yield predict(record)


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit.predict", description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--head-dim", type=int, default=128)
    arguments = parser.parse_args()
    records = json.loads(arguments.record.read_text())["kernels"]
    print("| kernel | queries x keys | programs | products | softmax | cache | TFLOP/s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for each in predictions(records, arguments.head_dim):
        clocks = f"{each.product:.0f} | {each.softmax:.0f} | {each.cache:.0f}"
        size = f"{each.queries} x {each.keys}"
        print(f"| `{each.kernel}` | {size} | {each.programs} | {clocks} | {each.tflops:.0f} |")


if __name__ == "__main__":
    main()
