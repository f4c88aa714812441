"""Which config a site gets, and why: the policy's word, then what the site can take.

Pure functions of plain facts; the same ones serve the pass and the reports.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from compiled_sparse import registry
from compiled_sparse.config import Auto
from compiled_sparse.config import Dense
from compiled_sparse.config import MechanismConfig
from compiled_sparse.config import at_sparsity
from compiled_sparse.environment import mechanism_from_name
from compiled_sparse.environment import policy_from_environment
from compiled_sparse.environment import policy_from_environment as mechanism_from_environment
from compiled_sparse.force import forced
from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import auto_tile
from compiled_sparse.layout import sequence_grid
from compiled_sparse.metadata import CallMetadata
from compiled_sparse.ops.checks import KERNEL_CAPABILITIES
from compiled_sparse.policy import Policy
from compiled_sparse.policy import StepSchedule
from compiled_sparse.policy import as_policy
from compiled_sparse.registry import KERNEL_EFFICIENCY
from compiled_sparse.registry import Capabilities
from compiled_sparse.registry import Chosen
from compiled_sparse.registry import Refused

__all__ = [
    "AUTOMATIC",
    "AUTO_MIN_GAIN",
    "AUTO_MIN_TOKENS",
    "KERNEL_EFFICIENCY",
    "CallFacts",
    "Chosen",
    "PolicySources",
    "Refused",
    "Requested",
    "SiteFacts",
    "at_layer",
    "call_supported",
    "capabilities_of",
    "choose",
    "current_sources",
    "dense_schedules",
    "mechanism_from_environment",
    "mechanism_from_name",
    "needs_static_grid",
    "reads_sparsity",
    "requested",
    "scheduled_dense",
    "tensors_supported",
]

AUTO_MIN_TOKENS = Auto().min_tokens
AUTO_MIN_GAIN = Auto().min_gain


AUTOMATIC = as_policy(None)
_NO_LAYER = "the graph is a part of the model, or comes back to its blocks"


@dataclass(frozen=True)
class PolicySources:
    """Everything that may name a policy, apart from the modules' own word.

    Args:
        options: `options["policy"]`.
        forced: What `cs.force` says.
        environment: What `COMPILED_SPARSE_BACKEND` says.
    """

    options: Policy = AUTOMATIC
    forced: Policy | None = None
    environment: Policy | None = None

    @property
    def override(self) -> Policy | None:
        """What outranks every module's own word, if anything does."""
        return self.environment if self.forced is None else self.forced

    @property
    def is_automatic(self) -> bool:
        """Whether nobody named a mechanism: a call left dense is then no disappointment."""
        return all(policy.is_automatic for policy in self.effective())

    def effective(self, modules: Iterable[Policy] = ()) -> tuple[Policy, ...]:
        """Return the policies that have a say, given the modules' own ones."""
        return (*modules, self.options) if self.override is None else (self.override,)


@dataclass(frozen=True)
class SiteFacts:
    """What a policy is asked about.

    Args:
        path: Dotted module path.
        kind: "self" or "joint"; empty where not known.
        module: The module's own opt-in.
        layer: Index among the video attention layers of the model; None where not known.
        num_layers: How many such layers the model has.
    """

    path: str
    kind: str = ""
    module: Policy | None = None
    layer: int | None = None
    num_layers: int | None = None


@dataclass(frozen=True)
class Requested:
    """What a site is asked to become.

    Args:
        config: The config.
        origin: "force", "environment", "module", "options" or "auto".
        policy: The policy that said so; its schedule holds for the site.
        has_rule: Whether one of its rules did; else the config is `Dense`.
    """

    config: MechanismConfig
    origin: str
    policy: Policy
    has_rule: bool = True


def current_sources(options: Policy = AUTOMATIC) -> PolicySources:
    """Return what holds for a call made now: `cs.force` and the environment beside the options.

    Raises:
        UnknownMechanismError: if the environment names no mechanism.
    """
    inside = forced()
    environment = policy_from_environment() if inside is None else None
    return PolicySources(options, inside, environment)


def requested(sources: PolicySources | Policy, site: SiteFacts | str) -> Requested:
    """Return what is asked for at a site: force > environment > module > options > auto.

    Args:
        sources: Who may say something; a policy alone stands for the options.
        site: The site, or its module path. No matching rule means dense.
    """
    sources = PolicySources(sources) if isinstance(sources, Policy) else sources
    site = SiteFacts(site) if isinstance(site, str) else site
    origin, policy = next(
        (origin, policy)
        for origin, policy in (
            ("force", sources.forced),
            ("environment", sources.environment),
            ("module", site.module),
            ("auto" if sources.options == AUTOMATIC else "options", sources.options),
        )
        if policy is not None
    )
    matched = policy.match(site.path, site.kind)
    if matched is None:
        return Requested(Dense(), origin, policy, has_rule=False)
    return Requested(matched[1], origin, policy)


def dense_schedules(
    sources: PolicySources, call: CallMetadata, modules: Iterable[Policy] = ()
) -> frozenset[StepSchedule]:
    """Return the step schedules under which a call is dense: what a compiled variant depends on.

    Args:
        sources: Who may say something.
        call: Step and number of steps.
        modules: The modules' own policies.
    """
    return frozenset(
        schedule
        for policy in sources.effective(modules)
        for schedule in policy.step_schedules
        if schedule.is_dense(call.step, call.num_steps)
    )


def reads_sparsity(sources: PolicySources, modules: Iterable[Policy] = ()) -> bool:
    """Whether the sparsity of a call is read by any mechanism that has a say."""
    rules = (rule for policy in sources.effective(modules) for rule in policy.rules)
    return any(config.has_sparsity for _, config in rules)


def scheduled_dense(
    wanted: Requested, site: SiteFacts, dense_schedules: frozenset[StepSchedule] = frozenset()
) -> Refused | None:
    """Return why the schedule keeps a site dense, if it does.

    Args:
        wanted: What the site is asked to become.
        site: The site, with its layer index where that is known.
        dense_schedules: The step schedules under which the present step is dense.
    """
    policy, layer, total = wanted.policy, site.layer, site.num_layers
    if policy.has_dense_layers:
        if layer is None or (policy.dense_last_layers and total is None):
            return Refused("layer_unknown", _NO_LAYER)
        first_of_last = None if total is None else total - policy.dense_last_layers
        is_last = first_of_last is not None and layer >= first_of_last
        if layer < policy.dense_first_layers or is_last:
            return Refused("layer_dense", f"layer {layer}")
    own = StepSchedule(first=wanted.config.dense_first_steps)
    if policy.steps in dense_schedules or own in dense_schedules:
        return Refused("step_dense")
    return None


def at_layer(wanted: Requested, site: SiteFacts) -> Requested | Refused:
    """Return what is asked of a site's layer, where a config differs from layer to layer.

    Args:
        wanted: What the site is asked to become.
        site: The site, with its layer index where that is known.
    """
    if not wanted.config.needs_layer:
        return wanted
    if site.layer is None:
        return Refused("layer_unknown", _NO_LAYER)
    config = wanted.config.for_layer(site.layer)
    if isinstance(config, Dense):
        return Refused("layer_dense", f"layer {site.layer}")
    return dataclasses.replace(wanted, config=config)


def capabilities_of(config: MechanismConfig) -> Capabilities:
    """Return what tensors a config's mechanism takes; for `Dense` and the like, the kernel's.

    Automatic mode stays off GPUs: there is no record yet that the kernels were right on one, and
    dense attention is verified there.
    """
    if isinstance(config, Auto):
        capabilities = registry.automatic().capabilities
        return dataclasses.replace(capabilities, devices=capabilities.devices - {"cuda"})
    mechanism = registry.mechanism_of(config)
    return KERNEL_CAPABILITIES if mechanism is None else mechanism.capabilities


@dataclass(frozen=True)
class CallFacts:
    """What a mechanism's capabilities are asked about.

    Args:
        dtype: Dtype of queries, keys and values.
        head_dim: Head size of the queries; an integer, or a symbol nobody can decide on.
        value_dim: Head size of the values.
        device: Device type.
        training: Whether a gradient is needed.
        key_mask: Whether there is a key-padding mask.
    """

    dtype: torch.dtype
    head_dim: object
    value_dim: object
    device: str
    training: bool = False
    key_mask: bool = False


def call_supported(
    call: CallFacts, capabilities: Capabilities = KERNEL_CAPABILITIES
) -> Refused | None:
    """Return what a mechanism cannot take about a call, if there is something."""
    capabilities = capabilities.on_device(call.device)
    if call.dtype not in capabilities.dtypes:
        return Refused("dtype_unsupported", str(call.dtype))
    if not capabilities.takes_head_dim(call.head_dim) or call.value_dim != call.head_dim:
        detail = f"{call.head_dim} for queries, {call.value_dim} for values"
        return Refused("head_dim_unsupported", detail)
    if call.device not in capabilities.devices:
        return Refused("device_unsupported", call.device)
    if call.training and capabilities.forward_only:
        return Refused("forward_only", "a gradient is needed")
    if call.key_mask and not capabilities.key_mask:
        return Refused("mask_unsupported", "the mechanism takes no mask")
    return None


def tensors_supported(
    query: torch.Tensor,
    value: torch.Tensor,
    capabilities: Capabilities = KERNEL_CAPABILITIES,
    *,
    key_mask: bool = False,
) -> Refused | None:
    """Check dtype, head size, rank and device of a call's tensors (fake ones will do)."""
    if query.dim() != 4:
        return Refused("rank_unsupported", f"{query.dim()} dimensions")
    training = query.requires_grad or value.requires_grad
    sizes = (query.shape[-1], value.shape[-1])
    call = CallFacts(query.dtype, *sizes, query.device.type, training, key_mask)
    return call_supported(call, capabilities)


def needs_static_grid(config: MechanismConfig) -> bool:
    """Whether a config picks something by the grid, so that each grid compiles anew."""
    return config.needs_static_grid


def choose(
    config: MechanismConfig,
    grid: tuple[int, ...],
    text_before: int,
    text_after: int,
    heads: int,
    sparsity: float | None = None,
) -> Chosen | Refused:
    """Decide what a proven video self-attention call becomes.

    Args:
        config: What was asked for.
        grid: Token grid as integers.
        text_before: Text tokens in front of the grid.
        text_after: Text tokens behind it.
        heads: Number of query heads.
        sparsity: The sparsity of the call, if it is given one: the density is that at this one.

    Returns:
        The choice with its density and predicted gain, or why the call stays dense.
    """
    if isinstance(config, Auto):
        layout = BlockLayout(grid, auto_tile(grid), text_before, text_after)
        return _choose_auto(config, layout, heads)
    mechanism = registry.mechanism_of(config)
    if mechanism is None:
        return Refused("policy_dense")
    if config.grid_is_sequence:
        grid, text_before, text_after = sequence_grid(grid, text_before, text_after), 0, 0
    if config.num_axes not in (None, len(grid)):
        return Refused("axes_mismatch", f"config has {config.num_axes}, grid has {len(grid)}")
    if len(grid) not in mechanism.capabilities.num_axes:
        return Refused("axes_mismatch", f"{config.name} takes no grid of {len(grid)} axes")
    tile = config.resolve_tile(grid)
    layout = BlockLayout(config.resolve_grid(grid), tile, text_before, text_after)
    present = at_sparsity(config, sparsity)
    chosen: Chosen | Refused = mechanism.evaluate(present, layout, heads)
    if present is not config and isinstance(chosen, Chosen):
        return dataclasses.replace(chosen, config=config)
    return chosen


def _choose_auto(auto: Auto, layout: BlockLayout, heads: int) -> Chosen | Refused:
    if layout.num_tokens < auto.min_tokens:
        return Refused("too_short", f"{layout.num_tokens} tokens")
    mechanism = registry.automatic()
    assert mechanism.automatic is not None
    chosen = mechanism.evaluate(mechanism.automatic(auto, layout), layout, heads)
    if isinstance(chosen, Chosen) and chosen.predicted_gain < auto.min_gain:
        gain = f"predicted {chosen.predicted_gain:.2f}x, {auto.min_gain:.2f}x needed"
        return Refused("no_gain", gain)
    return chosen
