"""Functions named on the command line: `FILE.py:FUNCTION` or `package.module:function`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import textwrap
import traceback
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from types import ModuleType
from typing import Any

from compiled_sparse.errors import CompiledSparseError

_MODULE_NAME = "compiled_sparse_entry"
_MAX_MESSAGE = 300
_CORRECT = "run that line by itself, and correct it or what it needs"


class EntryError(CompiledSparseError, RuntimeError):
    """Code that was named on the command line cannot be loaded, fails or returns something else."""


@dataclass(frozen=True, kw_only=True)
class ModelCall:
    """A model and the inputs of one call.

    Args:
        model: What is called.
        args: Its inputs by position.
        kwargs: Its inputs by name.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def load_entry(text: str) -> Callable[[], Any]:
    """Load a function that takes nothing.

    Args:
        text: `FILE.py:FUNCTION`, where the file may import the modules beside it, or
            `package.module:function`, where the working directory counts as installed.

    Returns:
        The function; what it raises comes out as an `EntryError`.

    Raises:
        EntryError: if file, module or function is missing, or loading them fails.
    """
    source, colon, name = text.rpartition(":")
    if not (colon and source and name):
        raise EntryError(
            "this names no function",
            got=repr(text),
            expected="FILE.py:FUNCTION or package.module:function",
            next_step="write model.py:build, for instance",
        )
    is_file = source.endswith(".py")
    with failures_in_a_line(f"{source} cannot be loaded", next_step=_CORRECT, file=source):
        module = _load_file(Path(source)) if is_file else _load_module(source)
    file = str(getattr(module, "__file__", ""))
    function = getattr(module, name, None)
    if not callable(function):
        raise EntryError(
            f"{source} has no function {name}",
            got="no such name" if function is None else type(function).__name__,
            expected="a function that takes nothing",
            next_step=f"define {name}() in {source}, or correct the name",
        )

    def call() -> Any:
        with failures_in_a_line(f"{text} failed", next_step=_CORRECT, file=file):
            return function()

    return call


def load_model(text: str) -> ModelCall:
    """Load and call a function that returns a model and its inputs.

    Args:
        text: As for `load_entry`.

    Returns:
        The model and its inputs.

    Raises:
        EntryError: as `load_entry` does; if the function raises, or returns something else.
    """
    result = load_entry(text)()
    match result:
        case (model, Mapping() as kwargs) if callable(model) and _are_names(kwargs):
            return ModelCall(model=model, kwargs=kwargs)
        case (model, (list() | tuple()) as args, Mapping() as kwargs) if callable(
            model
        ) and _are_names(kwargs):
            return ModelCall(model=model, args=tuple(args), kwargs=kwargs)
    raise EntryError(
        f"{text} returned no model with its inputs",
        got=_described(result),
        expected="(model, kwargs) or (model, args, kwargs)",
        next_step="return the module, a tuple of inputs by position and a mapping of those by name",
    )


@contextmanager
def failures_in_a_line(problem: str, *, next_step: str, file: str = "") -> Iterator[None]:
    """Turn what foreign code raises into one error that says what, where and no more.

    Args:
        problem: What it means that the code failed.
        next_step: What to do about it.
        file: The code's own file: the innermost line of it is named, if any is in the traceback.

    Raises:
        EntryError: if the block raises or exits.
        CompiledSparseError: if it raises one, unchanged.
    """
    try:
        yield
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it is somebody else's code
        raise _in_a_line(error, problem, next_step, file) from None


def _in_a_line(
    error: BaseException, problem: str, next_step: str, file: str
) -> CompiledSparseError:
    if isinstance(error, CompiledSparseError):
        return error
    message = textwrap.shorten(str(error), _MAX_MESSAGE, placeholder=" ...")
    return EntryError(
        problem,
        got=f"{type(error).__name__}: {message} ({_place(error, file)})",
        expected="code that runs to its end",
        next_step=next_step,
    )


def _load_file(path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise EntryError(
            "there is no such file",
            got=str(path),
            expected="a Python file",
            next_step="check the path",
        )
    _make_importable(path.parent)
    spec = importlib.util.spec_from_file_location(f"{_MODULE_NAME}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as an import does: dataclasses and pickle look there
    spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise _missing_module(error, name) from None


def _missing_module(error: ModuleNotFoundError, name: str) -> ImportError | EntryError:
    """Tell a module that is missing from one that misses another."""
    if not f"{name}.".startswith(f"{error.name}."):
        return error
    return EntryError(
        "there is no such module",
        got=str(error.name),
        expected="a module that can be imported from here",
        next_step="check its name, install it, or name its file: FILE.py:FUNCTION",
    )


def _make_importable(folder: Path) -> None:
    """Let modules of a folder be imported, for good: functions may import when they are called."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _place(error: BaseException, file: str) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if file and Path(frame.filename) == Path(file).resolve()]
    last = (own or frames)[-1]
    return f"{last.filename}:{last.lineno}"


def _are_names(mapping: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) for name in mapping)


def _described(result: Any) -> str:
    if isinstance(result, tuple):
        return f"({', '.join(type(part).__name__ for part in result)})"
    return type(result).__name__
