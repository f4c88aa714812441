"""Calls under `cs.metadata(mesh=...)` that are refused, and those that are left alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dividing import RUN
from dividing import Refined
from dividing import Single
from dividing import explained
from dividing import moba_over_heads
from dividing import sequence
from dividing import with_keys_gathered
from modules import TinyDiT
from modules import dit_inputs
from process_groups import lone_group
from torch import Tensor
from torch import distributed
from torch import nn

import compiled_sparse as cs
from compiled_sparse import registry
from compiled_sparse.errors import DistributedError

pytestmark = pytest.mark.usefixtures("fresh_compiler")

SDPA = F.scaled_dot_product_attention
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _refused(model: Any, *inputs: Any, **options: Any) -> DistributedError:
    with pytest.raises(DistributedError) as caught:
        explained(model, *inputs, **options)
    return caught.value


def test_a_run_of_the_video_is_divided() -> None:
    (found,) = explained(Single(), sequence())
    assert found.is_sparse
    assert found.detail.endswith("heads on 2 processes")
    assert found.query_shape == (1, 2, 120, 8)


def test_text_is_on_every_rank() -> None:
    (found,) = explained(Single(), sequence(RUN + 7), text=cs.Text(before=3, after=4))
    assert (found.is_sparse, found.text_before, found.text_after) == (True, 3, 4)
    assert found.query_shape == (1, 2, 127, 8)


@pytest.mark.parametrize(
    ("length", "text", "advice"),
    [
        (120, None, "divide the tokens before the model"),
        (127, cs.Text(after=7), "divide the tokens before the model"),
        (RUN + 7, None, "say in cs.metadata(text="),
        (RUN + 7, cs.Text(after=6), "say in cs.metadata(text="),
        (RUN, cs.Text(after=7), "say in cs.metadata(text="),
    ],
)
def test_another_number_of_tokens_is_refused(
    length: int, text: cs.Text | None, advice: str
) -> None:
    error = _refused(Single(), sequence(length), text=text)
    assert error.got.startswith(f"{length} tokens in the call")
    assert advice in error.next_step


@pytest.mark.parametrize("text", [None, cs.Text(after=7)])
@pytest.mark.parametrize(
    ("length", "place"),
    [(52, (1, 2)), (33, (1, 3)), (33, (2, 3)), (32, (2, 3))],
    ids=str,
)
def test_a_run_without_its_padding_is_refused(
    length: int, place: tuple[int, int], text: cs.Text | None
) -> None:
    """105 tokens on two ranks, or 100 on three, as chunk and tensor_split divide them."""
    grid = (5, 7, 3) if place[1] == 2 else (100, 1, 1)
    rows = length + (0 if text is None else text.after)
    error = _refused(Single(), sequence(rows), text=text, grid=grid, place=place)
    assert error.got.startswith(f"{rows} tokens in the call")
    assert "pad the tokens at the end" in error.next_step


def _masked(*shape: int) -> Single:
    return Single(lambda q, k, v: SDPA(q, k, v, torch.ones(shape, dtype=torch.bool)))


def _by_member(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return SDPA(*(each.flatten(0, 1) for each in (q, k, v))).unflatten(0, (1, 2))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (_masked(RUN, RUN), "mask_unsupported"),
        (_masked(1, 2, 1, RUN), "mask_unsupported"),
        (_masked(1, 1, 1, 1), "mask_unsupported"),
        (Single(lambda q, k, v: SDPA(q, k, v, is_causal=True)), "causal"),
        (Single(lambda q, k, v: SDPA(q, k.flip(2), v)), "layout_unknown"),
        (Single(lambda q, k, v: SDPA(q[0], k[0], v[0])[None]), "rank_unsupported"),
        (Single(_by_member), "rank_unsupported"),
        (Single(lambda q, k, v: FLASH(q, k, v)[0]), "other_attention"),
        (Single(lambda q, k, v: FLASH(query=q, key=k, value=v)[0]), "other_attention"),
    ],
)
def test_a_call_that_nothing_can_be_put_around_is_refused(model: Single, reason: str) -> None:
    assert _refused(model, sequence()).got.startswith(f"{reason}: ")


def test_keys_of_an_equally_long_other_input_are_refused() -> None:
    error = _refused(Single(), sequence(), sequence())
    assert "not provably the same tokens" in error.got


def test_flex_attention_among_a_run_is_refused() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    model = Single(flex_attention).requires_grad_(False)
    assert _refused(model, sequence()).got == "other_attention: flex_attention"


class _Packed(nn.Module):
    """`nn.MultiheadAttention`, whose sequence comes first where it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=False)[0]


def test_multi_head_attention_is_refused_among_a_run_and_left_alone_among_text() -> None:
    error = _refused(_Packed(), sequence())
    assert error.problem.startswith("mha attends")
    assert error.got == "other_attention: multi_head_attention_forward"
    (found,) = explained(_Packed(), sequence(7))
    assert (found.reason, found.detail) == ("other_attention", "multi_head_attention_forward")


@pytest.mark.parametrize("mesh", [True, False])
def test_a_kernel_called_by_its_name_is_reported(mesh: bool) -> None:
    model = Single(lambda q, k, v: FLASH(q, k, v)[0])
    text = sequence(7)
    (found,) = explained(model, text) if mesh else cs.explain(model, text).sites
    assert (found.reason, found.detail) == ("other_attention", FLASH.__name__)


@pytest.mark.parametrize("length", [7, 90])
def test_attention_to_text_on_all_ranks_is_left_alone(length: int) -> None:
    model, inputs = Single(), (sequence(), sequence(length))
    (found,) = explained(model, *inputs)
    assert found.reason == "cross_attention"
    with lone_group(2), cs.metadata(grid_thw=(4, 6, 5), mesh=distributed.group.WORLD):
        compiled = torch.compile(model, backend="compiled_sparse", options={"inner": "eager"})
        torch.testing.assert_close(compiled(*inputs), model(*inputs))


def test_short_text_among_itself_is_left_alone() -> None:
    model, inputs = Refined(), (sequence(), sequence(7))
    assert [each.path for each in explained(model, *inputs)] == ["refiner", "cross"]
    assert all(each.query_shape[2] in (7, RUN) for each in explained(model, *inputs))
    with lone_group(2), cs.metadata(grid_thw=(4, 6, 5), mesh=distributed.group.WORLD):
        compiled = torch.compile(model, backend="compiled_sparse", options={"inner": "eager"})
        torch.testing.assert_close(compiled(*inputs), model(*inputs))


@pytest.mark.parametrize("kind", ["overall", "block"])
def test_a_choice_over_several_heads_is_left_dense(kind: str) -> None:
    (found,) = explained(Single(), sequence(), policy=moba_over_heads(kind))
    assert found.reason == "heads_divided"
    assert "2 heads on several processes" in found.detail


@pytest.fixture
def topblocks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(registry, "_mechanisms", dict(registry._mechanisms))
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "foreign"), *sys.path])
    import topblocks

    registry.register(topblocks.MECHANISM)
    return topblocks


def test_a_mechanism_of_another_package_is_left_dense_unless_it_says_more(topblocks: Any) -> None:
    (found,) = explained(Single(), sequence(), policy=topblocks.TopBlocks())
    assert found.reason == "heads_divided"


def test_keys_gathered_from_other_ranks_are_left_alone() -> None:
    (found,) = explained(Single(with_keys_gathered), sequence())
    assert found.reason == "keys_gathered"
    assert found.query_shape == (1, 2, RUN, 8)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("grid", "reason"),
    [((6, 4, 5), ""), ((3, 8, 5), "layout_unknown"), ((3, 4, 10), "layout_unknown")],
)
def test_a_model_of_some_frames_is_one_ranks_run_and_one_of_some_rows_is_not(
    rank: int, grid: tuple[int, ...], reason: str
) -> None:
    model, inputs = TinyDiT(1), dit_inputs()  # patches are embedded in the graph: 3 x 4 x 5
    call, cross = explained(model, *inputs, grid=grid, place=(rank, 2))
    assert (call.reason, cross.reason) == (reason, "cross_attention")
    assert call.grid_thw == (None if reason else grid)
