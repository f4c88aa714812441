"""What a recomputation in the backward pass is about: what its forward call was about.

`torch.utils.checkpoint` around a compiled region calls it again inside the backward pass, maybe in
another thread, after the metadata of the forward call is gone. So forward calls that may be called
again are remembered by the shapes of their inputs.
"""

from __future__ import annotations

import gc
import threading
from collections import deque
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from compiled_sparse.errors import RecomputeError
from compiled_sparse.metadata import State
from compiled_sparse.metadata import current_state
from compiled_sparse.metadata import restored
from compiled_sparse.passes.fx import hint

Shapes = tuple[tuple[int, ...], ...]

_NOTHING_SAID = State()

_MOST_CALLS = 4096
"""Calls of a kind whose inputs are looked after; one that is kept for long would hold all later."""

_regions: WeakKeyDictionary[CodeType, ForwardCalls] = WeakKeyDictionary()


class _Waiting:
    """Forward calls of the same shapes under the same metadata."""

    def __init__(self) -> None:
        self.count = 0
        self._inputs: deque[tuple[StorageWeakRef, ...]] = deque(maxlen=_MOST_CALLS)

    def add(self, inputs: Iterable[Tensor]) -> None:
        """Count a call; no backward pass can repeat it once one of its inputs is gone."""
        self.count += 1
        while self._inputs and not _are_alive(self._inputs[0]):
            self._inputs.popleft()
        self._inputs.append(tuple(StorageWeakRef(each.untyped_storage()) for each in inputs))

    @property
    def is_alive(self) -> bool:
        """Whether the inputs of a call are still there."""
        return any(map(_are_alive, self._inputs))


def _are_alive(inputs: tuple[StorageWeakRef, ...]) -> bool:
    return not any(each.expired() for each in inputs)


class ForwardCalls:
    """The forward calls of one region of code that a backward pass may compute again."""

    def __init__(self) -> None:
        self._waiting: dict[Shapes, dict[State, _Waiting]] = {}
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        """Whether any call was remembered."""
        return bool(self._waiting)

    def remember(self, shapes: Shapes, state: State, inputs: Iterable[Tensor]) -> None:
        """Remember a forward call; what was computed again meanwhile is forgotten."""
        with self._lock:
            known = self._waiting.get(shapes, {})
            kept = {each: calls for each, calls in known.items() if calls.count > 0}
            kept.setdefault(state, _Waiting()).add(inputs)
            self._waiting[shapes] = kept

    def computed_again(self, shapes: Shapes, state: State) -> None:
        """Count a recomputation; its metadata stays for a second one until the next call."""
        with self._lock:
            known = self._waiting.get(shapes, {})
            if state in known:
                known[state].count -= 1

    def candidates(self, shapes: Shapes) -> list[State]:
        """Return what calls with these shapes were about: of those whose inputs are still there.

        Where none is (inputs may be kept elsewhere meanwhile), all that are waiting count.
        """
        with self._lock:
            known = self._waiting.get(shapes, {})
            alive = [state for state, calls in known.items() if calls.is_alive]
            return alive or list(known)

    def recalled(self, shapes: Shapes, said: State = _NOTHING_SAID) -> State | None:
        """Return what the calls with these shapes were about, or None if there was none.

        Args:
            shapes: Of the inputs.
            said: What is said where the backward pass runs, which settles it if a call was about
                just that.

        Raises:
            RecomputeError: if they were about different things.
        """
        known = self.candidates(shapes)
        if said != _NOTHING_SAID and said in known:
            return said
        if len(known) > 1:
            gc.collect()  # a checkpoint whose output was dropped may be in a cycle
            known = self.candidates(shapes)
        if len(known) > 1:
            raise RecomputeError(
                "a backward pass computes a region again that could be any of several calls",
                got="forward calls of the same shapes with " + " and with ".join(map(str, known)),
                expected="one grid, step and sparsity for all calls of these shapes",
                next_step="hold the cs.metadata(...) of the forward call around backward, too",
            )
        return known[0] if known else None


class Recall:
    """Calls of one compiled graph, each under the metadata of its forward call.

    Make it while the graph is compiled: graphs of the same code, which grad mode may have compiled
    apart, share what they know.
    """

    def __init__(self) -> None:
        context = torch._guards.TracingContext.try_get()
        code = context.traced_code[0] if context is not None and context.traced_code else None
        unshared = ForwardCalls()
        self._calls = unshared if code is None else _regions.setdefault(code, unshared)
        self._activations: tuple[int, ...] | None = None

    @contextmanager
    def compiling(self, example_inputs: Sequence[Any]) -> Iterator[None]:
        """Hold the metadata of a forward call where a backward pass compiles the graph.

        The call that follows refuses what cannot be told apart; an error from here would be
        wrapped by Dynamo.

        Args:
            example_inputs: The graph's inputs.
        """
        said = current_state()
        is_again = bool(self._calls) and _in_backward()
        found = self._calls.candidates(self._shapes(example_inputs)) if is_again else []
        with restored(found[-1] if found and said not in found else said):
            yield

    def around(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return what calls a compiled graph in the same way.

        Args:
            run: The compiled graph.
        """

        def call(*inputs: Any) -> Any:
            said = current_state()
            if said == _NOTHING_SAID and not self._calls:
                return run(*inputs)
            if _in_backward():
                return self._again(run, inputs, said)
            if self._may_be_repeated(inputs):
                tensors = (inputs[index] for index in self._indices(inputs))
                self._calls.remember(self._shapes(inputs), said, tensors)
            return run(*inputs)

        return call

    def _again(self, run: Callable[..., Any], inputs: tuple[Any, ...], said: State) -> Any:
        shapes = self._shapes(inputs)
        found = self._calls.recalled(shapes, said)
        if found is None:
            return run(*inputs)
        self._calls.computed_again(shapes, found)
        with restored(found):
            return run(*inputs)

    def _may_be_repeated(self, inputs: tuple[Any, ...]) -> bool:
        """Re-entrant checkpoints run the forward pass without gradients, on inputs with them."""
        if torch.is_grad_enabled():
            return True
        return any(inputs[index].requires_grad for index in self._indices(inputs))

    def _shapes(self, inputs: Sequence[Any]) -> Shapes:
        shapes = [tuple(map(hint, inputs[index].shape)) for index in self._indices(inputs)]
        return tuple(sorted(shapes))

    def _indices(self, inputs: Sequence[Any]) -> tuple[int, ...]:
        if self._activations is None:
            self._activations = tuple(
                index
                for index, each in enumerate(inputs)
                if isinstance(each, Tensor) and not isinstance(each, nn.Parameter)
            )
        return self._activations


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
