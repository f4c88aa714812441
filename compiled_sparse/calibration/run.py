"""Measuring candidates in the calls of a model, without editing or changing it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compiled_sparse.backend import compiled_sparse_backend
from compiled_sparse.calibration.entries import Entries
from compiled_sparse.calibration.entries import open_entries
from compiled_sparse.calibration.measurements import BRANCHES
from compiled_sparse.calibration.measurements import CallKey
from compiled_sparse.calibration.measurements import Measurements
from compiled_sparse.calibration.measurements import SiteErrors
from compiled_sparse.compiling import compiled_apart
from compiled_sparse.compiling import plain
from compiled_sparse.config import Auto
from compiled_sparse.config import Dense
from compiled_sparse.config import MechanismConfig
from compiled_sparse.config import is_count
from compiled_sparse.config import parse_spec
from compiled_sparse.errors import CalibrationError
from compiled_sparse.layout import Text
from compiled_sparse.metadata import current_call
from compiled_sparse.metadata import metadata
from compiled_sparse.passes.probe import Probe
from compiled_sparse.passes.probe import ProbedSite
from compiled_sparse.policy import Policy

Candidates = Sequence[MechanismConfig | str]
ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the model to measure in.

    Args:
        kwargs: Its keyword arguments.
        args: Its positional arguments.
        key: Which call it is; each of a run has its own.
        grid_thw: Token grid, for models whose graph does not show it; see `cs.metadata`.
        text: Text tokens around the video, likewise.
    """

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    args: tuple[Any, ...] = ()
    key: CallKey = field(default_factory=CallKey)
    grid_thw: tuple[int, ...] | None = None
    text: Text | None = None


def measure(
    model: Callable[..., Any],
    calls: Iterable[Call],
    candidates: Candidates,
    *,
    journal: str | Path | None = None,
    inner: str = "inductor",
    rows: int = ROWS,
    on_call: Callable[[CallKey], None] | None = None,
) -> Measurements:
    """Measure every candidate beside dense attention in each call of a model.

    The model is compiled apart and gives what it always gave: at each attention call over the video
    that all candidates fit, dense attention and then each candidate run on the same queries, keys
    and values, one after the other, so that one output more is alive at a time. Without gradients.

    Args:
        model: Module or function, compiled or not.
        calls: The calls, one after the other; a generator will do. Calls that the journal holds are
            not run again.
        candidates: Configs or spec strings, such as `STA(...)` or "vsa:sparsity=0.9".
        journal: File that each call is written to as it ends, so that a run that was broken off
            goes on; None keeps everything in memory.
        inner: Compiler of the model: "inductor", "aot_eager" or "eager".
        rows: Evenly spread query positions that the captured mass is taken from.
        on_call: Called after each call, those of the journal included.

    Raises:
        CalibrationError: if a candidate cannot be measured, something is no `Call`, two calls have
            the same key, no call has video attention that all candidates fit, or the journal is
            damaged or of another run.
        ConfigError: if a spec string is wrong.
    """
    configs = as_candidates(candidates)
    recorder = _Recorder()
    compiled = _probing(model, configs, recorder, inner, rows)
    with open_entries(journal, configs, rows) as entries, torch.no_grad():
        seen: set[CallKey] = set()
        for call in calls:
            _require_call(call)
            _require_new(call.key, seen)
            if call.key not in entries:
                with _said_of(call):
                    entries.add(call.key, recorder.record(compiled, call.args, call.kwargs))
            if on_call is not None:
                on_call(call.key)
        return Measurements(candidates=configs, calls=entries.of(seen))


@dataclass
class Recording:
    """What `recording` has measured so far.

    Args:
        entries: Where it is kept.
        candidates: What is compared.
    """

    entries: Entries
    candidates: tuple[MechanismConfig, ...]

    @property
    def measurements(self) -> Measurements:
        """Everything measured up to now, by earlier runs with the same journal, too.

        Raises:
            CalibrationError: if that is nothing.
        """
        return Measurements(candidates=self.candidates, calls=self.entries.of(self.entries.keys))


@contextmanager
def recording(
    model: nn.Module,
    candidates: Candidates,
    *,
    sample: str = "0",
    journal: str | Path | None = None,
    inner: str = "inductor",
    rows: int = ROWS,
) -> Iterator[Recording]:
    """Measure in every call that a pipeline makes of its transformer while the block runs.

    The step of each call is that of `cs.step_callback` or `cs.metadata`; the second call at a step
    counts as the negative branch of guidance. Calls that the journal holds are run dense and not
    measured again, so that a run that was broken off goes on where it was.

        with calibration.recording(pipe.transformer, candidates, journal="run.journal") as found:
            pipe(prompt, callback_on_step_end=cs.step_callback())
        policy = calibration.fit(found.measurements, max_error=0.1).policy

    Args:
        model: The transformer, or what torch.compile returned for it; it is as it was after the
            block. Inside, its outputs have no gradient, and calls of several threads take turns.
        candidates: As for `measure`.
        sample: Name of the prompt; each of a journal has its own.
        journal: As for `measure`.
        inner: As for `measure`.
        rows: As for `measure`.

    Raises:
        CalibrationError: as `measure`, and inside the block if the step of a call is not known or a
            step has more than two calls.
    """
    configs = as_candidates(candidates)
    recorder = _Recorder()
    # The model's __call__ is what leads here.
    original = getattr(model, "_orig_mod", model)._call_impl
    compiled = _probing(original, configs, recorder, inner, rows)
    with open_entries(journal, configs, rows) as entries:
        made: dict[int, int] = {}
        one_at_a_time = threading.RLock()

        def call(*args: Any, **kwargs: Any) -> Any:
            with one_at_a_time:
                key = _key_of_call(sample, made)
                if key in entries:
                    return original(*args, **kwargs)
                with torch.no_grad():
                    found = recorder.record(compiled, args, kwargs)
                entries.add(key, found)
                return recorder.output

        # What torch.compile(model) returns hands every setattr on to the model itself.
        attributes, name = vars(model), "_compiled_call_impl"
        before = attributes.get(name)
        attributes[name] = call
        try:
            yield Recording(entries, configs)
        finally:
            attributes[name] = before


class _Recorder:
    """Collects what the graphs of one call of a model measured."""

    def __init__(self) -> None:
        self._found: list[tuple[ProbedSite, torch.Tensor]] = []
        self.output: Any = None

    def receive(self, sites: Sequence[ProbedSite], sums: Sequence[torch.Tensor]) -> None:
        """Take what one run of a graph measured."""
        self._found += zip(sites, sums, strict=True)

    def record(
        self, compiled: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[SiteErrors, ...]:
        """Run the model and return what was measured, in execution order."""
        self._found.clear()
        self.output = compiled(*args, **kwargs)
        if not self._found:
            raise CalibrationError(
                "nothing was measured in a call of the model",
                got="no attention call over the video that every candidate fits",
                expected="at least one",
                next_step="compiled_sparse.explain(model, ..., policy=candidate) says why each "
                "call stays dense",
            )
        return tuple(SiteErrors.from_sums(site, sums) for site, sums in self._found)


def as_candidates(candidates: Candidates) -> tuple[MechanismConfig, ...]:
    """Return candidates as configs.

    Args:
        candidates: Configs or spec strings.

    Raises:
        CalibrationError: if there is none, one twice, or one that is no mechanism's.
        ConfigError: if a spec string is wrong.
    """
    configs = tuple(parse_spec(each) if isinstance(each, str) else each for each in candidates)
    given: tuple[Any, ...] = configs
    are_mechanisms = all(
        isinstance(each, MechanismConfig) and not isinstance(each, Auto | Dense) for each in given
    )
    if not configs or not are_mechanisms or len(set(configs)) != len(configs):
        raise CalibrationError(
            "these are no candidates",
            got=repr(candidates),
            expected="at least one mechanism, each once; dense attention is always compared with",
            next_step='pass ["sta:window_thw=3x3x3", "sta:window_thw=1x5x5"], for instance',
        )
    return configs


def _probing(
    model: Callable[..., Any],
    candidates: tuple[MechanismConfig, ...],
    recorder: _Recorder,
    inner: str,
    rows: int,
) -> Callable[..., Any]:
    if not is_count(rows):
        raise CalibrationError(
            "rows is not a count",
            got=repr(rows),
            expected="an integer of at least 1",
            next_step=f"pass rows={ROWS}, for instance",
        )
    probe = Probe(candidates=candidates, receive=recorder.receive, rows=rows)
    policy = Policy({"*": candidates[0]})
    options = {"policy": policy, "inner": inner, "probe": probe}
    return compiled_apart(plain(model), functools.partial(compiled_sparse_backend, options=options))


def _require_call(call: object) -> None:
    if not isinstance(call, Call):
        raise CalibrationError(
            "this is no call of a model",
            got=type(call).__name__,
            expected="a compiled_sparse.calibration.Call",
            next_step="pass [Call(args=..., kwargs=..., key=CallKey(step=...))], for instance",
        )


def _require_new(key: CallKey, seen: set[CallKey]) -> None:
    if key in seen:
        raise CalibrationError(
            "two calls have the same key",
            got=str(key),
            expected="another sample, branch or step for each call",
            next_step="pass key=CallKey(sample=..., branch=..., step=...) to each Call",
        )
    seen.add(key)


def _said_of(call: Call) -> Any:
    return metadata(grid_thw=call.grid_thw, text=call.text, step=call.key.step)


def _key_of_call(sample: str, made: dict[int, int]) -> CallKey:
    """Return the key of the next call at the present step."""
    step = current_call().step
    if step is None or made.get(step, 0) == len(BRANCHES):
        raise CalibrationError(
            "it is not known which call of a pipeline this is",
            got="no step" if step is None else f"a third call at step {step}",
            expected="the step of each call, and at most two calls at a step",
            next_step="pass callback_on_step_end=cs.step_callback() to the pipeline, and record "
            "each run of it in a block of its own",
        )
    key = CallKey(sample=sample, branch=BRANCHES[made.get(step, 0)], step=step)
    made[step] = made.get(step, 0) + 1
    return key
