"""Masks in every form models write them: which are key padding, and what is computed then."""

from __future__ import annotations

import pytest
import torch
from mask_cases import KEY_PADDING
from mask_cases import OUTER
from mask_cases import Build
from mask_cases import outer
from mask_cases import prompt_mask
from mask_cases import with_mask
from modules import GRID
from modules import LENGTH
from modules import SPARSE_OP
from modules import RecordingBackend
from modules import Tiny
from modules import all_nodes
from modules import assert_close
from modules import assert_rewritten
from modules import assert_untouched
from modules import expected_output
from modules import raster
from modules import record
from modules import video
from torch import Tensor
from torch import nn
from torch._dynamo.testing import CompileCounter

import compiled_sparse as cs

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.mark.parametrize("build", KEY_PADDING.values(), ids=KEY_PADDING)
def test_key_padding_in_every_form_is_accepted_and_computed(build: Build) -> None:
    inputs = (video(batch=2), prompt_mask())
    model = with_mask(build)
    backend = assert_rewritten(model, *inputs)
    assert [decision.mask for decision in backend.decisions] == ["key_padding"]
    unmasked = expected_output(Tiny.forward.__get__(_without_mask(model)), inputs[0])
    assert (expected_output(model, *inputs) - unmasked).abs().max() > 1e-3


def _without_mask(model: Tiny) -> Tiny:
    bare = Tiny(lambda m, x: m.attn(raster(x)))
    bare.load_state_dict(model.state_dict())
    return bare


@pytest.mark.parametrize("build", OUTER.values(), ids=OUTER)
def test_an_outer_product_is_accepted_and_padded_queries_give_zero(build: Build) -> None:
    model = with_mask(build)
    backend = assert_rewritten(model, video(batch=2), prompt_mask())
    assert [decision.mask for decision in backend.decisions] == ["query_and_key_padding"]


NEAR_MISSES: dict[str, tuple[Build, str]] = {
    "causal": (
        lambda m: m[:, None, None] & torch.ones(LENGTH, LENGTH).tril().bool(),
        "differs from query to query",
    ),
    "band": (
        lambda m: (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs() < 9,
        "differs from query to query",
    ),
    "differing heads": (
        lambda m: m[:, None, None] & (torch.arange(LENGTH) > torch.tensor([3, 9])[:, None, None]),
        "differs from head to head",
    ),
    "either of two": (
        lambda m: (m.unsqueeze(-1) | m.unsqueeze(-2)).unsqueeze(1),
        "differs from query to query",
    ),
    "a visible column": (lambda m: _column(outer(m)), "differs from query to query"),
    "valid queries alone": (lambda m: m[:, None, :, None], "it hides queries, not keys"),
    "nothing seen": (lambda m: (m & ~m)[:, None, None], "it hides every key"),
    "bias": (
        lambda m: m[:, None, None].to(torch.float32),
        "an additive mask of 0 and 1, not of 0 and one number below -9000",
    ),
    "weak bias": (lambda m: torch.where(m, 0.0, -100.0)[:, None, None], "of -100 and 0"),
    "shifted bias": (lambda m: torch.where(m, 1.0, -1e4)[:, None, None], "of -10000 and 1"),
    "two strengths": (
        lambda m: torch.where(m, torch.where(m.flip(1), 0.0, -1e4), -2e4)[:, None, None],
        "of -20000 and -10000 and 0",
    ),
    "distance bias": (
        lambda m: -(torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs().float(),
        "values are not known",
    ),
    "computed bias": (
        lambda m: torch.arange(LENGTH).sin().expand(2, 1, 1, -1),
        "values are not known",
    ),
    "infinity times zero": (
        lambda m: ((1 - m.float()) * float("-inf"))[:, None, None].nan_to_num(0.0, 0.0, -1e4),
        "values are not known",
    ),
    "additive outer product": (
        lambda m: torch.where(outer(m), 0.0, -1e4),
        "an additive mask that hides whole queries",
    ),
    "repeated tokens": (
        lambda m: (
            m[:, :30].repeat_interleave(2, dim=1)[:, None, None]
            & m[:, :30, None].expand(-1, -1, 2).reshape(2, 1, LENGTH, 1)
        ),
        "repeats a mask of other tokens",
    ),
}


def _column(mask: Tensor) -> Tensor:
    mask[:, :, :, 0] = True
    return mask


@pytest.mark.parametrize(("build", "detail"), NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_what_only_looks_like_key_padding_is_refused(build: Build, detail: str) -> None:
    model = with_mask(build)
    inputs = (video(batch=2), prompt_mask())
    backend = assert_untouched(model, *inputs, reason="mask_unsupported")
    assert detail in backend.decisions[0].detail
    assert [decision.mask for decision in backend.decisions] == ["other"]


def test_a_mask_of_the_other_sense_hides_the_other_keys() -> None:
    inputs = (video(batch=2), prompt_mask())
    model = with_mask(lambda m: (~m)[:, None, None])
    assert_rewritten(model, *inputs)
    straight = expected_output(with_mask(lambda m: m[:, None, None]), *inputs)
    assert (expected_output(model, *inputs) - straight).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(2, 1, 1, LENGTH), (1, LENGTH), (2, 2, LENGTH, LENGTH)])
def test_numbers_handed_in_are_refused_and_the_next_step_named(shape: tuple[int, ...]) -> None:
    model = Tiny(lambda m, x, mask: m.attn(raster(x), attn_mask=mask))
    inputs = (video(batch=2), torch.zeros(shape))
    backend = assert_untouched(model, *inputs, reason="mask_unsupported")
    assert "an additive float32 mask whose values are not known" in backend.decisions[0].detail
    assert "pass a bool mask [batch, 1, 1, keys]" in backend.decisions[0].detail


def test_a_learned_bias_is_refused() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tiny = Tiny(lambda m, x, mask: m.attn(raster(x), attn_mask=mask))
            self.bias = nn.Parameter(torch.randn(LENGTH))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.tiny(x, torch.where(mask, self.bias, -1e4)[:, None, None])

    inputs = (video(batch=2), prompt_mask())
    backend = assert_untouched(Biased(), *inputs, reason="mask_unsupported")
    assert "it is learned" in backend.decisions[0].detail


@pytest.mark.parametrize("cast", ["bool", "equal", "positive", "not zero"])
def test_numbers_become_a_mask_by_a_comparison(cast: str) -> None:
    casts: dict[str, Build] = {
        "bool": lambda m: m.bool(),
        "equal": lambda m: m == 1,
        "positive": lambda m: m > 0,
        "not zero": lambda m: m != 0,
    }
    model = with_mask(lambda m: casts[cast](m)[:, None, None])
    for dtype in (torch.float32, torch.int64):
        assert_rewritten(model, video(batch=2), prompt_mask().to(dtype))


@pytest.mark.parametrize("number", [-1e4, float("-inf")])
def test_a_sequence_that_is_all_padding_is_what_it_is_densely(number: float) -> None:
    """A finite bias on all keys is none; all keys at minus infinity give zeros."""
    mask = prompt_mask()
    mask[1] = False
    model = with_mask(lambda m: torch.where(m, 0.0, number)[:, None, None])
    inputs = (video(batch=2), mask)
    window = cs.STA(window_thw=(99, 99, 99), tile_thw=(2, 3, 2))
    backend, actual = record(model, *inputs, policy=window)
    assert backend.outcomes == ["sparse"]
    # Adding 10000 to a score costs it four digits, in the dense call.
    assert_close(actual, model(*inputs), 1e-2 if number == -1e4 else 1e-5)
    assert_rewritten(model, *inputs)


def test_half_precision_overflow_is_seen() -> None:
    """The smallest float32 is minus infinity in float16: an empty row gives zeros then."""
    smallest = torch.finfo(torch.float32).min
    mask = prompt_mask()
    mask[1] = False
    inputs = (video(batch=2).half(), mask)
    model = with_mask(lambda m: torch.where(m, 0.0, smallest).half()[:, None, None]).half()
    _, actual = record(model, *inputs)
    zeros = torch.zeros(LENGTH, 16, dtype=torch.float16)
    assert torch.equal(actual[1], model.attn.to_out(zeros))


def test_an_all_true_mask_is_left_out() -> None:
    build = {"bool": torch.ones, "additive": torch.zeros}
    for make, dtype in ((build["bool"], torch.bool), (build["additive"], torch.float32)):
        model = Tiny(
            lambda m, x, make=make, dtype=dtype: m.attn(
                raster(x), attn_mask=make(2, 1, 1, LENGTH, dtype=dtype)
            )
        )
        backend = assert_rewritten(model, video(batch=2))
        assert [decision.mask for decision in backend.decisions] == ["all_true"]
        (op,) = [node for node in all_nodes(backend.after[0]) if node.target is SPARSE_OP]
        assert op.args[3] is None


def test_masks_of_a_dynamic_batch_and_length_are_computed() -> None:
    def body(m: Tiny, x: Tensor, mask: Tensor) -> Tensor:
        rows = mask.view(mask.shape[0], 1, 1, -1).repeat(1, 1, mask.shape[1], 1)
        return m.attn(raster(x), attn_mask=rows & rows.transpose(2, 3))

    model = Tiny(body)
    graphs = []
    for backend in (CompileCounter(), RecordingBackend()):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
        for batch, grid in ((2, GRID), (3, (5, 3, 7)), (4, (2, 4, 6))):
            inputs = (video(batch, grid), torch.rand(batch, torch.Size(grid).numel()) > 0.3)
            actual = compiled(*inputs)
        graphs.append(getattr(backend, "frame_count", None) or len(backend.after))
    assert_close(actual, expected_output(model, *inputs, grid_thw=grid))
    assert set(backend.outcomes) == {"sparse"}
    assert graphs[0] == graphs[1], "the pass added guards"


def test_a_shared_mask_of_a_dynamic_batch_is_expanded() -> None:
    model = Tiny(lambda m, x, mask: m.attn(raster(x), attn_mask=mask[None, None]))
    torch._dynamo.reset()
    backend = RecordingBackend()
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    for batch in (2, 3):
        inputs = (video(batch), prompt_mask(1))
        assert_close(compiled(*inputs), expected_output(model, *inputs))
    assert set(backend.outcomes) == {"sparse"}
    assert backend.count(backend.after[-1:], torch.ops.aten.sym_size.int) > 0


class Checkpointed(nn.Module):
    """A model whose attention is recomputed in the backward pass.

    Args:
        outside: Makes of a mask what is passed into the checkpointed part.
        inside: Makes of that the attention mask.
    """

    def __init__(self, outside: Build, inside: Build) -> None:
        super().__init__()
        self.tiny = Tiny(self.body)
        self.outside, self.inside = outside, inside

    def body(self, m: Tiny, x: Tensor, mask: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(
            self.attend, m, x, self.outside(mask), use_reentrant=False
        )

    def attend(self, m: Tiny, x: Tensor, mask: Tensor) -> Tensor:
        """What is recomputed."""
        return m.attn(raster(x), attn_mask=self.inside(mask))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Embed the video and attend."""
        return self.tiny(x, mask)


def _same(m: Tensor) -> Tensor:
    return m


CHECKPOINTED: dict[str, tuple[Build, Build]] = {
    "made inside": (_same, outer),
    "made outside": (outer, _same),
    "additive, made outside": (KEY_PADDING["times -10000"], _same),
    "expanded outside": (KEY_PADDING["expanded over all"], _same),
    "bool outside": (KEY_PADDING["four dimensions"], _same),
    "minus infinity outside": (OUTER["minus infinity"], _same),
}


@pytest.mark.parametrize(("outside", "inside"), CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_masks_are_followed_into_checkpointed_graphs(outside: Build, inside: Build) -> None:
    model = Checkpointed(outside, inside)
    inputs = (video(batch=2), prompt_mask())
    backend, actual = record(model, *inputs)
    assert backend.outcomes == ["sparse"], [str(d) for d in backend.decisions]
    model.tiny.body = lambda m, x, mask: model.attend(m, x, outside(mask))
    expected = expected_output(model, *inputs)
    assert_close(actual, expected)
    (gradient,) = torch.autograd.grad(actual.sum(), model.tiny.patch.weight)
    (wanted,) = torch.autograd.grad(expected.sum(), model.tiny.patch.weight)
    assert_close(gradient, wanted, 1e-4)


# The graph that is left.


def test_the_large_mask_is_not_computed_where_a_small_one_is_at_hand() -> None:
    backend = assert_rewritten(with_mask(outer), video(batch=2), prompt_mask())
    elements = [
        node.meta["example_value"].numel()
        for node in all_nodes(backend.after[0])
        if getattr(node.meta.get("example_value"), "dtype", None) == torch.bool
    ]
    assert max(elements) == 2 * LENGTH


def test_the_inserted_nodes_say_what_they_hold() -> None:
    backend = assert_rewritten(with_mask(KEY_PADDING["one row"]), video(batch=2), prompt_mask())
    for node in all_nodes(backend.after[0]):
        assert node.op in ("output",) or "example_value" in node.meta, node
