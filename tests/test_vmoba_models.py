"""VMoBA in compiled models: layers that take turns, dense layers and steps, published configs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from modules import GRID
from modules import TinyDiT
from modules import assert_close
from modules import assert_gradients_close
from modules import compile_sparse
from modules import dit_inputs
from modules import parameter_gradients
from test_config_vmoba import SQUARE
from test_config_vmoba import WIDE
from test_regional import regional
from torch import Tensor
from torch.overrides import TorchFunctionMode

import compiled_sparse as cs
from compiled_sparse.errors import ExportError

pytestmark = pytest.mark.usefixtures("fresh_compiler")

TURNS = cs.VMoBA(
    temporal_topk=2,
    spatial_chunk_size=(3, 2),
    spatial_topk=3,
    st_chunk_size=(2, 3, 2),
    st_topk=4,
    moba_select_mode="topk",
)


def sites(model: Any, *inputs: Any, policy: Any) -> list[str]:
    """What becomes of each call over the video: the first word of its detail, or the reason."""
    report = cs.explain(model, *inputs, policy=policy)
    return [
        site.detail.partition(" ")[0] if site.decision == "sparse" else site.reason
        for site in report.sites
        if site.kind != "cross"
    ]


def expected(model: TinyDiT, inputs: Any, config: Any, step: int | None = None) -> Tensor:
    with cs.reference.override(config, grid_thw=GRID, step=step):
        out: Tensor = model(*inputs)
    return out


def test_layers_of_a_whole_model_take_turns() -> None:
    model, inputs = TinyDiT(4), dit_inputs()
    assert sites(model, *inputs, policy=TURNS) == ["temporal", "spatial", "st", "temporal"]
    reference = expected(model, inputs, TURNS)
    assert_close(compile_sparse(model, policy=TURNS)(*inputs), reference)
    one_kind = expected(model, inputs, TURNS.for_layer(2))
    assert (one_kind - reference).abs().max() > 1e-3 * reference.abs().max()


def test_gradients_of_a_model_are_the_reference_s() -> None:
    model, inputs = TinyDiT(3), dit_inputs()
    reference = parameter_gradients(model, expected(model, inputs, TURNS))
    compiled = compile_sparse(model, policy=TURNS)
    found = parameter_gradients(model, compiled(*inputs))
    assert_gradients_close(found, reference)


def test_blocks_compiled_alone_know_their_layer_when_attached() -> None:
    model, inputs = TinyDiT(6).requires_grad_(False), dit_inputs()
    reference = expected(model, inputs, TURNS)
    cs.attach(model, TURNS)
    backend = regional(model)
    with cs.metadata(grid_thw=GRID):
        assert_close(model(*inputs), reference)
    assert backend.calls == 3, "one artifact for each kind of chunks"


def test_a_part_of_a_model_that_is_not_attached_stays_dense(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, inputs = TinyDiT(3).requires_grad_(False), dit_inputs()
    dense = model(*inputs)
    regional(model, policy=TURNS)
    with cs.metadata(grid_thw=GRID):
        assert_close(model(*inputs), dense)
    assert "attn1: layer_unknown" in caplog.text
    assert "cs.attach(model, policy)" in caplog.text


class TwoPasses(TinyDiT):
    """Guidance as two calls of the same blocks in one graph."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run the model twice."""
        return 2 * super().forward(*inputs) - super().forward(*inputs)


def test_layers_are_counted_anew_in_a_second_pass_of_a_graph() -> None:
    model, inputs = TwoPasses(4), dit_inputs()
    assert sites(model, *inputs, policy=TURNS) == ["temporal", "spatial", "st", "temporal"] * 2
    first_dense = cs.Policy({"*": TURNS}, dense_first_layers=1, dense_last_layers=1)
    assert sites(model, *inputs, policy=first_dense) == [
        *("layer_dense", "spatial", "st", "layer_dense") * 2
    ]


class Wandering(TinyDiT):
    """A model that comes back to its first block."""

    def forward(self, video: Tensor, text: Tensor, step: Tensor) -> Tensor:
        """Run blocks 0, 1, 0."""
        x = self.patch(video).flatten(2).transpose(1, 2)
        angles = torch.arange(x.shape[1])[:, None] * torch.linspace(0.1, 1, 8)
        for block in (0, 1, 0):
            x = self.blocks[block](x, text, torch.zeros(1, 16), angles)
        return x


def test_layers_of_blocks_that_are_used_again_are_not_known() -> None:
    assert sites(Wandering(2), *dit_inputs(), policy=TURNS) == ["layer_unknown"] * 3


def test_without_turns_no_layer_need_be_known() -> None:
    model, inputs = TinyDiT(2).requires_grad_(False), dit_inputs()
    config = TURNS.for_layer(1)
    reference = expected(model, inputs, config)
    regional(model, policy=config)
    with cs.metadata(grid_thw=GRID):
        assert_close(model(*inputs), reference)


@pytest.mark.parametrize("how", [pytest.param("whole", marks=pytest.mark.slow), "blocks"])
def test_layers_before_the_first_full_one_stay_dense(how: str) -> None:
    model, inputs = TinyDiT(4).requires_grad_(False), dit_inputs()
    config = cs.VMoBA(**{**vars(TURNS), "first_full_layer": 2})
    reference = expected(model, inputs, config)
    if how == "whole":
        assert sites(model, *inputs, policy=config) == [
            *("layer_dense", "layer_dense", "temporal", "spatial")
        ]
        assert_close(compile_sparse(model, policy=config)(*inputs), reference)
        return
    cs.attach(model, config)
    backend = regional(model)
    with cs.metadata(grid_thw=GRID):
        assert_close(model(*inputs), reference)
    assert backend.calls == 3, "dense, temporal, spatial"


def test_steps_before_the_first_full_one_stay_dense_and_an_unknown_one_is_warned_about(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, inputs = TinyDiT(2), dit_inputs()
    config = cs.VMoBA(**{**vars(TURNS), "first_full_step": 2})
    compiled = compile_sparse(model, policy=config)
    dense = model(*inputs)
    for step in (0, 1, 2, 3):
        with cs.metadata(step=step):
            wanted = dense if step < 2 else expected(model, inputs, config, step)
            assert_close(compiled(*inputs), wanted)
    assert "the step is not known" not in caplog.text
    with caplog.at_level(logging.WARNING, "compiled_sparse"):
        assert_close(compiled(*inputs), dense)
    assert "the step is not known" in caplog.text


def test_the_published_schedule_has_no_dense_steps() -> None:
    model, inputs = TinyDiT(2), dit_inputs()
    config = cs.VMoBA(**{**vars(TURNS), "first_full_step": 2, "published_schedule": True})
    assert_close(compile_sparse(model, policy=config)(*inputs), expected(model, inputs, TURNS))


@pytest.mark.slow
def test_an_exported_program_cannot_keep_the_steps() -> None:
    model, inputs = TinyDiT(2).requires_grad_(False), dit_inputs()
    program = torch.export.export(model, inputs)
    with pytest.raises(ExportError, match="knows no denoising steps"):
        cs.rewrite_exported(program, cs.VMoBA(first_full_step=2))
    rewritten, _ = cs.rewrite_exported(program, TURNS)
    assert_close(rewritten.module()(*inputs), expected(model, inputs, TURNS))


def wan(layers: int) -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=1,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )
    return model.eval().requires_grad_(False)


class SampledRows(TorchFunctionMode):
    """Check some rows of each self-attention against the definition, written for one query.

    Args:
        config: The config; layers are counted.
        grid: The token grid.
    """

    def __init__(self, config: cs.VMoBA, grid: tuple[int, int, int]) -> None:
        super().__init__()
        self.config, self.grid, self.layer, self.close = config, grid, 0, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace self-attention by `cs.attention`."""
        kwargs = kwargs or {}
        is_sdpa = func is torch.nn.functional.scaled_dot_product_attention
        given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
        if not is_sdpa or given["query"].shape[2] != given["key"].shape[2]:
            return func(*args, **kwargs)
        q, k, v = (given[name] for name in ("query", "key", "value"))
        one = self.config.for_layer(self.layer)
        out = cs.attention(q, k, v, one, grid_thw=self.grid, step=self.config.first_full_step)
        for row in range(37, q.shape[2], q.shape[2] // 40):
            self.check(row, q[0, 0].double(), k[0, 0].double(), v[0, 0].double(), out[0, 0], one)
        self.layer += 1
        return out

    def check(self, row: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, config: Any) -> None:
        """Compare one row; where two chunks are nearly as good either may be taken."""
        frames, height, width = self.grid
        token = torch.arange(frames * height * width)
        place = (token // (height * width), token // width % height, token % width)
        sides = {
            "temporal": (config.temporal_chunk_size, height, width),
            "spatial": (frames, *config.spatial_chunk_size),
            "st": config.st_chunk_size,
        }[config.kind]
        box = torch.stack([p // side for p, side in zip(place, sides, strict=True)], dim=1)
        _, chunk = box.unique(dim=0, return_inverse=True)
        num_chunks = int(chunk.max()) + 1
        means = torch.zeros(num_chunks, q.shape[1], dtype=torch.float64).index_add(0, chunk, k)
        gate = (means / chunk.bincount()[:, None]) @ q[row]
        own = int(chunk[row])
        if config.moba_select_mode == "topk":
            gate[own] = float("inf")
            chosen = gate.topk(config.topk).indices.tolist()
            edge = gate.sort(descending=True).values[config.topk - 1 : config.topk + 1]
        else:
            share = (gate - gate.min()) / (gate.max() - gate.min())
            need = config.moba_threshold - share[own] / (share.sum() + 1e-6)
            order = [c for c in share.sort(descending=True).indices.tolist() if c != own]
            reached = share[order].cumsum(0) / (share.sum() + 1e-6)
            count = max(1, int((reached < need).sum()) + 1)
            chosen = [own, *order[:count]]
            edge = torch.stack([need, reached[reached >= need][0]])
        self.close += float(edge.diff().abs()) < 1e-5
        if float(edge.diff().abs()) < 1e-5:
            return
        seen = torch.isin(chunk, torch.tensor(chosen))
        weights = (k[seen] @ q[row] * q.shape[1] ** -0.5).softmax(0)
        assert torch.allclose(out[row].double(), weights @ v[seen], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("document", "latents"),
    [(WIDE, (20, 56, 104)), (SQUARE, (20, 60, 104))],
    ids=["448x832", "480x832"],
)
def test_the_published_configs_run_as_they_are_on_a_compiled_wan(
    document: dict[str, Any], latents: tuple[int, int, int]
) -> None:
    model, config = wan(layers=4), cs.VMoBA.from_published(document)
    inputs = {
        "hidden_states": torch.randn(1, 4, *latents),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "return_dict": False,
    }
    grid = (latents[0], latents[1] // 2, latents[2] // 2)
    with cs.metadata(step=12):
        report = cs.explain(model, policy=config, **inputs)
    found = [site for site in report.sites if site.kind == "self"]
    kinds = [site.detail.partition(" ")[0] for site in found]
    assert kinds == ["temporal", "spatial", "st", "temporal"]
    assert {site.grid_thw for site in found} == {grid}
    with SampledRows(config, grid) as checked:
        (eager,) = model(**inputs)
    assert checked.layer == 4
    assert checked.close < 8, "of 160 rows few are undecided"
    compiled = torch.compile(
        model,
        backend="compiled_sparse",
        fullgraph=True,
        options={"policy": config, "inner": "aot_eager", "strict": True},
    )
    with cs.metadata(step=12):
        (out,) = compiled(**inputs)
    assert_close(out, eager, relative=1e-4)
    with cs.metadata(step=11):
        (dense,) = compiled(**inputs)
    assert (dense - eager).abs().max() > 1e-3 * eager.abs().max()
    assert_close(dense, model(**inputs)[0], relative=1e-4)
