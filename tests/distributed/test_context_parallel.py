"""Context parallelism of diffusers: its exchanges are recognised, what is between them rewritten.

diffusers asks for an accelerator to make its mesh, so that the mesh is made here, and its warning
about a time step without tokens, which Dynamo cannot trace, is left out.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import values
from torch import Tensor
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

import compiled_sparse as cs

STA = cs.STA(window_thw=(3, 3, 1), tile_thw=(2, 2, 2))
SIZES: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def _wan() -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(**SIZES).eval()


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 4, 4, 8, 12), torch.tensor([5, 5]), torch.randn(2, 6, 16)


def _in_parallel(model: Any) -> None:
    from diffusers import ContextParallelConfig
    from diffusers.hooks import context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig

    size = distributed.get_world_size()
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("ring", "ulysses"))
    config = ContextParallelConfig(ulysses_degree=size, mesh=mesh)
    config.setup(distributed.get_rank(), size, torch.device("cpu"), mesh)
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = ParallelConfig(context_parallel_config=config)
    context_parallel.apply_context_parallel(model, config, model._cp_plan)
    torch._dynamo.config.ignore_logging_functions.add(context_parallel.logger.warning_once)


def _exchanges(compiled: Any, inputs: tuple[Any, ...]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        compiled(*inputs, return_dict=False)
    events = {each.key: each.count for each in recorded.key_averages()}
    return events.get("_c10d_functional::all_to_all_single", 0)


def _divided(policy: Any, inner: str, regional: bool) -> dict[str, Any]:
    inputs = _inputs()
    options = {"policy": policy, "inner": inner, "strict": policy != "dense"}
    with torch.no_grad():
        alone = torch.compile(_wan(), backend="compiled_sparse", options=options)
        expected = alone(*inputs, return_dict=False)[0]
        model = _wan()
        _in_parallel(model)
        model(*inputs, return_dict=False)  # diffusers reads signatures at the first call
        sites = cs.explain(model, *inputs, return_dict=False, policy=policy).sites
        if regional:
            cs.attach(model)
            model.compile_repeated_blocks(backend="compiled_sparse", options=options)
            compiled = model
        else:
            compiled = torch.compile(
                model, backend="compiled_sparse", fullgraph=True, options=options
            )
        out = compiled(*inputs, return_dict=False)[0]
        exchanges = _exchanges(compiled, inputs)
    error = float((out - expected).abs().max() / expected.abs().max())
    said = [(each.path, each.decision, each.query_shape[:3], each.detail) for each in sites]
    return {"error": error, "exchanges": exchanges, "sites": said[::2]}


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_wan_in_context_parallel_is_sparse_in_one_graph_with_two_exchanges_a_layer(
    size: int,
) -> None:
    for found in values(size, _divided, STA, "aot_eager", False):
        assert found["error"] < 1e-5
        assert found["exchanges"] == 2 * SIZES["num_layers"]
        assert found["sites"] == [
            (f"blocks.{layer}.attn1", "sparse", (2, 4, 96), f"heads on {size} processes")
            for layer in range(2)
        ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "inner", "regional"),
    [("dense", "aot_eager", False), (STA, "inductor", False), (STA, "aot_eager", True)],
)
def test_wan_is_right_dense_by_inductor_and_block_by_block(
    policy: Any, inner: str, regional: bool
) -> None:
    for found in values(2, _divided, policy, inner, regional):
        assert found["error"] < 1e-5
        assert found["exchanges"] == 2 * SIZES["num_layers"]
