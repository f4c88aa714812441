"""What the training examples share: data, model, training, and what is printed."""

from __future__ import annotations
