"""What `strict` is about: calls that the policy wants sparse and that stay dense.

The backend raises or warns by it, one graph at a time; `cs.explain` notes it in the report.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence

from compiled_sparse.errors import StrictRewriteError
from compiled_sparse.policy import Policy
from compiled_sparse.reasons import EXPECTED_DENSE
from compiled_sparse.reasons import REASONS
from compiled_sparse.report import Decision
from compiled_sparse.selector import PolicySources

UNMATCHED_ADVICE = (
    "correct the globs; blocks that are compiled alone see paths without the block's own: "
    "give their policy to cs.attach(model, policy)"
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


def strict_errors(
    decisions: Sequence[Decision], sources: PolicySources, modules: Iterable[Policy]
) -> list[StrictRewriteError]:
    """Return everything that `strict` may raise about one graph, the first one first.

    Args:
        decisions: What was decided about the graph's calls.
        sources: Who may name a policy.
        modules: The modules' own policies.
    """
    errors = []
    is_automatic = all(policy.is_automatic for policy in sources.effective(modules))
    missed = [] if is_automatic else missed_calls(decisions)
    if missed:
        errors.append(missed_error(missed))
    policy = sources.options if sources.override is None else sources.override
    unmatched = unmatched_calls(decisions, policy)
    if unmatched:
        errors.append(unmatched_error(unmatched, policy))
    return errors
