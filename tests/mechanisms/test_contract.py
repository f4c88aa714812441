"""What a mechanism of another framework expects: metadata of a step, and hooks around the op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import compiled_sparse as cs
from compiled_sparse import registry
from compiled_sparse.config import MechanismConfig
from compiled_sparse.layout import BlockLayout
from compiled_sparse.mechanisms.block_selector import block_selector_mechanism
from compiled_sparse.mechanisms.contract import build_metadata
from compiled_sparse.metadata import CallMetadata
from compiled_sparse.metadata import LayoutMetadata
from compiled_sparse.metadata import current_call
from compiled_sparse.metadata import current_layout

GRID = (5, 7, 3)


def test_metadata_is_built_from_step_latents_and_patch() -> None:
    built = build_metadata(
        step=7,
        raw_latent_shape=(21, 61, 104),
        patch_size=(1, 2, 2),
        num_steps=50,
        sparsity=0.9,
        text=cs.Text(after=256),
    )
    assert built.grid_thw == (21, 30, 52)
    with built.applied():
        assert current_layout() == LayoutMetadata((21, 30, 52), cs.Text(after=256))
        assert current_call() == CallMetadata(7, 50, 0.9)
    assert current_layout() is None
    assert current_call() == CallMetadata()


def test_the_dict_view_is_shallow_and_leaves_out_what_it_should() -> None:
    text = cs.Text(after=256)
    built = build_metadata(step=0, raw_latent_shape=(4, 4), patch_size=(2, 2), text=text)
    view = built.as_dict(skip_fields={"sparsity", "num_steps"})
    assert view == {"step": 0, "grid_thw": (2, 2), "text": text}
    assert view["text"] is text
    view["step"] = 9
    assert built.step == 0


@dataclass(frozen=True, kw_only=True)
class Hooked(MechanismConfig):
    """All blocks, between two hooks."""

    name: ClassVar[str] = "hooked"

    factor: float = 2.0
    shift: float = 3.0


def select_all(
    q: Tensor, k: Tensor, layout: BlockLayout, config: Hooked, runtime: Any
) -> tuple[Tensor, Tensor]:
    every = torch.arange(layout.num_blocks, dtype=torch.int32, device=q.device)
    indices = every.expand(1, 1, layout.num_blocks, -1)
    return indices, torch.full_like(indices[..., 0], layout.num_blocks)


HOOKED = block_selector_mechanism(
    "hooked",
    Hooked,
    select_all,
    density=lambda config, layout: 1.0,
    preprocess=lambda q, k, v, layout, config: (config.factor * q, k, v + config.shift),
    postprocess=lambda out, layout, config: out * layout.num_blocks,
)


@pytest.fixture
def hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_mechanisms", dict(registry._mechanisms))
    registry.register(HOOKED)


def test_hooks_run_before_and_after_in_op_and_reference(hooked: None) -> None:
    config = Hooked()
    q, k, v = (torch.randn(2, 3, 105, 8, dtype=torch.float64) for _ in range(3))
    blocks = BlockLayout(GRID, config.resolve_tile(GRID)).num_blocks
    dense = torch.nn.functional.scaled_dot_product_attention(2.0 * q, k, v + 3.0)
    torch.testing.assert_close(cs.attention(q, k, v, config, grid_thw=GRID), dense * blocks)
    reference = cs.reference.attention(q, k, v, config, grid_thw=GRID)
    torch.testing.assert_close(reference, dense * blocks)


def test_autocast_casts_what_it_casts_for_dense_attention(hooked: None) -> None:
    q, k, v = (torch.randn(1, 2, 105, 8) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = cs.attention(q, k, v, Hooked(), grid_thw=GRID)
    assert out.dtype == torch.bfloat16


def test_the_op_passes_the_checks_of_torch(hooked: None) -> None:
    q, k, v = (torch.randn(2, 3, 105, 8, requires_grad=True) for _ in range(3))
    call = HOOKED.lower(Hooked(), (2, 3, 2), list(GRID), 0, 0)
    torch.library.opcheck(call.op, (q, k, v, None, *call.arguments, None))
