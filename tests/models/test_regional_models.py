"""Real models attached and compiled block by block, against the eager reference layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import harness
import pytest
import torch
from builders import BUILDERS
from builders.base import Case
from builders.base import Grid
from layered import Layered
from modules import assert_close
from test_regional import Counting
from torch import Tensor
from torch import nn

import compiled_sparse as cs

pytestmark = pytest.mark.usefixtures("fresh_compiler")

WINDOWS = ((1, 1, 1), (3, 1, 1), (1, 3, 3))
ONE_ARTIFACT = ("wan", "wan image", "ltx", "ltx 2", "skyreels v2")
MODELS = (
    *ONE_ARTIFACT,
    "wan animate",
    "chronoedit",
    "cogvideox 2b",
    "cogvideox 5b",
    "hunyuan video",
)


def scheduled(num_layers: int, steps: int = 1) -> cs.STA:
    """Another window at each step in each layer."""
    choice = [[[(step + layer) % 3] for layer in range(num_layers)] for step in range(steps)]
    return cs.STA(window_thw=cs.WindowTable(windows=WINDOWS, choice=choice), tile_thw=(2, 3, 2))


def compile_blocks(model: Any, backend: Any) -> None:
    """As diffusers does, also for models that do not say which blocks are repeated."""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(backend=backend, fullgraph=True)
        return
    for child in model.children():
        for block in child if isinstance(child, nn.ModuleList) else ():
            block.compile(backend=backend, fullgraph=True)


def expected(
    name: str, case: Case, config: cs.STA, grid: Grid, order: Sequence[int], step: int = 0
) -> Tensor:
    """Run a model eagerly, its layers by the reference.

    Args:
        name: Of the builder.
        case: The model, not compiled, and its inputs.
        config: With a table by layer.
        grid: The true grid.
        order: Layer index of each call over video, in the order of execution.
        step: Denoising step.
    """
    layers = iter(order)
    calls = [
        (config.at(step, next(layers)), cs.Text(truth.before, truth.after))
        if truth.kind == "video"
        else None
        for truth in harness.truths(BUILDERS[name], 1, grid)
    ]
    with Layered(calls, grid) as mode:
        output = harness.outputs(case)
    assert mode.count == len(calls)
    return output


@pytest.mark.parametrize("name", MODELS)
def test_blocks_compiled_alone_have_their_own_layer_at_each_step(name: str) -> None:
    builder = BUILDERS[name]
    plain, case = harness.build(builder), harness.build(builder)
    config = scheduled(2, steps=3)
    handle = cs.attach(case.model, config)
    assert len(handle.modules) == 2
    backend = Counting()
    with torch.no_grad():
        dense = harness.outputs(plain)
        compile_blocks(case.model, backend)
        for step in range(3):
            want = expected(name, plain, config, builder.grid, (0, 1), step)
            with cs.metadata(step=step):
                assert_close(harness.outputs(case), want)
            assert (want - dense).abs().max() > 1e-3 * dense.abs().max()
    if name in ONE_ARTIFACT:
        assert backend.calls == 1


def test_layers_are_numbered_as_the_model_registers_them() -> None:
    builder = BUILDERS["wan vace"]
    plain, case = harness.build(builder), harness.build(builder)
    config = scheduled(3)
    handle = cs.attach(case.model, config)
    assert handle.modules == ("blocks.0.attn1", "blocks.1.attn1", "vace_blocks.0.attn1")
    with torch.no_grad():
        compile_blocks(case.model, Counting())
        want = expected("wan vace", plain, config, builder.grid, (2, 0, 1))
        assert_close(harness.outputs(case), want)


@pytest.mark.parametrize(
    "name",
    ["wan", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ltx", "hunyuan video"))],
)
def test_as_many_compilations_as_dense_and_three_resolutions_are_right(name: str) -> None:
    config, counts = scheduled(2), []
    for is_sparse in (False, True):
        torch._dynamo.reset()
        backend = Counting(sparse=is_sparse)
        model = harness.build(BUILDERS[name]).model
        compile_blocks(model, backend)
        handle = cs.attach(model, config) if is_sparse else None
        for grid in ((3, 4, 5), (5, 4, 3), (2, 5, 7)):
            plain = harness.build(BUILDERS[name], grid=grid)
            plain.model.load_state_dict(model.state_dict())
            with torch.no_grad():
                actual = harness.outputs(Case(model, plain.inputs))
                if is_sparse:
                    assert_close(actual, expected(name, plain, config, grid, (0, 1)))
        counts.append(backend.calls)
        assert handle is None or len(handle.modules) == 2
    assert counts[0] == counts[1]


def test_what_the_caller_says_outranks_what_the_call_tells() -> None:
    case = harness.build(BUILDERS["wan"])
    plain = harness.build(BUILDERS["wan"])
    config = scheduled(2)
    cs.attach(case.model, config)
    compile_blocks(case.model, Counting())
    other = (5, 4, 3)
    with torch.no_grad(), cs.metadata(grid_thw=other):
        want = expected("wan", plain, config, other, (0, 1))
        assert_close(harness.outputs(case), want)


def test_activation_checkpointing_of_the_whole_model_is_right() -> None:
    plain, case = harness.build(BUILDERS["wan"]), harness.build(BUILDERS["wan"])
    config = scheduled(2, steps=2)
    cs.attach(case.model, config)
    case.model.train().enable_gradient_checkpointing()
    plain.model.train()
    compiled = torch.compile(case.model, backend=Counting(inner="aot_eager"))
    with cs.metadata(step=1):
        actual = harness.outputs(case, compiled)
    want = expected("wan", plain, config, BUILDERS["wan"].grid, (0, 1), 1)
    assert_close(actual, want)
    actual.square().sum().backward()
    want.square().sum().backward()
    for one, other in zip(case.model.parameters(), plain.model.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_another_backend_leaves_an_attached_model_dense(backend: str) -> None:
    case = harness.build(BUILDERS["ltx"])
    with torch.no_grad():
        dense = harness.outputs(case)
        cs.attach(case.model, scheduled(2))
        assert torch.equal(harness.outputs(case), dense)
        compile_blocks(case.model, backend)
        assert_close(harness.outputs(case), dense)
        whole = harness.build(BUILDERS["ltx"])
        cs.attach(whole.model, scheduled(2))
        assert_close(harness.outputs(whole, torch.compile(whole.model, backend=backend)), dense)


def test_a_model_compiled_as_a_whole_uses_the_same_layers() -> None:
    case = harness.build(BUILDERS["ltx"])
    plain = harness.build(BUILDERS["ltx"])
    config = scheduled(2)
    cs.attach(case.model, config)
    want = expected("ltx", plain, config, BUILDERS["ltx"].grid, (0, 1))
    compiled = torch.compile(case.model, backend=Counting(), fullgraph=True)
    with torch.no_grad():
        assert_close(harness.outputs(case, compiled), want.detach())


def test_the_callback_leads_a_real_pipeline_through_the_table() -> None:
    steps, grid = 3, (3, 4, 5)
    plain, case = harness.build(BUILDERS["wan"]), harness.build(BUILDERS["wan"])
    config = scheduled(2, steps)
    cs.attach(case.model, config)
    backend = Counting()
    compile_blocks(case.model, backend)
    seen = []
    case.model.register_forward_hook(
        lambda _module, _args, inputs, output: seen.append((inputs, output[0])), with_kwargs=True
    )
    for _ in range(2):
        _wan_pipeline(case.model)(
            prompt_embeds=torch.randn(1, 7, 16),
            height=8 * 2 * grid[1],
            width=8 * 2 * grid[2],
            num_frames=4 * (grid[0] - 1) + 1,
            num_inference_steps=steps,
            guidance_scale=1.0,
            output_type="latent",
            callback_on_step_end=cs.step_callback(),
        )
    assert len(seen) == 2 * steps
    assert backend.calls == 1
    for call, (inputs, output) in enumerate(seen):
        with torch.no_grad():
            want = expected("wan", Case(plain.model, inputs), config, grid, (0, 1), call % steps)
        assert_close(output.flatten(), want)


def _wan_pipeline(transformer: nn.Module) -> Any:
    """The pipeline with a tiny decoder, for prompts that are already encoded."""
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipeline = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
