"""How dense a policy leaves each layer at each step, counted before there is a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compiled_sparse.compatible import check_sizes
from compiled_sparse.config import MechanismConfig
from compiled_sparse.errors import ConfigError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import Text
from compiled_sparse.layout import as_grid
from compiled_sparse.metadata import CallMetadata
from compiled_sparse.pattern import sta_density
from compiled_sparse.policy import Policy
from compiled_sparse.policy import PolicyLike
from compiled_sparse.policy import StepSchedule
from compiled_sparse.policy import as_policy
from compiled_sparse.reasons import EXPECTED_DENSE
from compiled_sparse.selector import PolicySources
from compiled_sparse.selector import Refused
from compiled_sparse.selector import SiteFacts
from compiled_sparse.selector import at_layer
from compiled_sparse.selector import choose
from compiled_sparse.selector import dense_schedules
from compiled_sparse.selector import requested
from compiled_sparse.selector import scheduled_dense

PATHS = "blocks.{layer}.attn1"
_LAYER = "{layer}"
# What automatic mode decides for itself is no misfit of the policy.
_AS_MEANT = EXPECTED_DENSE | {"too_short", "no_gain"}


@dataclass(frozen=True, kw_only=True)
class PolicyDensity:
    """The densities of a policy.

    Args:
        policy: The policy in a few words.
        grid_thw: Token grid.
        text: Text tokens around the video.
        heads: Query heads of a layer.
        densities: Fraction of (query, key) pairs attended to, averaged over heads, nested
            [layers][steps]; 1 where attention is dense.
    """

    policy: str
    grid_thw: tuple[int, ...]
    text: Text
    heads: int
    densities: tuple[tuple[float, ...], ...]

    @property
    def num_layers(self) -> int:
        """Layers."""
        return len(self.densities)

    @property
    def num_steps(self) -> int:
        """Denoising steps."""
        return len(self.densities[0])

    @property
    def mean(self) -> float:
        """Mean over layers and steps."""
        return sum(map(sum, self.densities)) / (self.num_layers * self.num_steps)


def policy_density(
    policy: PolicyLike,
    *,
    grid_thw: tuple[int, ...],
    heads: int,
    layers: int,
    steps: int,
    text: Text | None = None,
    paths: str = PATHS,
) -> PolicyDensity:
    """Count how dense a policy leaves each layer at each step.

    It is decided as the compile backend decides it, but for the environment and `cs.force`, which
    are not asked, and for dtype, device and head size, which are not known. What is selected by
    content is counted as reports count it.

    Args:
        policy: Any form of a policy.
        grid_thw: Token grid after patching.
        heads: Query heads of a layer.
        layers: Attention calls over the video in a forward.
        steps: Denoising steps of a run.
        text: Text tokens around the video; rules for `joint:` calls need some, and rules for
            `self:` calls none.
        paths: Module path of a layer, with `{layer}` in the place of its index.

    Raises:
        ConfigError: if the policy is none, does not fit the grid or the heads, or has no rule for
            these paths.
        ConfigFormatError: if a file or spec string cannot be read as a policy.
        LayoutError: if the grid does not fit.
        ShapeError: if a count is no positive integer.
        UnknownMechanismError: if a name is not a mechanism's.
    """
    check_sizes(heads=heads, layers=layers, steps=steps)
    counter = _Counter(as_policy(policy), as_grid(grid_thw), text or Text(), heads)
    sites = _sites(counter.sources.options, layers, counter.text, paths)
    return PolicyDensity(
        policy=_name_of(policy, counter.sources.options),
        grid_thw=counter.grid,
        text=counter.text,
        heads=heads,
        densities=counter.count(sites, steps),
    )


class _Counter:
    """Counts the densities of one policy on one layout, each config once."""

    def __init__(self, policy: Policy, grid: tuple[int, ...], text: Text, heads: int) -> None:
        self.sources = PolicySources(policy)
        self.grid, self.text, self.heads = grid, text, heads
        self._known: dict[MechanismConfig, float] = {}
        self._of_window: dict[tuple[MechanismConfig, tuple[int, ...]], float] = {}

    def count(self, sites: list[SiteFacts], steps: int) -> tuple[tuple[float, ...], ...]:
        """Return the densities, nested [layers][steps]."""
        schedules = [
            dense_schedules(self.sources, CallMetadata(step=step, num_steps=steps))
            for step in range(steps)
        ]
        return tuple(
            tuple(self._at(site, step, dense) for step, dense in enumerate(schedules))
            for site in sites
        )

    def _at(self, site: SiteFacts, step: int, dense: frozenset[StepSchedule]) -> float:
        wanted = requested(self.sources, site)
        if scheduled_dense(wanted, site, dense) is not None:
            return 1.0
        outcome = at_layer(wanted, site)
        if isinstance(outcome, Refused):
            return 1.0
        whole = self._of(outcome.config)
        if outcome.config.table is None:
            return whole
        windows = outcome.config.table.row(step, site.layer or 0)
        return sum(self._window(outcome.config, each) for each in windows) / len(windows)

    def _of(self, config: MechanismConfig) -> float:
        if config not in self._known:
            outcome = choose(config, self.grid, self.text.before, self.text.after, self.heads)
            if isinstance(outcome, Refused):
                _require_meant(config, outcome)
                self._known[config] = 1.0
            else:
                self._known[config] = outcome.density
        return self._known[config]

    def _window(self, config: MechanismConfig, window: tuple[int, ...]) -> float:
        key = config, window
        if key not in self._of_window:
            tile = config.resolve_tile(self.grid)
            layout = BlockLayout(self.grid, tile, self.text.before, self.text.after)
            self._of_window[key] = sta_density(layout, (window,))
        return self._of_window[key]


def _require_meant(config: MechanismConfig, refused: Refused) -> None:
    if refused.reason not in _AS_MEANT:
        raise ConfigError(
            "the policy does not fit these calls",
            got=f"{config.describe()}: {refused.reason} ({refused.detail})",
            expected="a mechanism that takes this grid and this number of heads",
            next_step="pass the grid and the heads of the model that the policy is for",
        )


def _sites(policy: Policy, layers: int, text: Text, paths: str) -> list[SiteFacts]:
    if _LAYER not in paths:
        raise ConfigError(
            "these paths do not tell one layer from another",
            got=repr(paths),
            expected=f"a module path with {_LAYER} in it",
            next_step=f"pass {PATHS}, for instance",
        )
    kind = "joint" if text.before or text.after else "self"
    sites = [
        SiteFacts(path=paths.replace(_LAYER, str(i)), kind=kind, layer=i, num_layers=layers)
        for i in range(layers)
    ]
    matches = (policy.match(site.path, kind) for site in sites)
    used = {match[0] for match in matches if match is not None}
    if policy.sparse_globs and used.isdisjoint(policy.sparse_globs):
        raise ConfigError(
            "no rule of the policy that may make something sparse is for these calls",
            got=f"rules for {', '.join(policy.sparse_globs)}; {kind} calls at {sites[0].path}"
            + f" to {sites[-1].path}" * (layers > 1),
            expected="a rule that matches some layer",
            next_step="pass the module paths of the model, such as transformer_blocks.{layer}.attn,"
            " and text tokens if its calls have some",
        )
    return sites


def _name_of(given: PolicyLike, policy: Policy) -> str:
    if isinstance(given, str | Path):
        return Path(given).name if str(given).endswith(".json") else str(given)
    first, *more = [config.describe() for _, config in policy.rules]
    return f"policy of {len(policy.rules)} rules" if more else first
