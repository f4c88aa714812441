"""One class per failure.

Every message has four parts: what was wrong, what was got, what is expected, and what to do next.
"""

from __future__ import annotations


class CompiledSparseError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        problem: What was wrong.
        got: The offending value, in words.
        expected: What would have been accepted.
        next_step: What the reader should do now.
    """

    def __init__(self, problem: str, *, got: str, expected: str, next_step: str) -> None:
        self.problem = problem
        self.got = got
        self.expected = expected
        self.next_step = next_step
        super().__init__(
            f"{problem}\n  got:      {got}\n  expected: {expected}\n  next:     {next_step}"
        )


class ConfigError(CompiledSparseError, ValueError):
    """A mechanism config or policy holds a value that cannot be right."""


class ConfigFormatError(CompiledSparseError, ValueError):
    """A JSON document or a spec string is not a config or policy of this package."""


class UnknownMechanismError(CompiledSparseError, ValueError):
    """A mechanism name is not one of the registered names."""


class UnknownModelError(CompiledSparseError, ValueError):
    """A model or chip name is not one that is described here."""


class UnknownOptionError(CompiledSparseError, ValueError):
    """`torch.compile(..., options=...)` holds a key nobody knows."""


class LayoutError(CompiledSparseError, ValueError):
    """Grid, tile and text do not describe the given sequence."""


class MetadataError(CompiledSparseError, ValueError):
    """A step, a number of steps or a sparsity given for a call cannot be right."""


class ShapeError(CompiledSparseError, ValueError):
    """A tensor argument has the wrong shape."""


class DtypeError(CompiledSparseError, TypeError):
    """A tensor argument has a dtype that is not supported."""


class DeviceError(CompiledSparseError, RuntimeError):
    """A tensor is on a device without an implementation, or the devices are mixed."""


class BlockListError(CompiledSparseError, ValueError):
    """Block lists point outside the blocks that exist."""


class AttachError(CompiledSparseError, ValueError):
    """A model cannot be attached to as asked."""


class CheckpointError(CompiledSparseError, ValueError):
    """Names or shapes of a checkpoint do not fit the model, or each other."""


class CalibrationError(CompiledSparseError, ValueError):
    """A file of losses or of chosen windows is damaged, foreign or incomplete, or does not fit."""


class MissingGridError(CompiledSparseError, ValueError):
    """A mechanism needs the token grid and was not given one."""


class StrictRewriteError(CompiledSparseError, RuntimeError):
    """`strict=True` and a call that should have become sparse stayed dense."""


class RecomputeError(CompiledSparseError, RuntimeError):
    """A backward pass recomputes a region, and nobody can tell which call that was."""


class DistributedError(CompiledSparseError, RuntimeError):
    """Processes that compute one call together disagree, or one of them is gone."""


class GuardError(CompiledSparseError, RuntimeError):
    """A sparse call's output is not finite, or too far from dense attention's."""


class ExportError(CompiledSparseError, ValueError):
    """An exported program cannot hold what the policy asks for."""


class DoubleBackwardError(CompiledSparseError, RuntimeError):
    """A second derivative of a kernel op was asked for."""


class ForwardOnlyError(CompiledSparseError, RuntimeError):
    """Gradients were asked for of an op that has none."""


class MissingExtraError(CompiledSparseError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, *, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the optional package {package!r}",
            got=f"import {package} failed",
            expected=f"{package} installed",
            next_step=f"pip install 'compiled_sparse[{extra}]'",
        )
