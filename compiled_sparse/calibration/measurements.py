"""What a calibration measured: how far each candidate is from dense attention, and where."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compiled_sparse.config import MechanismConfig
from compiled_sparse.config import is_count
from compiled_sparse.errors import CalibrationError
from compiled_sparse.ops.candidate_errors import SUMS
from compiled_sparse.passes.probe import ProbedSite
from compiled_sparse.windows import as_tuples

BRANCHES = ("positive", "negative")
_DIGITS = 7
_PER_CANDIDATE = ("squared_error", "absolute_error", "cosine", "captured_mass")
Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True, order=True)
class CallKey:
    """Which call of the model something was measured in.

    Args:
        sample: Name of the prompt or clip.
        branch: "positive", or "negative" for the unconditional half of guidance.
        step: Denoising step, from 0.

    Raises:
        CalibrationError: if the branch is neither, or the step no count.
    """

    sample: str = "0"
    branch: str = "positive"
    step: int = 0

    def __post_init__(self) -> None:
        sample: object = self.sample
        valid = isinstance(sample, str) and is_count(self.step, least=0)
        if self.branch not in BRANCHES or not valid:
            raise CalibrationError(
                "this names no call of a model",
                got=f"sample={self.sample!r}, branch={self.branch!r}, step={self.step!r}",
                expected="a name, one of " + ", ".join(BRANCHES) + ", and a step of at least 0",
                next_step='pass sample="0", branch="positive", step=0, for instance',
            )

    def __str__(self) -> str:
        """Return the key as a journal holds it."""
        return f"{self.step}/{self.branch}/{self.sample}"

    @staticmethod
    def parse(text: str) -> CallKey:
        """Return the key that `str` made a text of.

        Raises:
            CalibrationError: if it made no such text.
        """
        step, _, rest = text.partition("/")
        branch, _, sample = rest.partition("/")
        return CallKey(sample=sample, branch=branch, step=int(step) if step.isdigit() else -1)


@dataclass(frozen=True, kw_only=True)
class SiteErrors:
    """What was measured at one attention call of the model.

    Args:
        path: Dotted module path.
        kind: "self" or "joint".
        grid_thw: Token grid.
        text: Text tokens before and after the video.
        head_dim: Head size.
        densities: Fraction of (query, key) pairs attended to, by candidate.
        tiles: Tile sides on this grid, by candidate.
        squared_dense: Mean square of dense attention's output, by head.
        squared_error: Mean square of the difference, by candidate and head; the published L2 loss.
        absolute_error: Mean absolute difference, likewise; the published L1 loss.
        cosine: Cosine of the outputs taken as one vector, likewise.
        captured_mass: Mean share of dense attention's weights on the keys attended to, likewise,
            from the log-sum-exp at evenly spread rows.
        layer: Index among the video attention layers of the model, those that were not measured
            included; None where not known.
        num_layers: How many such layers the model has, likewise.
    """

    path: str
    kind: str
    grid_thw: tuple[int, ...]
    text: tuple[int, int]
    head_dim: int
    densities: tuple[float, ...]
    tiles: tuple[tuple[int, ...], ...]
    squared_dense: tuple[float, ...]
    squared_error: Rows
    absolute_error: Rows
    cosine: Rows
    captured_mass: Rows
    layer: int | None = None
    num_layers: int | None = None

    @staticmethod
    def from_sums(site: ProbedSite, sums: Tensor) -> SiteErrors:
        """Turn sums over tokens and channels into means.

        Args:
            site: The call.
            sums: float64 [candidates, heads, len(SUMS)].

        Raises:
            CalibrationError: if an output is not finite, so that nothing can be compared.
        """
        by_name = dict(zip(SUMS, sums.double().cpu().unbind(-1), strict=True))
        count = by_name["elements"].clamp(min=1)
        norms = (by_name["squared_dense"] * by_name["squared_sparse"]).sqrt()
        means = {
            "squared_error": by_name["squared_error"] / count,
            "absolute_error": by_name["absolute_error"] / count,
            # Where both are zero they agree.
            "cosine": torch.where(norms == 0, 1.0, by_name["product"] / norms.clamp(min=1e-300)),
            "captured_mass": by_name["captured_mass"] / by_name["rows"].clamp(min=1),
        }
        squared_dense = (by_name["squared_dense"] / count)[0]
        for values in (squared_dense, *means.values()):
            _require_finite(site, values)
        return SiteErrors(
            path=site.path,
            kind=site.kind,
            grid_thw=site.grid_thw,
            text=site.text,
            head_dim=site.head_dim,
            densities=tuple(map(_rounded, site.densities)),
            tiles=site.tiles,
            layer=site.layer,
            num_layers=site.num_layers,
            squared_dense=tuple(map(_rounded, squared_dense.tolist())),
            **{name: _rows(values) for name, values in means.items()},
        )

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return len(self.squared_dense)

    def relative_squared_error(self) -> Tensor:
        """Return squared over squared_dense, float64 [candidates, heads]; 0 where both are 0."""
        error = torch.tensor(self.squared_error, dtype=torch.float64)
        dense = torch.tensor(self.squared_dense, dtype=torch.float64)
        return torch.where(error == 0, 0.0, error / dense)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(document: Mapping[str, Any]) -> SiteErrors:
        """Build one from what `to_dict` returned, or from its JSON.

        Raises:
            CalibrationError: if a field is missing or unknown, holds something else than it should,
                or the numbers of candidates or heads differ.
        """
        names = [field.name for field in dataclasses.fields(SiteErrors)]
        if sorted(document) != sorted(names):
            raise _no_site(f"fields {', '.join(sorted(document))}", ", ".join(names))
        site = SiteErrors(**{name: as_tuples(document[name]) for name in names})
        for name, (holds, expected) in _HOLDS.items():
            if not _is_nested(getattr(site, name), holds):
                raise _no_site(f"{name} {getattr(site, name)!r}", expected)
        shape = (len(site.densities), site.num_heads)
        if not _is_layer(site.layer, site.num_layers):
            raise _no_site(
                f"layer {site.layer!r} of {site.num_layers!r}", "an index below the number"
            )
        if len(site.tiles) != shape[0]:
            raise _no_site(f"{len(site.tiles)} tiles", f"{shape[0]}, one for each candidate")
        for name in _PER_CANDIDATE:
            rows = getattr(site, name)
            if len(rows) != shape[0] or any(len(row) != shape[1] for row in rows):
                raise _no_site(f"{name} of another shape", f"{shape[0]} rows of {shape[1]} numbers")
        return site


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Everything a calibration measured.

    Args:
        candidates: The configs that were compared with dense attention.
        calls: For each call of the model its attention calls over the video, in execution order.

    Raises:
        CalibrationError: if there is nothing, the calls do not have the same layers, or figures of
            a candidate are missing.
    """

    candidates: tuple[MechanismConfig, ...]
    calls: Mapping[CallKey, tuple[SiteErrors, ...]]

    def __post_init__(self) -> None:
        if not self.candidates or not self.calls or not all(self.calls.values()):
            raise CalibrationError(
                "nothing was measured",
                got=f"{len(self.candidates)} candidates, {len(self.calls)} calls of the model",
                expected="at least one call with video attention that all candidates fit",
                next_step="look at compiled_sparse.explain for why calls stay dense",
            )
        first_key, first = next(iter(self.calls.items()))
        for key, sites in self.calls.items():
            if [_identity(site) for site in sites] != [_identity(site) for site in first]:
                raise CalibrationError(
                    "two calls of the model do not have the same layers",
                    got=f"{len(sites)} attention calls in {key}, {len(first)} in {first_key}",
                    expected="the same module paths, heads and grid in every call",
                    next_step="calibrate each resolution and each model in a run of its own",
                )
        amounts = {len(site.densities) for site in first}
        if amounts != {len(self.candidates)}:
            raise CalibrationError(
                "these are measurements of other candidates",
                got=f"{len(self.candidates)} candidates, figures of {sorted(amounts)}",
                expected="figures of each candidate",
                next_step="measure again; the file was written by another release or edited",
            )
        counts = [site.num_heads for site in first]
        if len(set(counts)) != 1:
            raise CalibrationError(
                "layers have different numbers of heads",
                got=f"heads {counts}",
                expected="the same number in every layer",
                next_step="calibrate the parts of the model one by one",
            )

    @property
    def layers(self) -> tuple[SiteErrors, ...]:
        """The attention calls of one call of the model, for what is the same in all."""
        return next(iter(self.calls.values()))

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that were measured, in order."""
        return tuple(sorted({key.step for key in self.calls}))

    @property
    def num_steps(self) -> int:
        """One more than the last step that was measured."""
        return self.steps[-1] + 1

    def only(self, keys: Iterable[CallKey]) -> Measurements:
        """Return what was measured in some of the calls."""
        kept = {key: self.calls[key] for key in keys}
        return Measurements(candidates=self.candidates, calls=kept)

    def mean(self, name: str) -> Tensor:
        """Return a figure by step, layer, candidate and head, averaged over samples and branches.

        Args:
            name: "relative_squared_error", "squared_error", "absolute_error", "cosine" or
                "captured_mass".

        Returns:
            float64 [measured steps, layers, candidates, heads].
        """
        return torch.stack(
            [_mean_over([self.calls[k] for k in self._at(s)], name) for s in self.steps]
        )

    def _at(self, step: int) -> list[CallKey]:
        return sorted(key for key in self.calls if key.step == step)


def _mean_over(calls: list[tuple[SiteErrors, ...]], name: str) -> Tensor:
    by_call = [torch.stack([_figure(site, name) for site in sites]) for sites in calls]
    return torch.stack(by_call).mean(0)


def _figure(site: SiteErrors, name: str) -> Tensor:
    if name == "relative_squared_error":
        return site.relative_squared_error()
    return torch.tensor(getattr(site, name), dtype=torch.float64)


def _identity(site: SiteErrors) -> tuple[Any, ...]:
    return site.path, site.num_heads, site.grid_thw, site.tiles, site.layer, site.num_layers


def _is_nested(value: object, holds: Callable[[Any], bool]) -> bool:
    """Whether nested tuples hold nothing else than what is told."""
    return isinstance(value, tuple) and all(_is_nested(v, holds) or holds(v) for v in value)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_amount(value: Any) -> bool:
    return _is_finite(value) and value >= 0


def _is_layer(layer: object, total: object) -> bool:
    known: list[Any] = [value for value in (layer, total) if value is not None]
    counts = [value for value in known if is_count(value, least=0)]
    return counts == known and (len(known) < 2 or counts[0] < counts[1])


_AMOUNTS = (_is_amount, "finite numbers of at least 0")
_COUNTS = (is_count, "integers of at least 1")
_HOLDS = {
    **dict.fromkeys(("densities", "squared_dense", *_PER_CANDIDATE), _AMOUNTS),
    **dict.fromkeys(("grid_thw", "tiles"), _COUNTS),
    "cosine": (_is_finite, "finite numbers"),
}


def _rows(values: Tensor) -> Rows:
    return tuple(tuple(map(_rounded, row)) for row in values.tolist())


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _require_finite(site: ProbedSite, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise CalibrationError(
            "an attention call gives values that are not finite",
            got=f"NaN or infinity at {site.path or 'an attention call'}",
            expected="finite outputs of dense attention and of every candidate",
            next_step="run the model in bfloat16 or float32, and check its inputs",
        )


def _no_site(got: str, expected: str) -> CalibrationError:
    return CalibrationError(
        "this holds no measurement of an attention call",
        got=got,
        expected=expected,
        next_step="measure again; the file was written by another release or edited",
    )
