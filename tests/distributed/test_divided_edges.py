"""Calls that are nearly what divided attention is: they stay right, or are refused aloud."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from process_groups import lone_group
from processes import run_processes
from processes import values
from torch import Tensor
from torch import distributed
from torch import nn
from torch.distributed import _functional_collectives as functional
from torch.nn.attention.flex_attention import flex_attention

import compiled_sparse as cs
from compiled_sparse import backend

STA = cs.STA(window_thw=(3, 3, 3), tile_thw=(2, 2, 2))
HEADS = 4

# A model's own exchanges.


def _exchanged(x: Tensor, times: int = 1) -> Tensor:
    moved = x.flatten()
    for _ in range(times):
        moved = functional.all_to_all_single(moved, None, None, distributed.group.WORLD)
        if isinstance(moved, functional.AsyncCollectiveTensor):
            moved = moved.wait()
    return moved.reshape(x.shape)


def _scattered(x: Tensor, size: int, times: int = 1) -> Tensor:
    x = x.unflatten(2, (size, -1)).permute(2, 1, 0, 3, 4).contiguous()
    return _exchanged(x, times).flatten(0, 1).permute(1, 2, 0, 3)


def _gathered(x: Tensor, size: int, times: int = 1) -> Tensor:
    x = x.unflatten(2, (size, -1)).permute(2, 1, 3, 0, 4).contiguous()
    return _exchanged(x, times).flatten(0, 1).permute(2, 1, 0, 3)


def _plain(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    q, k, v = (_scattered(each, size) for each in (q, k, v))
    return _gathered(F.scaled_dot_product_attention(q, k, v), size)


def _written_to(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    q = q.clone()
    scattered = [_scattered(each, size) for each in (q, k, v)]
    q[:, :3] = 0.0
    return _gathered(F.scaled_dot_product_attention(*scattered), size) + q


def _sent_twice(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    q, k, v = (_scattered(each, size, 2) for each in (q, k, v))
    return _gathered(F.scaled_dot_product_attention(q, k, v), size)


def _sent_back_twice(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    q, k, v = (_scattered(each, size) for each in (q, k, v))
    return _gathered(F.scaled_dot_product_attention(q, k, v), size, 2)


def _narrow_values(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    return _plain(q, k, v[..., :8], size)


MODELS = (_plain, _written_to, _sent_twice, _sent_back_twice, _narrow_values)


def _errors() -> list[tuple[float, int]]:
    """How far each model is from itself without a compiler, and its sparse calls."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(rank)
    x = torch.randn(2, 8, HEADS, 16)
    found = []
    for model in MODELS:

        def run(x: Tensor, model: Callable[..., Tensor] = model) -> Tensor:
            return model(x * 1.1, x.sin(), x.cos(), size)

        expected = run(x)
        options = {"policy": STA, "inner": "eager"}
        torch._dynamo.reset()
        with cs.metadata(grid_thw=(2, 2, 4)):
            compiled: Any = torch.compile(run, backend="compiled_sparse", options=options)
            out = compiled(x)
            sparse = cs.explain(run, x, policy=STA).sites[0].decision == "sparse"
        found.append((float((out - expected).abs().max() / expected.abs().max()), int(sparse)))
    return found


def test_exchanges_unlike_the_known_ones_stay_as_they_are() -> None:
    for found in values(2, _errors):
        assert [error < 1e-6 for error, _ in found] == [True] * len(MODELS)
        assert [sparse for _, sparse in found] == [1, 0, 0, 0, 0]


# Tokens said to be divided.

GRID = (4, 4, 4)
RUN = 32
CONV = nn.Conv3d(4, 64, (1, 2, 2), (1, 2, 2))
MODULE = nn.MultiheadAttention(64, HEADS, batch_first=True)


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, **others: Any) -> Tensor:
    return F.scaled_dot_product_attention(_heads(query), _heads(key), _heads(value), **others)


def _self(x: Tensor, **others: Any) -> Tensor:
    return _attend(x, x * 2, x * 3, **others)


def _frames(x: Tensor) -> Tensor:
    return x.unflatten(1, (2, 16))


def _beside_text(x: Tensor, text: Tensor) -> Tensor:
    both = torch.cat([x, text], 1)
    return _attend(x, both * 2, both)


def _behind_text(x: Tensor, text: Tensor) -> Tensor:
    return _self(torch.cat([text, x], 1))


def _several(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(_heads(x)[None] * i for i in (1, 2, 3)))


def _of_vmap(x: Tensor) -> Tensor:
    return torch.vmap(_self)(x[None])


def _flex(x: Tensor) -> Any:
    return flex_attention(_heads(x), _heads(x) * 2, _heads(x))


def _beside_an_image(x: Tensor, image: Tensor) -> Tensor:
    return _self(x) * CONV(image).mean()


X, TEXT = torch.randn(2, RUN, 64), torch.randn(2, 10, 64)
AFTER = cs.Text(after=10)
REFUSED: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], cs.Text | None]] = {
    "cross_attention: 42 keys, 32 queries": (_beside_text, (X, TEXT), None),
    "cross_attention: 32 keys, 10 queries": (lambda x, t: _attend(t, x * 2, x), (X, TEXT), None),
    "partial_grid: 2 of 32": (
        lambda x: _self(_frames(x).transpose(1, 2).flatten(0, 1)),
        (X,),
        None,
    ),
    "partial_grid: 16 of 32": (lambda x: _self(_frames(x).flatten(0, 1)), (X,), None),
    "10 + 32 tokens in the call": (_behind_text, (X, TEXT), AFTER),
    "rank_unsupported: shapes (1, 2": (_several, (X,), None),
    "rank_unsupported: shapes (2, 4": (_of_vmap, (X,), None),
    "head_dim_unsupported": (
        lambda x: F.scaled_dot_product_attention(_heads(x), _heads(x) * 2, _heads(x)[..., :8]),
        (X,),
        None,
    ),
    "causal": (lambda x: _self(x, is_causal=True), (X,), None),
    "other_attention: flex_attention": (_flex, (X,), None),
    "other_attention: multi_head": (lambda x: MODULE(x, x, x, need_weights=False)[0], (X,), None),
    "not_video": (_beside_an_image, (X, torch.randn(2, 4, 2, 8, 8)), None),
}
"""What would attend to this rank's tokens only, by what the error says."""


@pytest.mark.parametrize("said", REFUSED)
def test_a_call_of_this_ranks_tokens_alone_is_refused(said: str) -> None:
    model, inputs, text = REFUSED[said]
    with pytest.raises(Exception, match="DistributedError") as caught:
        _explained(model, inputs, text)
    assert said in str(caught.value)


def _explained(
    model: Callable[..., Any], inputs: tuple[Tensor, ...], text: cs.Text | None = None
) -> list[str]:
    torch._dynamo.reset()
    with lone_group(2), cs.metadata(grid_thw=GRID, text=text, mesh=distributed.group.WORLD):
        report = cs.explain(model, *inputs, policy=STA)
    return [site.reason or site.decision for site in report.sites]


def test_calls_of_other_tokens_are_left_alone() -> None:
    def with_prompt(x: Tensor, text: Tensor) -> Tensor:
        text = _self(text).transpose(1, 2).flatten(2)
        x = _self(x).transpose(1, 2).flatten(2)
        return _attend(x, text * 2, text)

    assert _explained(with_prompt, (X, TEXT)) == ["layout_unknown", "sparse", "cross_attention"]
    front = cs.Text(before=10)
    assert _explained(_behind_text, (X, TEXT), front) == ["sparse"]


def test_text_and_video_whose_batches_are_not_known_to_be_one_are_exchanged_and_dense() -> None:
    def joint(x: Tensor, text: Tensor) -> Tensor:
        return _attend(*(torch.cat([x * i, text * i], 1) for i in (1, 2, 3)))

    assert _explained(joint, (X, TEXT), AFTER) == ["layout_unknown"]


@pytest.mark.parametrize(("place", "decision"), [(0, "sparse"), (1, "layout_unknown")])
def test_tokens_that_another_rank_should_hold_are_in_no_known_order(
    place: int, decision: str
) -> None:
    whole = torch.randn(2, 2 * RUN, 64)
    assert _explained(lambda x: _self(x.chunk(2, 1)[place]), (whole,)) == [decision]


# A variant that is compiled later.


def _fails_to_compile_on_one_rank() -> str:
    x = torch.randn(2, RUN, 64)
    options = {"policy": STA, "inner": "eager"}
    compiled: Any = torch.compile(_self, backend="compiled_sparse", options=options)
    with cs.metadata(grid_thw=GRID, mesh=distributed.group.WORLD):
        compiled(x)
        if distributed.get_rank() == 1:
            backend._compile = _no_compiler  # type: ignore[assignment]
        with cs.force("dense"), pytest.raises(Exception, match="no compiler") as caught:
            compiled(x)
    return str(caught.value)


def _no_compiler(*_: Any) -> Any:
    raise RuntimeError("no compiler")


def test_the_others_hear_of_a_variant_that_one_rank_cannot_compile() -> None:
    first, second = run_processes(2, _fails_to_compile_on_one_rank, collective_s=20)
    assert "failed before the first run" in first.value
    assert "no compiler" in second.value
