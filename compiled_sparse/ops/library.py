"""The operator namespace all ops of this package live in."""

from __future__ import annotations

import torch

NAMESPACE = "compiled_sparse"

LIBRARY = torch.library.Library(NAMESPACE, "DEF")
