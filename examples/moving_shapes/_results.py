"""What every training example measures."""

from __future__ import annotations

import json
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Results:
    """What was measured, all losses on the held-out videos.

    Args:
        trivial: Loss of predicting zero.
        dense_before: Dense, before fine-tuning.
        dense: Dense, fine-tuned.
        zero_shot: Sparse, before fine-tuning.
        seconds: Time it took.
    """

    trivial: float
    dense_before: float
    dense: float
    zero_shot: float
    seconds: float

    def dense_losses(self) -> dict[str, float]:
        """Return what there is to compare with, as rows of the table."""
        return {
            "predicting zero": self.trivial,
            "dense, before fine-tuning": self.dense_before,
            "dense, fine-tuned": self.dense,
        }

    def save(self, folder: Path) -> None:
        """Write all as JSON.

        Args:
            folder: Where to.
        """
        document = json.dumps(asdict(self), indent=2)
        (folder / "results.json").write_text(document + "\n", encoding="utf-8")
