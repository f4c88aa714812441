"""What one run of the check was asked for; handed from the command line to every process."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CaseFunction = Callable[[], dict[str, Any]]
"""Runs one case: returns what belongs into the record, raises if a check failed."""


class SkippedError(Exception):
    """A case that cannot run on this machine; its message says why."""


@dataclass(frozen=True)
class Settings:
    """Device and size of a run.

    Args:
        device: "cuda" or "cpu".
        quick: Tiny sizes and few cases, to test the harness itself.
        deadline: Time (as of `time.time`) after which no case starts; those at work are stopped.
    """

    device: str
    quick: bool
    deadline: float

    def to_json(self) -> str:
        """Return the settings as JSON, for another process."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Settings:
        """Return what `to_json` wrote."""
        return Settings(**json.loads(text))
