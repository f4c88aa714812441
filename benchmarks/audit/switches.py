"""The switches that choose among kernel variants, set for the length of a block."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from compiled_sparse.kernels.tuning import BOXES_VARIABLE


@contextmanager
def switches(precision: str, boxes: bool) -> Iterator[None]:
    """Set how float32 products are made and whether boxes are fetched, inside the block.

    Args:
        precision: `ieee` or `tf32`.
        boxes: Whether the bulk copy engine fetches tiles where it can.
    """
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    wish = os.environ.get(BOXES_VARIABLE)
    os.environ[BOXES_VARIABLE] = str(int(boxes))
    try:
        yield
    finally:
        matmul.fp32_precision = before
        os.environ.pop(BOXES_VARIABLE)
        if wish is not None:
            os.environ[BOXES_VARIABLE] = wish
