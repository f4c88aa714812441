"""What is compiled again and what is not: shapes, timesteps, metadata, regions, threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from modules import GRID
from modules import POLICY
from modules import Attention
from modules import Block
from modules import Tiny
from modules import TinyDiT
from modules import assert_close
from modules import compile_sparse
from modules import dit_inputs
from modules import expected_output
from modules import raster
from modules import tokens
from modules import video
from torch import Tensor
from torch import fx
from torch import nn

import compiled_sparse as cs
from compiled_sparse.backend import compiled_sparse_backend

pytestmark = pytest.mark.usefixtures("fresh_compiler")

GRIDS = ((3, 4, 5), (5, 7, 6), (2, 3, 7))


class Counting:
    """Count how often Dynamo asks for a graph to be compiled."""

    def __init__(self, *, sparse: bool, policy: Any = POLICY) -> None:
        self.sparse = sparse
        self.policy = policy
        self.calls = 0

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph, sparse or dense."""
        self.calls += 1
        if not self.sparse:
            return graph.forward
        options = {"policy": self.policy, "inner": "eager"}
        return compiled_sparse_backend(graph, inputs, options=options)


def _compiles(model: nn.Module, backend: Counting, dynamic: bool | None) -> list[int]:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    counts = []
    for grid in (*GRIDS, GRIDS[0]):
        inputs = dit_inputs(grid)
        actual = compiled(*inputs)
        if backend.sparse:
            assert_close(actual, expected_output(model, *inputs, grid_thw=grid))
        counts.append(backend.calls)
    return counts


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_resolutions_compile_as_often_as_they_do_dense_and_each_is_right(
    dynamic: bool | None,
) -> None:
    model = TinyDiT(1).requires_grad_(False)
    dense = _compiles(model, Counting(sparse=False), dynamic)
    assert _compiles(model, Counting(sparse=True), dynamic) == dense


def test_dynamic_shapes_compile_once_for_all_resolutions() -> None:
    model = TinyDiT(1).requires_grad_(False)
    assert _compiles(model, Counting(sparse=True), dynamic=True) == [1, 1, 1, 1]


def test_a_dynamic_text_length_beside_the_video_compiles_once() -> None:
    def body(m: Tiny, x: Tensor, text: Tensor) -> Tensor:
        return m.attn(torch.cat([raster(x), text], 1))

    model, backend = Tiny(body), Counting(sparse=True)
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for grid, length in ((GRIDS[0], 7), (GRIDS[1], 9), (GRIDS[2], 13)):
        inputs = (video(grid=grid), tokens(1, length))
        expected = expected_output(model, *inputs, grid_thw=grid, text=cs.Text(after=length))
        assert_close(compiled(*inputs), expected)
    assert backend.calls == 1


@pytest.mark.slow
def test_an_automatic_tile_compiles_anew_for_each_grid() -> None:
    model, config = TinyDiT(1).requires_grad_(False), cs.STA(window_thw=(1, 1, 1), tile_thw="auto")
    backend = Counting(sparse=True, policy=config)
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for grid in (*GRIDS, GRIDS[0]):
        inputs = dit_inputs(grid)
        expected = expected_output(model, *inputs, grid_thw=grid, config=config)
        assert_close(compiled(*inputs), expected)
    assert backend.calls == len(GRIDS)


def test_a_timestep_never_compiles_again() -> None:
    model, backend = TinyDiT(1), Counting(sparse=True)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for step in (1000.0, 500.0, 1.0):
        inputs = dit_inputs(step=step)
        assert_close(compiled(*inputs), expected_output(model, *inputs))
    assert backend.calls == 1


def test_compiling_twice_with_equal_options_shares_the_artifact() -> None:
    model, inputs = TinyDiT(1), dit_inputs()
    first = compile_sparse(model)(*inputs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        second = compile_sparse(model, policy=cs.STA(window_thw=[1, 1, 1], tile_thw=(2, 3, 2)))
        assert torch.equal(second(*inputs), first)


# Layouts given by the caller.


def test_one_length_on_two_grids_compiles_two_variants_and_each_is_right() -> None:
    attn, x = Attention().requires_grad_(False), tokens()
    compiled = compile_sparse(attn)
    dense = attn(x)
    grids = ((3, 4, 5), (5, 4, 3), (12, 5), (3, 4, 5))
    policies = {3: POLICY}
    for grid in grids:
        with cs.metadata(grid_thw=grid):
            actual = compiled(x)
        if len(grid) in policies:
            assert_close(actual, expected_output(attn, x, grid_thw=grid))
        else:
            assert_close(actual, dense)
        assert_close(compiled(x), dense)


def test_the_layout_of_the_first_call_is_not_kept_for_calls_without_one() -> None:
    attn, x = Attention().requires_grad_(False), tokens()
    compiled = compile_sparse(attn)
    with cs.metadata(grid_thw=GRID):
        assert_close(compiled(x), expected_output(attn, x))
    assert_close(compiled(x), attn(x))


def test_metadata_overrides_the_grid_of_the_graph() -> None:
    model, x = Tiny(lambda m, x: m.attn(raster(x))), video()
    compiled = compile_sparse(model)
    with cs.metadata(grid_thw=(5, 4, 3)):
        assert_close(compiled(x), expected_output(model, x, grid_thw=(5, 4, 3)))
    assert_close(compiled(x), expected_output(model, x))


def test_metadata_with_text_is_right() -> None:
    attn, x = Attention().requires_grad_(False), tokens(2, 71)
    text = cs.Text(before=4, after=7)
    with cs.metadata(grid_thw=GRID, text=text):
        actual = compile_sparse(attn)(x)
    assert_close(actual, expected_output(attn, x, text=text))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_variants_follow_changing_lengths(dynamic: bool | None) -> None:
    attn = Attention().requires_grad_(False)
    compiled = compile_sparse(attn, dynamic=dynamic)
    for grid in (*GRIDS, (5, 3, 4), (7, 3, 2), GRIDS[0]):
        x = tokens(1, grid[0] * grid[1] * grid[2])
        with cs.metadata(grid_thw=grid):
            assert_close(compiled(x), expected_output(attn, x, grid_thw=grid))
        assert_close(compiled(x), attn(x))


@pytest.mark.slow
def test_gradients_flow_through_variants() -> None:
    attn, x = Attention(), tokens().requires_grad_()
    compiled = compile_sparse(attn, inner="aot_eager")
    compiled(x)
    for grid in (GRID, (5, 4, 3)):
        with cs.metadata(grid_thw=grid):
            (actual,) = torch.autograd.grad(compiled(x).square().sum(), x)
        (expected,) = torch.autograd.grad(expected_output(attn, x, grid_thw=grid).square().sum(), x)
        assert_close(actual, expected)


# Regions.


class Stack(nn.Module):
    """Blocks that a user compiles one by one."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Run all blocks."""
        angles = torch.arange(x.shape[1])[:, None] * torch.linspace(0.1, 1, 8)
        for block in self.blocks:
            x = block(x, text, torch.zeros(x.shape[0], 16), angles)
        return x


def _regional(stack: Stack, backend: Counting) -> Stack:
    for block in stack.blocks:
        block.compile(backend=backend, fullgraph=True)
    return stack


def test_blocks_compiled_one_by_one_stay_dense_without_metadata(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stack, inputs = Stack().requires_grad_(False), (tokens(), tokens(1, 7))
    dense, backend = stack(*inputs), Counting(sparse=True)
    assert_close(_regional(stack, backend)(*inputs), dense)
    assert backend.calls == 1
    assert "attn1: layout_unknown" in caplog.text


def test_blocks_compiled_one_by_one_share_an_artifact_under_metadata() -> None:
    stack, inputs = Stack().requires_grad_(False), (tokens(), tokens(1, 7))
    expected, dense = expected_output(stack, *inputs), stack(*inputs)
    backend = Counting(sparse=True)
    _regional(stack, backend)
    with cs.metadata(grid_thw=GRID):
        assert_close(stack(*inputs), expected)
        assert backend.calls == 1
    assert_close(stack(*inputs), dense)
    assert backend.calls == 1


# Threads.


def _run_in_threads(functions: Sequence[Callable[[], None]]) -> None:
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_two_threads_with_different_metadata_do_not_disturb_each_other() -> None:
    attn, x = Attention().requires_grad_(False), tokens()
    compiled = compile_sparse(attn)
    results: dict[tuple[int, ...], list[Tensor]] = {}

    def work(grid: tuple[int, ...]) -> None:
        with torch.no_grad(), cs.metadata(grid_thw=grid):
            results[grid] = [compiled(x) for _ in range(20)]

    grids = ((3, 4, 5), (5, 4, 3))
    _run_in_threads([lambda grid=grid: work(grid) for grid in grids])
    for grid in grids:
        assert_close(results[grid][0], expected_output(attn, x, grid_thw=grid))
        assert all(torch.equal(result, results[grid][0]) for result in results[grid])


def test_two_threads_with_different_policies_do_not_disturb_each_other() -> None:
    attn, x = Attention().requires_grad_(False), tokens()
    policies = (POLICY, cs.STA(window_thw=(1, 3, 1), tile_thw=(3, 2, 2)))
    results: dict[cs.STA, list[Tensor]] = {}

    def work(policy: cs.STA) -> None:
        compiled = compile_sparse(attn, policy=policy)
        with torch.no_grad(), cs.metadata(grid_thw=GRID):
            results[policy] = [compiled(x) for _ in range(20)]

    _run_in_threads([lambda policy=policy: work(policy) for policy in policies])
    for policy in policies:
        assert_close(results[policy][0], expected_output(attn, x, config=policy))
        assert all(torch.equal(result, results[policy][0]) for result in results[policy])
