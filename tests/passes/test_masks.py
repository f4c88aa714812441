"""Masks in every form models write them: which are key padding, and what is computed then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
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
from modules import tokens
from modules import video
from torch import Tensor
from torch import nn
from torch._dynamo.testing import CompileCounter

import compiled_sparse as cs
from compiled_sparse.passes.sites import SDPA

pytestmark = pytest.mark.usefixtures("fresh_compiler")

Build = Callable[[Tensor], Tensor]


def with_mask(build: Build) -> Tiny:
    """Return a model that makes its attention mask of one that it is given."""
    return Tiny(lambda m, x, mask: m.attn(raster(x), attn_mask=build(mask)))


def prompt_mask(batch: int = 2) -> Tensor:
    """Return a random boolean [batch, length]; no query is far from a key it may see."""
    generator = torch.Generator().manual_seed(7)
    mask = torch.rand(batch, LENGTH, generator=generator) > 0.3
    mask[:, -4:] = False
    return mask


def _outer(m: Tensor) -> Tensor:
    rows = m.view(m.shape[0], 1, 1, -1).repeat(1, 1, m.shape[1], 1)
    return (rows & rows.transpose(2, 3)).bool()


def _written(m: Tensor) -> Tensor:
    mask = torch.zeros(m.shape, dtype=torch.bool)
    for i, length in enumerate((41, 56)):
        mask[i, :length] = True
    return mask[:, None, None] & m[:, None, None]


def _lengths(m: Tensor) -> Tensor:
    lengths = m.sum(1, dtype=torch.int)
    hidden = torch.arange(LENGTH)[None] >= lengths[:, None]
    return torch.ones(m.shape, dtype=torch.bool).masked_fill(hidden, False)[:, None, None]


def _of_heads(m: Tensor) -> Tensor:
    """The additive mask as `prepare_attention_mask` spreads it over the heads."""
    bias = (1 - m.float()).mul(-10000.0).unsqueeze(1)
    return bias.repeat_interleave(2, dim=0, output_size=4).view(2, 2, -1, LENGTH)


def _joined(m: Tensor) -> Tensor:
    ones = torch.ones((m.shape[0], 40), dtype=torch.bool)
    return torch.cat([ones, m[:, 40:]], dim=1)[:, None, None, :]


KEY_PADDING: dict[str, Build] = {
    "four dimensions": lambda m: m[:, None, None, :],
    "unsqueezed": lambda m: m.unsqueeze(1).unsqueeze(1),
    "viewed": lambda m: m.view(2, 1, 1, -1),
    "double negation": lambda m: ~(~m)[:, None, None],
    "expanded over queries": lambda m: m[:, None, None].expand(-1, 1, LENGTH, -1),
    "expanded over all": lambda m: m[:, None, None].expand(2, 2, LENGTH, LENGTH),
    "repeated over queries": lambda m: m.view(2, 1, 1, -1).repeat(1, 1, LENGTH, 1),
    "transposed twice": lambda m: m[:, None, :, None].transpose(2, 3).contiguous(),
    "integers made bool": lambda m: m.long().add(0).bool()[:, None, None],
    "two conditions": lambda m: (m & (torch.arange(LENGTH) != 17))[:, None, None],
    "either of two": lambda m: (m | (torch.arange(LENGTH) % 7 == 3))[:, None, None],
    "shared by the batch": lambda m: m[:1, None, None],
    "one row": lambda m: m[:1],
    "padded": lambda m: F.pad(m[:, 50:], (50, 0), value=True)[:, None, None],
    "joined": _joined,
    "lengths": _lengths,
    "written per sample": _written,
    "times -10000": lambda m: ((1 - m.float()) * -10000.0)[:, None, None],
    "smallest number": lambda m: ((1 - m.float()) * torch.finfo(torch.float32).min)[:, None, None],
    "filled with -inf": lambda m: torch.zeros(m.shape).masked_fill(~m, float("-inf"))[
        :, None, None
    ],
    "filled in place": lambda m: torch.zeros(m.shape).masked_fill_(~m, float("-inf"))[
        :, None, None
    ],
    "where": lambda m: torch.where(m, 0.0, float("-inf"))[:, None, None],
    "logarithm": lambda m: m.float().log()[:, None, None],
    "additive, expanded": lambda m: torch.where(m, 0.0, -1e5)[:, None, None].expand(
        2, 2, LENGTH, LENGTH
    ),
    "additive, per head": _of_heads,
    "additive, joined": lambda m: torch.cat(
        [torch.zeros(2, 40), (1 - m[:, 40:].float()) * -10000.0], 1
    )[:, None, None],
}

OUTER: dict[str, Build] = {
    "view and repeat": _outer,
    "and": lambda m: (m.unsqueeze(-1) & m.unsqueeze(-2)).unsqueeze(1),
    "product of bools": lambda m: m[:, None, :, None] * m[:, None, None, :],
    "product of numbers": lambda m: (m[:, None, :, None].float() * m[:, None, None, :].float()) > 0,
    "minus infinity": lambda m: torch.zeros(2, 1, LENGTH, LENGTH).masked_fill(
        ~_outer(m), float("-inf")
    ),
    "two vectors": lambda m: (m.flip(1).unsqueeze(-1) & m.unsqueeze(-2)).unsqueeze(1),
}


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
    "a visible column": (lambda m: _column(_outer(m)), "differs from query to query"),
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
        lambda m: torch.where(_outer(m), 0.0, -1e4),
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
    "made inside": (_same, _outer),
    "made outside": (_outer, _same),
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
    backend = assert_rewritten(with_mask(_outer), video(batch=2), prompt_mask())
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


# Calls that stay dense.

SLIM: dict[str, tuple[Build, tuple[int, ...] | None, str]] = {
    "outer product": (_outer, (2, 1, 1, LENGTH), "query_and_key_padding"),
    "two vectors": (OUTER["two vectors"], (2, 1, 1, LENGTH), "query_and_key_padding"),
    "expanded": (KEY_PADDING["expanded over all"], (2, 1, 1, LENGTH), "key_padding"),
    "additive": (KEY_PADDING["additive, expanded"], (2, 1, 1, LENGTH), "key_padding"),
    "per head": (KEY_PADDING["additive, per head"], (2, 1, 1, LENGTH), "key_padding"),
    "already small": (KEY_PADDING["times -10000"], (2, 1, 1, LENGTH), "key_padding"),
    "all true": (lambda m: torch.ones_like(m)[:, None, None], None, "all_true"),
    "no proof": (NEAR_MISSES["either of two"][0], (2, 1, LENGTH, LENGTH), "other"),
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
    model = Tiny(lambda m, x, mask: m.attn(raster(x), attn_mask=_outer(mask), dropout_p=0.5))
    backend, _ = record(model, video(batch=2), prompt_mask())
    assert backend.outcomes == ["dropout"]
    assert [g.code for g in backend.before] == [g.code for g in backend.after]
