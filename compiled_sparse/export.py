"""`rewrite_exported`: the same rewriter over a `torch.export` program.

An exported program is called without this package's run-time wrapper, so what the wrapper decides
at each call (step schedules, values that change from call to call) has no place in it: it is
refused, not ignored.
"""

from __future__ import annotations

import copy
import operator
from typing import Any
from typing import NamedTuple

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from compiled_sparse.errors import ExportError
from compiled_sparse.metadata import current_call
from compiled_sparse.metadata import current_layout
from compiled_sparse.passes import SparseAttentionPass
from compiled_sparse.passes.fx import MODULE_STATE
from compiled_sparse.passes.fx import example_value
from compiled_sparse.passes.lowering import lower_to_aten
from compiled_sparse.policy import PolicyLike
from compiled_sparse.policy import as_policy
from compiled_sparse.report import Report
from compiled_sparse.selector import PolicySources
from compiled_sparse.selector import current_sources

_STATE_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class RewrittenProgram(NamedTuple):
    """What `rewrite_exported` returns.

    Args:
        program: The program with sparse calls.
        report: What was decided for each attention call.
    """

    program: ExportedProgram
    report: Report


def rewrite_exported(
    exported_program: ExportedProgram, policy: PolicyLike = None
) -> RewrittenProgram:
    """Make the video self-attention of an exported program sparse.

    `cs.force`, the environment and `cs.metadata` count as they stand now; the program keeps what
    they said. Rewrite before `run_decompositions()`, which takes attention calls apart.

    Args:
        exported_program: What `torch.export.export` returned; left untouched.
        policy: As in `options={"policy": ...}`; None for automatic.

    Returns:
        The rewritten program, with the same inputs, outputs and parameters, and the report.

    Raises:
        ExportError: if it is no program, or one that `run_decompositions` has taken apart; if the
            policy keeps steps dense, a mechanism reads values that change from call to call, or a
            size that the program leaves open would have to be fixed.
        ConfigError: if the policy is not one.
    """
    _check_program(exported_program)
    sources = current_sources(as_policy(policy))
    _refuse_schedules(sources)
    graph_module = copy.deepcopy(exported_program.graph_module)
    _mark_state(graph_module, exported_program)
    guards = _count_fixed_sizes(graph_module)
    before = set(graph_module.graph.nodes)
    rewrite = SparseAttentionPass(sources, current_layout(), sparsity=current_call().sparsity)
    decisions = rewrite(graph_module)
    if not decisions:
        _refuse_decomposed(exported_program)
    _refuse_inputs(rewrite)
    if _count_fixed_sizes(graph_module) != guards:
        raise ExportError(
            "a size that the program leaves open would be fixed",
            got="a layout chosen by the grid (an automatic tile), or given by cs.metadata",
            expected="a mechanism that needs no size, or static sizes",
            next_step="give the config a tile such as tile_thw=(6, 8, 8), or export without "
            "dynamic_shapes for the video's axes",
        )
    for node in graph_module.graph.nodes:
        node.meta.pop(MODULE_STATE, None)
        if node not in before:
            _as_exported(node)
    graph_module.recompile()
    signature = _renamed_outputs(exported_program, graph_module)
    program = exported_program._update(graph_module, signature)
    return RewrittenProgram(program, Report(tuple(decisions)))


def _check_program(program: object) -> None:
    if not isinstance(program, ExportedProgram):
        raise ExportError(
            "this is no exported program",
            got=repr(program)[:80],
            expected="what torch.export.export returns",
            next_step="write cs.rewrite_exported(torch.export.export(model, inputs), policy)",
        )


def _refuse_decomposed(program: ExportedProgram) -> None:
    """Refuse a program without attention calls that has what they are taken apart into."""
    ops = {str(node.target) for node in program.graph.nodes}
    is_unfused = {"aten._softmax.default", "aten.bmm.default"} <= ops
    is_fused = any(op.startswith("aten._scaled_dot_product_") for op in ops)
    if is_unfused or is_fused:
        raise ExportError(
            "the program's attention calls have been taken apart",
            got=f"a program of dialect {program.dialect} without scaled_dot_product_attention",
            expected="a program as torch.export.export returns it",
            next_step="rewrite it first, then call run_decompositions()",
        )


def _refuse_schedules(sources: PolicySources) -> None:
    scheduled = [each for each in sources.effective() if each.step_schedules]
    if scheduled:
        raise ExportError(
            "an exported program knows no denoising steps",
            got=scheduled[0].describe_schedule() or scheduled[0].rules[0][1].describe(),
            expected="a policy without dense steps",
            next_step="keep the exported program for the dense steps, rewrite it for the others",
        )


def _refuse_inputs(rewrite: SparseAttentionPass) -> None:
    if rewrite.runtime_inputs:
        names = sorted({each.name for each in rewrite.runtime_inputs})
        raise ExportError(
            "an exported program is handed no values of the call",
            got="a mechanism that reads " + ", ".join(names),
            expected="a mechanism whose pattern is fixed",
            next_step="pass one window instead of a table; write a sparsity into the config",
        )


def _mark_state(graph_module: fx.GraphModule, program: ExportedProgram) -> None:
    """Parameters and buffers are inputs of an exported graph, but no input of the model."""
    state = {
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind in _STATE_KINDS and hasattr(spec.arg, "name")
    }
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and node.name in state:
            node.meta[MODULE_STATE] = True


def _count_fixed_sizes(graph_module: fx.GraphModule) -> tuple[int, int]:
    """How much is known of symbolic sizes; a rewrite that learns more has fixed something."""
    values = [example_value(node) for node in graph_module.graph.nodes]
    fakes = [value for value in values if isinstance(value, FakeTensor)]
    shape_env = fakes[0].fake_mode.shape_env if fakes else None
    if shape_env is None:
        return 0, 0
    equalities = [guard for guard in shape_env.guards if getattr(guard.expr, "rel_op", "") == "=="]
    return len(equalities), len(shape_env.replacements)


def _as_exported(node: fx.Node) -> None:
    """Give a new node the form that exported graphs have."""
    if "example_value" in node.meta:
        node.meta["val"] = node.meta.pop("example_value")
    selects = node.target is operator.getitem and not isinstance(_first_value(node), torch.Tensor)
    is_tensor = isinstance(node.meta.get("val"), FakeTensor)
    if is_tensor and not selects and not isinstance(node.target, OpOverload):
        lower_to_aten(node)


def _first_value(node: fx.Node) -> Any:
    return example_value(node.all_input_nodes[0]) if node.all_input_nodes else None


def _renamed_outputs(program: ExportedProgram, graph_module: fx.GraphModule) -> Any:
    """A signature names outputs by their nodes; a rewritten call may be one."""
    signature = copy.deepcopy(program.graph_signature)
    (output,) = (node for node in graph_module.graph.nodes if node.op == "output")
    for spec, node in zip(signature.output_specs, output.args[0], strict=True):
        if isinstance(node, fx.Node):
            spec.arg.name = node.name
    return signature
