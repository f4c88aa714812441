"""Masks of calls that stay dense, and rewritten graphs in the inner compilers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from mask_cases import KEY_PADDING
from mask_cases import OUTER
from mask_cases import Build
from mask_cases import outer
from mask_cases import prompt_mask
from mask_cases import with_mask
from modules import LENGTH
from modules import POLICY
from modules import Tiny
from modules import all_nodes
from modules import assert_close
from modules import assert_gradients_close
from modules import assert_untouched
from modules import compile_sparse
from modules import expected_output
from modules import parameter_gradients
from modules import raster
from modules import record
from modules import tokens
from modules import video
from torch import Tensor

from compiled_sparse.passes import proof
from compiled_sparse.passes.sdpa import SDPA
from compiled_sparse.selector import capabilities_of

pytestmark = pytest.mark.usefixtures("fresh_compiler")

SLIM: dict[str, tuple[Build, tuple[int, ...] | None, str]] = {
    "outer product": (outer, (2, 1, 1, LENGTH), "query_and_key_padding"),
    "two vectors": (OUTER["two vectors"], (2, 1, 1, LENGTH), "query_and_key_padding"),
    "minus infinity": (OUTER["minus infinity"], (2, 1, 1, LENGTH), "query_and_key_padding"),
    "expanded": (KEY_PADDING["expanded over all"], (2, 1, 1, LENGTH), "key_padding"),
    "additive": (KEY_PADDING["additive, expanded"], (2, 1, 1, LENGTH), "key_padding"),
    "per head": (KEY_PADDING["additive, per head"], (2, 1, 1, LENGTH), "key_padding"),
    "already small": (KEY_PADDING["times -10000"], (2, 1, 1, LENGTH), "key_padding"),
    "all true": (lambda m: torch.ones_like(m)[:, None, None], None, "all_true"),
    "no proof": (
        lambda m: (m.unsqueeze(-1) | m.unsqueeze(-2)).unsqueeze(1),
        (2, 1, LENGTH, LENGTH),
        "other",
    ),
}


@pytest.mark.parametrize(("build", "shape", "name"), SLIM.values(), ids=SLIM)
def test_a_dense_call_gets_the_smallest_mask_that_means_the_same(
    build: Build, shape: tuple[int, ...] | None, name: str
) -> None:
    model = with_mask(build)
    inputs = (video(batch=2), prompt_mask())
    backend, actual = record(model, *inputs, policy="dense")
    assert_close(actual, model(*inputs))
    assert [decision.mask for decision in backend.decisions] == [name]
    (site,) = [node for node in all_nodes(backend.after[0]) if node.target is SDPA]
    mask = site.kwargs["attn_mask"]
    assert (mask if mask is None else tuple(mask.meta["example_value"].shape)) == shape


def test_cross_attention_gets_a_small_mask_too() -> None:
    model = Tiny(
        lambda m, x, text, mask: m.attn(
            raster(x), text, attn_mask=mask[:, None, None].expand(-1, 2, LENGTH, -1)
        )
    )
    inputs = (video(batch=2), tokens(2, 7), torch.tensor([[True] * 4 + [False] * 3] * 2))
    backend, actual = record(model, *inputs)
    assert backend.outcomes == ["cross_attention"]
    assert_close(actual, model(*inputs))
    (site,) = [node for node in all_nodes(backend.after[0]) if node.target is SDPA]
    assert tuple(site.kwargs["attn_mask"].meta["example_value"].shape) == (2, 1, 1, 7)


def test_dropout_keeps_its_mask() -> None:
    model = Tiny(lambda m, x, mask: m.attn(raster(x), attn_mask=outer(mask), dropout_p=0.5))
    backend, _ = record(model, video(batch=2), prompt_mask())
    assert backend.outcomes == ["dropout"]
    assert [g.code for g in backend.before] == [g.code for g in backend.after]


@pytest.mark.parametrize("policy", [POLICY, "dense"])
@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "build",
    [outer, KEY_PADDING["additive, per head"], KEY_PADDING["one row"], OUTER["minus infinity"]],
    ids=["outer product", "per head", "one row", "minus infinity"],
)
def test_inner_compilers_take_the_rewritten_graph(build: Build, inner: str, policy: Any) -> None:
    model = with_mask(build)
    inputs = (video(batch=2), prompt_mask())
    actual = compile_sparse(model, policy=policy, inner=inner)(*inputs)
    expected = model(*inputs) if policy == "dense" else expected_output(model, *inputs)
    assert_close(actual, expected)
    found, wanted = (parameter_gradients(model.attn, output) for output in (actual, expected))
    assert_gradients_close(found, wanted)


def test_a_mechanism_without_masks_takes_those_that_hide_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def capabilities(config: Any) -> Any:
        return dataclasses.replace(capabilities_of(config), key_mask=False)

    monkeypatch.setattr(proof, "capabilities_of", capabilities)
    inputs = (video(batch=2), prompt_mask())
    backend, _ = record(with_mask(lambda m: torch.ones_like(m)[:, None, None]), *inputs)
    assert backend.outcomes == ["sparse"]
    backend, _ = record(with_mask(outer), *inputs)
    assert [d.detail for d in backend.decisions] == ["the mechanism takes no mask"]


def test_the_mask_of_a_call_of_another_rank_stays_as_it_is() -> None:
    def model(q: Tensor, mask: Tensor) -> Tensor:
        q = q * 1
        return SDPA(q, q, q, attn_mask=torch.ones_like(mask).expand(2, LENGTH, LENGTH))

    inputs = (torch.randn(2, LENGTH, 8), prompt_mask()[:, None])
    backend = assert_untouched(model, *inputs, reason="rank_unsupported")
    assert [decision.mask for decision in backend.decisions] == ["other"]
