"""Attached models compiled in parts: own policies, own layer indices, shared artifacts."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from layered import layered_output
from modules import GRID
from modules import POLICY
from modules import Attention
from modules import TinyDiT
from modules import assert_close
from modules import assert_gradients_close
from modules import compile_sparse
from modules import dit_inputs
from modules import expected_output
from modules import parameter_gradients
from modules import tokens
from torch import Tensor
from torch import fx
from torch import nn
from torch.utils.checkpoint import checkpoint

import compiled_sparse as cs
from compiled_sparse.backend import compiled_sparse_backend

pytestmark = pytest.mark.usefixtures("fresh_compiler")

WIDER = cs.STA(window_thw=(1, 3, 1), tile_thw=(2, 3, 2))
WIDEST = cs.STA(window_thw=(3, 1, 3), tile_thw=(2, 3, 2))
CONFIGS = (POLICY, WIDER, WIDEST)
TABLE = cs.WindowTable(
    windows=tuple(config.window_thw for config in CONFIGS),
    choice=[[[0], [1], [2]], [[1], [2], [0]], [[2], [0], [1]]],
)
SCHEDULED = cs.STA(window_thw=TABLE, tile_thw=(2, 3, 2))


class Counting:
    """Compile by our backend, or by a plain one, and count how often that is asked for."""

    def __init__(self, *, sparse: bool = True, **options: Any) -> None:
        self.sparse = sparse
        self.options = {"inner": "eager", **options}
        self.calls = 0

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph."""
        self.calls += 1
        if not self.sparse:
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
        return compiled_sparse_backend(graph, inputs, options=self.options)


def regional(model: TinyDiT, **options: Any) -> Counting:
    """Compile each block on its own."""
    backend = Counting(**options)
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    return backend


def frozen(blocks: int = 3, **settings: Any) -> TinyDiT:
    return TinyDiT(blocks, **settings).requires_grad_(False)


# Layers and policies.


def test_all_blocks_share_one_artifact_and_each_has_its_own_layer() -> None:
    model, inputs = frozen(), dit_inputs()
    expected = layered_output(model, *inputs, configs=[SCHEDULED.at(0, i) for i in range(3)])
    same = layered_output(model, *inputs, configs=[SCHEDULED.at(0, 0)] * 3)
    assert (expected - same).abs().max() > 1e-3 * expected.abs().max()
    cs.attach(model, SCHEDULED)
    backend = regional(model)
    with cs.metadata(grid_thw=GRID):
        assert_close(model(*inputs), expected)
    assert backend.calls == 1


def test_a_policy_of_several_configs_makes_one_artifact_for_each() -> None:
    model, inputs = frozen(4), dit_inputs()
    policy = {"blocks.0.*": WIDER, "blocks.2.*": WIDER, "blocks.*.attn1": POLICY}
    configs = [WIDER, POLICY, WIDER, POLICY]
    cs.attach(model, policy)
    expected = layered_output(model, *inputs, configs=configs)
    backend = regional(model)
    with cs.metadata(grid_thw=GRID):
        assert_close(model(*inputs), expected)
    assert backend.calls == 2


def test_dense_layers_are_known_under_regional_compilation(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, inputs = frozen(4), dit_inputs()
    policy = cs.Policy({"*": POLICY}, dense_first_layers=1, dense_last_layers=2)
    expected = layered_output(model, *inputs, configs=[None, POLICY, None, None])
    cs.attach(model, policy)
    backend = regional(model)
    with cs.metadata(grid_thw=GRID), caplog.at_level(logging.INFO, "compiled_sparse"):
        assert_close(model(*inputs), expected)
    assert backend.calls == 2
    assert "1 layer_dense" in caplog.text


def test_dense_layers_of_the_options_alone_are_refused_in_a_part_of_the_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, inputs = frozen(), dit_inputs()
    dense = model(*inputs)
    regional(model, policy=cs.Policy({"*": POLICY}, dense_first_layers=1))
    with cs.metadata(grid_thw=GRID):
        assert_close(model(*inputs), dense)
    assert "attn1: layer_unknown" in caplog.text
    assert "cs.attach" in caplog.text


def test_a_table_by_layer_without_attach_is_refused_in_a_part_of_the_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, inputs = frozen(), dit_inputs()
    dense = model(*inputs)
    regional(model, policy=SCHEDULED)
    with cs.metadata(grid_thw=GRID):
        assert_close(model(*inputs), dense)
    assert "attn1: layer_unknown" in caplog.text


def test_attaching_without_a_policy_numbers_the_layers_for_that_of_the_options() -> None:
    model, inputs = frozen(), dit_inputs()
    expected = layered_output(model, *inputs, configs=[SCHEDULED.at(0, i) for i in range(3)])
    cs.attach(model)
    backend = regional(model, policy=SCHEDULED)
    with cs.metadata(grid_thw=GRID):
        assert_close(model(*inputs), expected)
    assert backend.calls == 1


def test_force_outranks_the_module_which_outranks_the_options() -> None:
    model, inputs = frozen(), dit_inputs()
    expected = {c: expected_output(model, *inputs, config=c) for c in CONFIGS}
    dense = model(*inputs)
    cs.attach(model, WIDER)
    regional(model, policy=POLICY)
    with cs.metadata(grid_thw=GRID):
        assert_close(model(*inputs), expected[WIDER])
        with cs.force(WIDEST):
            assert_close(model(*inputs), expected[WIDEST])
        with cs.force("dense"):
            assert_close(model(*inputs), dense)
        assert_close(model(*inputs), expected[WIDER])


def test_dense_steps_of_a_modules_own_policy_are_dense() -> None:
    model, inputs = frozen(), dit_inputs()
    sparse, dense = expected_output(model, *inputs), model(*inputs)
    cs.attach(model, cs.Policy({"*": POLICY}, dense_first_steps=2))
    backend = regional(model)
    with cs.metadata(grid_thw=GRID):
        for step, expected in enumerate([dense, dense, sparse, sparse]):
            with cs.metadata(step=step):
                assert_close(model(*inputs), expected)
    assert backend.calls == 1


def test_attaching_and_removing_after_compilation_takes_effect() -> None:
    model, inputs = frozen(), dit_inputs()
    sparse, dense = expected_output(model, *inputs), model(*inputs)
    regional(model)
    with cs.metadata(grid_thw=GRID):
        assert_close(model(*inputs), dense)
        for _ in range(2):
            with cs.attach(model, POLICY):
                assert_close(model(*inputs), sparse)
            assert_close(model(*inputs), dense)


def test_a_copy_of_an_attached_model_computes_what_the_model_does() -> None:
    model, inputs = frozen(), dit_inputs()
    expected = layered_output(model, *inputs, configs=[SCHEDULED.at(0, i) for i in range(3)])
    cs.attach(model, SCHEDULED)
    twin = copy.deepcopy(model)
    regional(twin)
    with cs.metadata(grid_thw=GRID):
        assert_close(twin(*inputs), expected)


def test_a_decorated_class_is_sparse_by_its_own_policy() -> None:
    own = cs.sparse(WIDER)(type("Own", (Attention,), {}))
    module, x = own().requires_grad_(False), tokens()
    expected = expected_output(module, x, config=WIDER)
    with cs.metadata(grid_thw=GRID):
        assert_close(compile_sparse(module, policy="dense")(x), expected)


def test_a_table_by_layer_on_a_module_without_a_place_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module, x = cs.sparse(SCHEDULED)(Attention()).requires_grad_(False), tokens()
    dense = module(x)
    with cs.metadata(grid_thw=GRID):
        assert_close(compile_sparse(module)(x), dense)
    assert "layer_unknown" in caplog.text


# The whole model, a single module, no compiler, another compiler.


def test_the_whole_model_uses_the_same_layers() -> None:
    model, inputs = frozen(), dit_inputs()
    expected = layered_output(model, *inputs, configs=[SCHEDULED.at(1, i) for i in range(3)])
    with cs.metadata(step=1):
        assert_close(compile_sparse(model, policy=SCHEDULED)(*inputs), expected)
    cs.attach(model, SCHEDULED)
    with cs.metadata(step=1):
        assert_close(compile_sparse(model, policy="dense")(*inputs), expected)


def test_a_table_for_another_number_of_layers_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = frozen(2), dit_inputs()
    assert_close(compile_sparse(model, policy=SCHEDULED)(*inputs), model(*inputs))
    assert "layers_mismatch (3 layers in the table, 2 in the model)" in caplog.text


@pytest.mark.parametrize("index", [0, 2])
def test_an_attention_module_compiled_alone_knows_its_layer(index: int) -> None:
    model, x = frozen(), tokens()
    cs.attach(model, SCHEDULED)
    module = model.blocks[index].attn1
    expected = expected_output(module, x, config=SCHEDULED.at(0, index))
    with cs.metadata(grid_thw=GRID):
        assert_close(compile_sparse(module, policy=None)(x), expected)


def test_an_attention_module_attached_alone_is_layer_zero() -> None:
    module, x = Attention().requires_grad_(False), tokens()
    expected = expected_output(module, x, config=POLICY)
    cs.attach(module, POLICY)
    with cs.metadata(grid_thw=GRID):
        assert_close(compile_sparse(module, policy=None)(x), expected)


def test_without_a_compiler_an_attached_model_is_dense() -> None:
    model, inputs = frozen(), dit_inputs()
    dense = model(*inputs)
    handle = cs.attach(model, POLICY)
    with cs.metadata(grid_thw=GRID):
        assert torch.equal(model(*inputs), dense)
    assert "Run eagerly" in handle.report()


def test_another_compiler_sees_a_dense_model() -> None:
    model, inputs = frozen(), dit_inputs()
    dense = model(*inputs)
    handle = cs.attach(model, POLICY)
    backend = regional(model, sparse=False)
    with cs.metadata(grid_thw=GRID):
        assert_close(model(*inputs), dense)
    assert backend.calls == 1
    assert "compiled by another backend" in handle.report()


def test_explain_reads_the_markers() -> None:
    model, inputs = frozen(), dit_inputs()
    cs.attach(model, cs.Policy({"*": WIDER}, dense_first_layers=1))
    report = cs.explain(model, *inputs)
    sites = [site for site in report.sites if site.kind == "self"]
    assert [site.reason for site in sites] == ["layer_dense", "", ""]
    assert {site.config_origin for site in sites} == {"module"}


# Training and checkpointing.


@pytest.mark.parametrize("is_checkpointed", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
def test_gradients_are_those_of_the_reference_of_each_layer(
    is_checkpointed: bool, whole: bool
) -> None:
    model, inputs = TinyDiT(3, checkpoint=is_checkpointed), dit_inputs()
    configs = [SCHEDULED.at(1, i) for i in range(3)]
    plain = copy.deepcopy(model)
    plain.checkpoint = False
    expected = layered_output(plain, *inputs, configs=configs)
    cs.attach(model, SCHEDULED)
    if whole:
        compiled = compile_sparse(model, policy=None, inner="aot_eager")
    else:
        regional(model, inner="aot_eager")
        compiled = model
    with cs.metadata(grid_thw=GRID, step=1):
        actual = compiled(*inputs)
    assert_close(actual, expected)
    # A compiled recomputation keeps the step it had; one outside sees the step of its own time.
    is_outside = is_checkpointed and not whole
    with cs.metadata(grid_thw=GRID, step=1 if is_outside else 2):
        gradients = parameter_gradients(model, actual)
    assert_gradients_close(gradients, parameter_gradients(plain, expected))


def test_checkpointing_inside_a_compiled_block_gets_step_and_layer() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Attention() for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=False)
            return x

    model, x = Wrapped(), tokens().requires_grad_()
    cs.attach(model, SCHEDULED)
    compiled = compile_sparse(model, policy=None, inner="aot_eager")
    for step in range(3):
        expected = x
        for index, block in enumerate(model.blocks):
            config = SCHEDULED.at(step, index)
            expected = expected + expected_output(block, expected, config=config)
        with cs.metadata(grid_thw=GRID, step=step):
            actual = compiled(x)
        assert_close(actual, expected)
        assert_gradients_close(
            parameter_gradients(model, actual), parameter_gradients(model, expected)
        )


def test_a_schedule_inside_control_flow_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    def attend(x: Tensor) -> Tensor:
        heads = x.unflatten(2, (2, 8)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)

    def branch(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, attend, lambda y: attend(y).neg(), (x,))

    x, rows = tokens().abs(), ([[[0]], [[1]]], [[[0]]])
    for row in rows:
        table = cs.WindowTable(windows=TABLE.windows, choice=row)
        policy = cs.STA(window_thw=table, tile_thw=(2, 3, 2))
        with cs.metadata(grid_thw=GRID):
            assert_close(compile_sparse(branch, policy=policy)(x), attend(x))
        assert "nested_graph" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
def test_inductor_agrees(whole: bool) -> None:
    model, inputs = frozen(), dit_inputs()
    cs.attach(model, SCHEDULED)
    expected = [
        layered_output(model, *inputs, configs=[SCHEDULED.at(step, i) for i in range(3)])
        for step in range(3)
    ]
    if whole:
        compiled = compile_sparse(model, policy=None, inner="inductor")
    else:
        backend = regional(model, inner="inductor")
        compiled = model
    for step in (0, 1, 2, 0):
        with cs.metadata(grid_thw=GRID, step=step):
            assert_close(compiled(*inputs), expected[step])
    assert whole or backend.calls == 1
