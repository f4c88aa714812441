"""What `strict` is about: calls that the policy wants sparse and that stay dense.

The backend raises or warns by it, one graph at a time; `cs.explain` notes it in the report.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence

from compiled_sparse.errors import StrictRewriteError
from compiled_sparse.passes.markers import Markers
from compiled_sparse.policy import Policy
from compiled_sparse.reasons import EXPECTED_DENSE
from compiled_sparse.reasons import REASONS
from compiled_sparse.report import Decision
from compiled_sparse.selector import PolicySources

UNMATCHED_ADVICE = (
    "correct the globs; blocks that are compiled alone see paths without the block's own: "
    "give their policy to cs.attach(model, policy)"
)

PARTED_ADVICE = (
    "compile each block alone, or keep the module in one graph: DistributedDataParallel cuts "
    "graphs by its buckets unless torch._dynamo.config.optimize_ddp = False; "
    "TORCH_LOGS=graph_breaks names other breaks"
)


def missed_calls(decisions: Iterable[Decision]) -> list[Decision]:
    """Return the calls that stay dense for a reason that nobody asked for."""
    return [d for d in decisions if not d.is_sparse and d.reason not in EXPECTED_DENSE]


def where_and_why(decision: Decision) -> str:
    """Return where a dense call is, the reason code, and what was seen."""
    detail = f" ({decision.detail})" if decision.detail else ""
    return f"{decision.path or 'an attention call'}: {decision.reason}{detail}"


def missed_error(missed: Sequence[Decision]) -> StrictRewriteError:
    """Return what `strict` raises about calls that stay dense.

    Args:
        missed: What `missed_calls` returned, at least one.
    """
    return StrictRewriteError(
        f"{len(missed)} attention calls the policy wants sparse stay dense",
        got=where_and_why(missed[0]),
        expected="every call the policy names rewritten, as strict=True asks",
        next_step=REASONS[missed[0].reason],
    )


def unmatched_calls(decisions: Iterable[Decision], policy: Policy) -> list[Decision]:
    """Return a graph's video calls if no rule of the policy matches any of them, else none.

    Calls of modules with their own policy are `cs.attach`'s matter.
    """
    video = [d for d in decisions if d.config_origin]
    matched = any(d.reason != "no_rule" or d.config_origin == "module" for d in video)
    return [] if matched or not policy.sparse_globs else video


def rules_and_paths(unmatched: Iterable[Decision], policy: Policy) -> tuple[str, str]:
    """Return the globs of a policy and the paths that none of them matches, in words."""
    rules = ", ".join(repr(glob) for glob, _ in policy.rules)
    return rules, ", ".join(dict.fromkeys(repr(d.path) for d in unmatched))


def unmatched_error(unmatched: Iterable[Decision], policy: Policy) -> StrictRewriteError:
    """Return what `strict` raises about a graph with none of whose calls the policy has to do."""
    rules, paths = rules_and_paths(unmatched, policy)
    return StrictRewriteError(
        "no rule of the policy matches any video attention call of the graph",
        got=f"rules {rules}; calls of {paths}",
        expected="globs that match module paths, as strict=True asks",
        next_step=UNMATCHED_ADVICE,
    )


def parted_modules(decisions: Sequence[Decision], markers: Markers) -> list[str]:
    """Return the attached modules whose attention calls are not in the graph with their policy.

    The graph that has the calls does not know the policy and says nothing.

    Args:
        decisions: What was decided about the graph's calls.
        markers: Those of the graph.
    """
    sparse = [
        marker
        for marker in markers.modules
        if marker.policy and marker.policy.sparse_globs and not marker.policy.dense_first_layers
    ]
    return [m.path for m in sparse if not any(m.covers(each.path) for each in decisions)]


def parted_error(parted: Sequence[str]) -> StrictRewriteError:
    """Return what `strict` raises about modules that are cut in two.

    Args:
        parted: What `parted_modules` returned, at least one.
    """
    first = repr(parted[0]) if parted[0] else "a module compiled alone"
    return StrictRewriteError(
        f"{len(parted)} attached modules are not in one graph with their attention",
        got=f"a graph with the start of {first} and without its attention call",
        expected="both in one graph: the policy is said at the start of the module",
        next_step=PARTED_ADVICE,
    )


def strict_errors(
    decisions: Sequence[Decision], sources: PolicySources, markers: Markers
) -> list[StrictRewriteError]:
    """Return everything that `strict` may raise about one graph, the first one first.

    Args:
        decisions: What was decided about the graph's calls.
        sources: Who may name a policy.
        markers: Those of the graph, with the modules' own policies.
    """
    errors = []
    parted = [] if sources.override else parted_modules(decisions, markers)
    if parted:
        errors.append(parted_error(parted))
    is_automatic = all(policy.is_automatic for policy in sources.effective(markers.policies))
    missed = [] if is_automatic else missed_calls(decisions)
    if missed:
        errors.append(missed_error(missed))
    policy = sources.options if sources.override is None else sources.override
    unmatched = unmatched_calls(decisions, policy)
    if unmatched:
        errors.append(unmatched_error(unmatched, policy))
    return errors
