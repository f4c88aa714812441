"""The Dynamo backend: clone the graph, run the pass, hand it on, pick the variant at run time.

Registered as `compiled_sparse` through the `torch_dynamo_backends` entry-point group.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._dynamo import lookup_backend

from compiled_sparse.distributed.first_use import Joint
from compiled_sparse.distributed.first_use import abandoning
from compiled_sparse.distributed.first_use import together
from compiled_sparse.guard import Guard
from compiled_sparse.guard import read_findings
from compiled_sparse.guard import report_findings
from compiled_sparse.metadata import CallMetadata
from compiled_sparse.metadata import LayoutMetadata
from compiled_sparse.metadata import current_call
from compiled_sparse.metadata import current_layout
from compiled_sparse.options import BackendOptions
from compiled_sparse.options import parse_options
from compiled_sparse.passes import SparseAttentionPass
from compiled_sparse.passes.exchanges import exchanges_in
from compiled_sparse.passes.fx import clone_dynamo_graph
from compiled_sparse.passes.markers import Markers
from compiled_sparse.passes.probe import Probe
from compiled_sparse.passes.probe import ProbePass
from compiled_sparse.passes.runtime_inputs import RuntimeInput
from compiled_sparse.policy import Policy
from compiled_sparse.policy import StepSchedule
from compiled_sparse.policy import as_policy
from compiled_sparse.reasons import REASONS
from compiled_sparse.recompute import Recall
from compiled_sparse.report import Decision
from compiled_sparse.report import Report
from compiled_sparse.selector import PolicySources
from compiled_sparse.selector import current_sources
from compiled_sparse.selector import dense_schedules
from compiled_sparse.selector import reads_sparsity
from compiled_sparse.sharding import SequenceGroup
from compiled_sparse.strict import UNMATCHED_ADVICE
from compiled_sparse.strict import missed_calls
from compiled_sparse.strict import missed_error
from compiled_sparse.strict import parted_error
from compiled_sparse.strict import parted_modules
from compiled_sparse.strict import rules_and_paths
from compiled_sparse.strict import unmatched_calls
from compiled_sparse.strict import unmatched_error
from compiled_sparse.strict import where_and_why

logger = logging.getLogger("compiled_sparse")

Compiled = Callable[..., Any]


def compiled_sparse_backend(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Compile a graph with its video self-attention made sparse.

    Use it by name: `torch.compile(model, backend="compiled_sparse", options={...})`.

    Args:
        graph_module: Graph from Dynamo; left untouched.
        example_inputs: Its inputs.
        options: `policy`, `inner` ("inductor", "aot_eager" or "eager"), `mode`, `strict`, `guard`,
            and any name of inductor's own config.
        mode: torch.compile's mode, for inductor.

    Returns:
        The compiled callable.

    Raises:
        UnknownOptionError: if an option is not known.
        StrictRewriteError: with `strict`, if a call that should be sparse stays dense.
        ConfigError: if the policy is not one.
    """
    settings = parse_options(options, mode)
    return _Dispatcher(
        clone_dynamo_graph(graph_module), list(example_inputs), settings
    ).as_callable()


@dataclass(frozen=True)
class VariantKey:
    """Everything a call may change that selects what is compiled.

    Args:
        layout: What `cs.metadata` says about the tokens.
        forced: What `cs.force` says.
        environment: What `COMPILED_SPARSE_BACKEND` says.
        dense_schedules: The step schedules under which the call's step is dense.
        check_rows: How many rows of each sparse call are compared with dense attention.
        has_sparsity: Whether the call is given a sparsity that a mechanism reads.
    """

    layout: LayoutMetadata | None
    forced: Policy | None
    environment: Policy | None
    dense_schedules: frozenset[StepSchedule]
    check_rows: int = 0
    has_sparsity: bool = False


@dataclass(frozen=True)
class _Rewritten:
    """A graph after the pass.

    Args:
        graph: The graph.
        extra: What must be passed behind its own inputs.
        joints: What other processes must have in common with this one to run it.
    """

    graph: fx.GraphModule
    extra: tuple[RuntimeInput, ...]
    joints: tuple[Joint, ...]

    def runnable(self, compiled: Compiled) -> Compiled:
        """Return the compiled graph as it is called with the graph's own inputs."""
        return together(_with_inputs(compiled, self.extra), self.joints)


class _Dispatcher:
    """The compiled variants of one graph, one per `VariantKey` that was called for."""

    def __init__(
        self, graph_module: fx.GraphModule, example_inputs: list[Any], settings: BackendOptions
    ) -> None:
        self._pristine = graph_module
        self._settings = settings
        self._markers = Markers(graph_module)
        self._modules = self._markers.policies
        self._lock = threading.RLock()
        self._has_attention = False
        self._warned_of_steps = False
        self._depends_on_steps = False
        self._announced: set[Policy] = set()
        self._further_outputs: dict[VariantKey, tuple[Any, ...]] = {}
        self._recall = Recall()
        with self._recall.compiling(example_inputs):
            self._compile_first(example_inputs)

    def _compile_first(self, example_inputs: list[Any]) -> None:
        settings = self._settings
        key = self.key()
        if settings.guard is not None:
            key = replace(key, check_rows=settings.guard.rows)
        groups = _groups_of(key)
        with abandoning(groups):
            rewritten = self._rewrite(key)
            groups[:] = [joint.group for joint in rewritten.joints]
            appended = [each.tensor(current_call()) for each in rewritten.extra]
            compiled = _compile(rewritten.graph, [*example_inputs, *appended], settings)
        self._first = rewritten.runnable(compiled)
        self._variants: dict[VariantKey, Compiled] = {key: self._first}

    def as_callable(self) -> Compiled:
        if not self._has_attention:
            return self._first
        probe = self._settings.probe
        if probe is not None:
            return self._recall.around(lambda *inputs: self.probed(inputs, probe))
        if self._settings.guard is not None:
            return self._recall.around(_GuardedRun(self, self._settings.guard))
        variants, build, current_key = self._variants, self.variant, self.key

        def run(*inputs: Any) -> Any:
            key = current_key()
            compiled = variants.get(key)
            if compiled is None:
                compiled = build(key)
            return compiled(*inputs)

        return self._recall.around(run)

    def key(self) -> VariantKey:
        """Return what the present call selects; checks are the guard's matter."""
        if self._settings.probe is not None:  # it measures whatever else is said
            return VariantKey(current_layout(), None, None, frozenset())
        sources, call = current_sources(self._settings.policy), current_call()
        dense = dense_schedules(sources, call, self._modules)
        if self._depends_on_steps and not self._warned_of_steps:
            policies = sources.effective(self._modules)
            self._warned_of_steps = _warn_of_steps(policies, call)
        has_sparsity = call.sparsity is not None and reads_sparsity(sources, self._modules)
        return VariantKey(
            current_layout(), sources.forced, sources.environment, dense, has_sparsity=has_sparsity
        )

    def _rewrite(self, key: VariantKey) -> _Rewritten:
        rewritten = clone_dynamo_graph(self._pristine)
        sources = PolicySources(self._settings.policy, key.forced, key.environment)
        rewrite = self._pass(key, sources)
        decisions = rewrite(rewritten)
        self._further_outputs[key] = rewrite.further_outputs
        self._has_attention = bool(decisions)
        self._depends_on_steps |= any(d.is_sparse or d.reason == "step_dense" for d in decisions)
        is_automatic = all(policy.is_automatic for policy in sources.effective(self._modules))
        _announce(decisions, self._settings.strict, is_automatic=is_automatic)
        if sources.override is None and not self._announced:
            _announce_parted(parted_modules(decisions, self._markers), self._settings.strict)
        policy = sources.options if sources.override is None else sources.override
        if policy not in self._announced:
            self._announced.add(policy)
            _announce_unmatched(decisions, policy, self._settings.strict)
        return _Rewritten(
            rewritten, rewrite.runtime_inputs, _joints(rewritten, key, policy, decisions)
        )

    def _pass(self, key: VariantKey, sources: PolicySources) -> SparseAttentionPass:
        if self._settings.probe is not None:
            return ProbePass(self._settings.probe, key.layout)
        return SparseAttentionPass(
            sources,
            key.layout,
            dense_schedules=key.dense_schedules,
            check_rows=key.check_rows,
            sparsity=current_call().sparsity if key.has_sparsity else None,
        )

    def variant(self, key: VariantKey) -> Compiled:
        """Return a variant, compiled outside Dynamo: a nested compile guards its own shapes."""
        with self._lock:
            if key not in self._variants:
                settings = self._settings
                with abandoning(_groups_of(key)):
                    rewritten = self._rewrite(key)
                joints = rewritten.joints

                # The others wait in a handshake while this one compiles, not in a collective.
                def inner(graph: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
                    with abandoning([joint.group for joint in joints]):
                        compiled = _compile(graph, list(inputs), settings)
                    return together(compiled, joints)

                compiled = torch.compile(rewritten.graph, backend=inner)
                self._variants[key] = _with_inputs(compiled, rewritten.extra)
            return self._variants[key]

    def checked(self, key: VariantKey) -> tuple[Compiled, tuple[str, ...]]:
        """Return a variant with checks, and the calls its last outputs are about.

        One without sparse calls has nothing to check and serves as the plain variant, too.
        """
        compiled = self.variant(key)
        paths = self._further_outputs[key]
        if not paths:
            self._variants.setdefault(replace(key, check_rows=0), compiled)
        return compiled, paths

    def probed(self, inputs: tuple[Any, ...], probe: Probe) -> Any:
        """Run the graph and hand what it measured to whoever asked for it."""
        key = self.key()
        outputs = self.variant(key)(*inputs)
        sites = self._further_outputs[key]
        if not sites:
            return outputs
        probe.receive(sites, outputs[-len(sites) :])
        return outputs[: -len(sites)]


_DENSE = as_policy("dense")


def _groups_of(key: VariantKey) -> list[SequenceGroup]:
    """The processes that will wait for this one, as far as the caller said."""
    group = None if key.layout is None else key.layout.group
    return [] if group is None else [group]


def _joints(
    graph: fx.GraphModule, key: VariantKey, policy: Policy, decisions: Sequence[Decision]
) -> tuple[Joint, ...]:
    """Return what the processes that exchange tokens in a graph must have in common."""
    calls = (f"{each.path}: {each.mechanism or each.reason}" for each in decisions)
    layout = key.layout
    facts = {
        "policy": policy.to_json(),
        "video": "" if layout is None else f"grid {layout.grid_thw}, {layout.text}",
        "dense steps": ", ".join(sorted(map(repr, key.dense_schedules))),
        "attention calls": "; ".join(calls),
    }
    return tuple(
        Joint(group, {**facts, "exchanges": "; ".join(words)})
        for group, words in exchanges_in(graph).items()
        if group.size > 1
    )


class _GuardedRun:
    """Calls of a graph of which the first ones of each variant are checked."""

    def __init__(self, dispatcher: _Dispatcher, guard: Guard) -> None:
        self._dispatcher = dispatcher
        self._guard = guard
        self._num_checked: dict[VariantKey, int] = {}
        self._is_dense = False

    def __call__(self, *inputs: Any) -> Any:
        key = self._dispatcher.key()
        if self._is_dense:
            key = replace(key, forced=_DENSE)
        elif self._num_checked.get(key, 0) < self._guard.calls:
            return self._check(key, inputs)
        return self._dispatcher.variant(key)(*inputs)

    def _check(self, key: VariantKey, inputs: tuple[Any, ...]) -> Any:
        compiled, paths = self._dispatcher.checked(replace(key, check_rows=self._guard.rows))
        outputs = compiled(*inputs)
        if not paths:
            self._num_checked[key] = self._guard.calls
            return outputs
        findings = read_findings(paths, outputs[-len(paths) :])
        self._is_dense = report_findings(self._guard, findings)
        # Not counted where that raises: a second try is checked again.
        self._num_checked[key] = self._num_checked.get(key, 0) + 1
        if self._is_dense:
            return self._dispatcher.variant(replace(key, forced=_DENSE))(*inputs)
        return outputs[: -len(paths)]


def _with_inputs(compiled: Compiled, extra: tuple[RuntimeInput, ...]) -> Compiled:
    """Pass the tensors of the present call behind a graph's own inputs."""
    if not extra:
        return compiled

    def run(*inputs: Any) -> Any:
        call = current_call()
        return compiled(*inputs, *(each.tensor(call) for each in extra))

    return run


def _warn_of_steps(policies: Iterable[Policy], call: CallMetadata) -> bool:
    """Warn where a schedule asks for a step that nobody gave; return whether it did."""
    schedules = [schedule for policy in policies for schedule in policy.step_schedules]
    if all(schedule.is_decidable(call.step, call.num_steps) for schedule in schedules):
        return False
    logger.warning(
        "the policy keeps some denoising steps dense, but %s is not known: an unknown step counts "
        "as step 0 and never as one of the last. Use cs.step_callback() or cs.metadata(step=i, "
        "num_steps=n).",
        "the step" if call.step is None else "the number of steps",
    )
    return True


def _compile(
    graph_module: fx.GraphModule, example_inputs: list[Any], settings: BackendOptions
) -> Compiled:
    if settings.inner != "inductor":
        compiled: Compiled = lookup_backend(settings.inner)(graph_module, example_inputs)
        return compiled
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph_module, example_inputs, config_patches=dict(settings.inductor))  # type: ignore[return-value]


def _announce(decisions: list[Decision], strict: bool, *, is_automatic: bool) -> None:
    """Log what was done; warn, or raise when strict, about calls that should have been sparse."""
    report = Report(tuple(decisions))
    if not decisions:
        logger.debug("graph without attention calls")
        return
    logger.info("%s", report.summary())
    for decision in decisions:
        logger.debug("%s", decision)
    missed = missed_calls(decisions)
    if not missed or is_automatic:
        return
    if strict:
        raise missed_error(missed)
    logger.warning(
        "%d attention calls stay dense although the policy names a mechanism; first %s. %s",
        len(missed),
        where_and_why(missed[0]),
        REASONS[missed[0].reason],
    )


def _announce_parted(parted: list[str], strict: bool) -> None:
    """Warn, or raise when strict, about attached modules that are cut in two."""
    if not parted:
        return
    error = parted_error(parted)
    if strict:
        raise error
    logger.warning("%s: %s; %s", error.problem, error.got, error.next_step)


def _announce_unmatched(decisions: list[Decision], policy: Policy, strict: bool) -> None:
    """Warn, or raise when strict, where no rule matches any video call of a graph."""
    unmatched = unmatched_calls(decisions, policy)
    if not unmatched:
        return
    if strict:
        raise unmatched_error(unmatched, policy)
    logger.warning(
        "no rule of the policy (%s) matches any video attention call of the graph (%s): all stay "
        "dense; %s",
        *rules_and_paths(unmatched, policy),
        UNMATCHED_ADVICE,
    )
