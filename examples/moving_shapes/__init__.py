"""The parts of examples/train_moving_shapes.py: data, model, training, and what is printed."""

from __future__ import annotations
