"""What a call in a ring of processes looks like while a graph is decided: shapes, never values.

`ring_whole` and `ring_own` have no implementation. A graph that is run holds neither.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compiled_sparse.ops.library import LIBRARY
from compiled_sparse.ops.library import NAMESPACE

LIBRARY.define("ring_whole(Tensor x, int num_video, int text_before, int text_after) -> Tensor")
LIBRARY.define("ring_own(Tensor out, Tensor query) -> Tensor")


def _whole_fake(x: Tensor, num_video: int, text_before: int, text_after: int) -> Tensor:
    length = text_before + num_video + text_after
    return x.new_empty((*x.shape[:2], length, x.shape[3]), requires_grad=x.requires_grad)


def _own_fake(out: Tensor, query: Tensor) -> Tensor:
    return out.new_empty((*query.shape[:3], out.shape[3]), requires_grad=out.requires_grad)


torch.library.register_fake(f"{NAMESPACE}::ring_whole", _whole_fake, lib=LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::ring_own", _own_fake, lib=LIBRARY)
