"""`explain`: what would be done to each attention call, without doing the mathematics."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from compiled_sparse.compiling import compiled_apart
from compiled_sparse.compiling import plain
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import StrictRewriteError
from compiled_sparse.metadata import current_call
from compiled_sparse.metadata import current_layout
from compiled_sparse.passes import SparseAttentionPass
from compiled_sparse.passes.fx import clone_dynamo_graph
from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.fx import hint
from compiled_sparse.passes.markers import Markers
from compiled_sparse.policy import PolicyLike
from compiled_sparse.policy import as_policy
from compiled_sparse.report import Decision
from compiled_sparse.report import Report
from compiled_sparse.selector import current_sources
from compiled_sparse.selector import dense_schedules
from compiled_sparse.strict import strict_errors


def explain(
    model: Callable[..., Any], *args: Any, policy: PolicyLike = None, **kwargs: Any
) -> Report:
    """Report what the backend would do to each attention call of a model.

    Dynamo traces the model as `torch.compile` would; the graphs are analysed but not computed:
    each returns zeros of the right shape. Parameters are not touched, memory is that of the
    graphs' outputs.

    Args:
        model: Module or function, compiled or not.
        *args: Example inputs for the call to explain.
        policy: As in `options={"policy": ...}`; None for automatic.
        **kwargs: Further example inputs.

    `cs.force`, the environment and `cs.metadata` count as they do for the backend; without a step
    from `cs.metadata` the report is about a step that the policy's schedule does not keep dense.

    Returns:
        One decision per attention call, and the number of graphs.

    Raises:
        ConfigError: if the policy is not one, or the model cannot be called.
    """
    if not callable(model):
        raise ConfigError(
            "cs.explain is for what can be called",
            got=repr(model)[:80],
            expected="a module or a function, then its inputs",
            next_step="write cs.explain(model, *inputs, policy=...)",
        )
    sources = current_sources(as_policy(policy))
    step_is_known = current_call().step is not None
    decisions: list[Decision] = []
    problems: list[str] = []
    num_graphs = 0

    def analyse(graph: fx.GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal num_graphs
        num_graphs += 1
        markers = Markers(graph)
        schedules = dense_schedules(sources, current_call(), markers.policies)
        dense = schedules if step_is_known else frozenset()
        analysis = SparseAttentionPass(
            sources,
            current_layout(),
            dense_schedules=dense,
            rewrite=False,
            sparsity=current_call().sparsity,
        )
        found = analysis(clone_dynamo_graph(graph))
        decisions.extend(found)
        problems.extend(map(_in_a_line, strict_errors(found, sources, markers)))
        outputs = _output_values(graph)
        return lambda *_: [_zeros(value) for value in outputs]

    compiled_apart(plain(model), analyse)(*args, **kwargs)
    return Report(tuple(decisions), max(num_graphs, 1), tuple(problems))


def _in_a_line(error: StrictRewriteError) -> str:
    return f"{error.problem}: {error.got}. Next: {error.next_step}"


def _output_values(graph: fx.GraphModule) -> list[Any]:
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    return [example_value(v) if isinstance(v, fx.Node) else v for v in output.args[0]]


def _zeros(value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return hint(value)
    if not isinstance(value, torch.Tensor):
        return value
    return torch.zeros([hint(size) for size in value.shape], dtype=value.dtype, device=value.device)
