"""What the analysis says of a mask against the mask itself, evaluated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck
from hypothesis import event
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch import fx

from compiled_sparse.passes.fx import clone_dynamo_graph
from compiled_sparse.passes.layouts import Refusal
from compiled_sparse.passes.mask_forms import MaskForm
from compiled_sparse.passes.masks import insert_key_mask
from compiled_sparse.passes.masks import key_mask_of
from compiled_sparse.passes.sites import find_sites

pytestmark = pytest.mark.usefixtures("fresh_compiler")

BATCH, HEADS, LENGTH = 2, 3, 5
Build = Callable[..., Tensor]


@dataclasses.dataclass
class Reading:
    """What the analysis made of a mask."""

    form: MaskForm | Refusal | None = None
    keys: Tensor | None = None
    queries: Tensor | None = None


def read(build: Build, *inputs: Tensor) -> Reading:
    """Compile an attention call with a mask and evaluate the nodes inserted for the mask."""
    reading = Reading()

    def backend(graph: fx.GraphModule, _inputs: Any) -> Callable[..., Any]:
        edited = clone_dynamo_graph(graph)
        (site,) = find_sites(edited)[0]
        reading.form = key_mask_of(site)
        if not isinstance(reading.form, MaskForm):
            return graph.forward
        mask = insert_key_mask(site, reading.form)
        (output,) = (node for node in edited.graph.nodes if node.op == "output")
        # The site stays: nothing that was written after it may be read.
        output.prepend(site.node)
        edited.graph.lint()
        nodes = [node for node in (mask.keys, mask.queries) if node is not None]
        output.args = ((*output.args[0], *nodes),)
        edited.graph.lint()
        edited.recompile()

        def run(*arguments: Any) -> Any:
            results = list(edited.forward(*arguments))
            if mask.queries is not None:
                reading.queries = results.pop()
            if mask.keys is not None:
                reading.keys = results.pop()
            return tuple(results)

        return run

    torch._dynamo.reset()
    q = torch.randn(BATCH, HEADS, LENGTH, 8)
    compiled = torch.compile(
        lambda q, *rest: F.scaled_dot_product_attention(q, q, q, attn_mask=build(*rest)),
        backend=backend,
        fullgraph=True,
        dynamic=False,
    )
    compiled(q, *(each.clone() for each in inputs))
    return reading


def assert_true(reading: Reading, mask: Tensor) -> None:
    """Check that keys and queries found are the mask evaluated."""
    visible = mask if mask.dtype == torch.bool else mask == 0
    visible = visible.expand(BATCH, HEADS, LENGTH, LENGTH)
    if mask.dtype != torch.bool and bool((mask != float("-inf")).all()):
        visible = visible | ~visible.any(-1, keepdim=True)
    keys = torch.ones(BATCH, LENGTH).bool() if reading.keys is None else reading.keys
    assert keys.shape == (BATCH, LENGTH)
    found = keys[:, None, None, :]
    if reading.queries is not None:
        found = found & reading.queries[:, None, :, None]
    assert torch.equal(found.expand_as(visible), visible)


def vectors() -> tuple[Tensor, Tensor]:
    """Return two boolean [batch, length] that differ in every way."""
    first = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 1, 1]]).bool()
    second = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 1]]).bool()
    return first, second


# Writes.


def _before(m: Tensor, n: Tensor) -> Tensor:
    own = m.clone()
    own.logical_not_()
    return own[:, None, None]


def _view_before(m: Tensor, n: Tensor) -> Tensor:
    own = m.clone()
    own[:, 1:3].fill_(False)
    return own[:, None, None]


def _after(m: Tensor, n: Tensor) -> Tensor:
    own = m.clone()
    mask = own[:, None, None] & True
    own.fill_(True)
    return mask


def _through_view(m: Tensor, n: Tensor) -> Tensor:
    own = m.clone()
    mask = own[:, None, None]
    own[:, 2] = True
    return mask


def _bias_after(m: Tensor, n: Tensor) -> Tensor:
    own = m.clone()
    bias = torch.where(own, 0.0, float("-inf"))[:, None, None]
    own ^= True
    return bias


def _around(m: Tensor, n: Tensor) -> Tensor:
    own = m.clone()
    first = own & n
    own.logical_or_(n)
    return (first | (own & ~n))[:, None, None]


def _in_place_chain(m: Tensor, n: Tensor) -> Tensor:
    own = m.float()
    own -= 1
    own *= 10000.0
    return own[:, None, None]


def _copied(m: Tensor, n: Tensor) -> Tensor:
    own = m.clone()
    own.copy_(n)
    return own[:, None, None]


def _numbers_written(m: Tensor, n: Tensor) -> Tensor:
    own = torch.zeros(m.shape)
    own[:, :3] = 1.0
    own[1, 4] = 1.0
    return torch.where(own > 0.5, 0.0, -1e4)[:, None, None]


def _given_written(m: Tensor, n: Tensor) -> Tensor:
    m[:, 0] = False
    return (m & n)[:, None, None]


WRITES: dict[str, Build] = {
    build.__name__.strip("_"): build
    for build in (
        _before,
        _view_before,
        _after,
        _through_view,
        _bias_after,
        _around,
        _in_place_chain,
        _copied,
        _numbers_written,
        _given_written,
    )
}


@pytest.mark.parametrize("build", WRITES.values(), ids=WRITES)
def test_what_a_mask_holds_after_writes_is_read(build: Build) -> None:
    reading = read(build, *vectors())
    assert isinstance(reading.form, MaskForm), reading.form
    assert_true(reading, build(*(each.clone() for each in vectors())))


def test_a_bias_written_over_with_numbers_is_not_known_any_more() -> None:
    def build(m: Tensor, n: Tensor) -> Tensor:
        bias = torch.where(m, 0.0, float("-inf"))
        bias[:, 2] = n.float().mean()
        return bias[:, None, None]

    assert isinstance(read(build, *vectors()).form, Refusal)


HIDDEN_WRITES: dict[str, Callable[[Tensor], Any]] = {
    "numpy items": lambda bias: bias.numpy().__setitem__((slice(None), slice(3)), 0.0),
    "numpy method": lambda bias: bias.numpy().fill(0.0),
    "option by name": lambda bias: F.relu(bias, inplace=True),
    "option by position": lambda bias: F.hardtanh(bias, 0.0, 1.0, True),
    "result by position": lambda bias: F.normalize(bias.exp(), 2.0, -1, 1e-12, bias),
}


@pytest.mark.parametrize("write", HIDDEN_WRITES.values(), ids=HIDDEN_WRITES)
def test_a_bias_written_without_a_telling_name_is_not_known_any_more(
    write: Callable[[Tensor], Any],
) -> None:
    def build(m: Tensor, n: Tensor) -> Tensor:
        bias = torch.where(m, 0.0, float("-inf"))
        write(bias)
        return bias[:, None, None]

    assert isinstance(read(build, *vectors()).form, Refusal)


def _through_what_dropout_returned(m: Tensor) -> Tensor:
    bias = torch.where(m, 0.0, float("-inf"))
    F.dropout(bias, 0.1, training=False).zero_()
    return bias


def _behind_what_dropout_returned(m: Tensor) -> Tensor:
    own = m.clone()
    mask = F.dropout(own, 0.1, training=False) & True
    own.logical_not_()
    return mask


@pytest.mark.parametrize("written", [_through_what_dropout_returned, _behind_what_dropout_returned])
def test_a_write_reaches_what_dropout_returned_as_it_was(
    written: Callable[[Tensor], Tensor],
) -> None:
    reading = read(lambda m, n: written(m)[:, None, None], *vectors())
    if isinstance(reading.form, MaskForm):
        assert_true(reading, written(vectors()[0])[:, None, None])


def test_a_shape_changed_in_place_ends_the_analysis() -> None:
    """Dynamo shows the shape after the write for the nodes before it as well."""

    def build(m: Tensor, n: Tensor) -> Tensor:
        own = torch.where(m, 0.0, float("-inf"))
        own.unsqueeze_(1).unsqueeze_(1)
        return own

    assert isinstance(read(build, *vectors()).form, Refusal)


def test_a_write_inside_a_checkpointed_graph_is_seen_outside() -> None:
    def change(mask: Tensor) -> Tensor:
        mask.logical_not_()
        return mask & True

    def build(m: Tensor, n: Tensor) -> Tensor:
        own = m.clone()
        before = torch.where(own, 0.0, float("-inf"))
        torch.utils.checkpoint.checkpoint(change, own, use_reentrant=False)
        return torch.where(own, before, float("-inf"))[:, None, None]

    assert isinstance(read(build, *vectors()).form, Refusal)


# Random programs.

VECTOR_STEPS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda a, b: ~a,
    lambda a, b: a & b,
    lambda a, b: a | b,
    lambda a, b: a ^ b,
    lambda a, b: a.flip(1),
    lambda a, b: a.float() > 0.5,
    lambda a, b: a.long() * b.long() == 1,
    lambda a, b: (1 - a.int()).bool(),
    lambda a, b: torch.where(a, b, a),
    lambda a, b: a & (torch.arange(LENGTH) < a.sum(1, keepdim=True)),
    lambda a, b: torch.cat([a[:, 2:], b[:, :2]], 1),
    lambda a, b: F.pad(a[:, 1:], (1, 0), value=True),
    lambda a, b: a[:1],
    lambda a, b: torch.ones_like(a),
    lambda a, b: a.clone().masked_fill_(b, False),
    lambda a, b: a.t().contiguous().t(),
]

PLANES: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda a, b: a[:, None, None],
    lambda a, b: a[:, None, None].expand(-1, HEADS, LENGTH, -1),
    lambda a, b: a[:, None, :, None],
    lambda a, b: a[:, None, :, None].transpose(2, 3),
    lambda a, b: a[:, None, None].repeat(1, 1, LENGTH, 1).transpose(2, 3),
    lambda a, b: a[:, None, :, None] & b[:, None, None],
    lambda a, b: a[:, None, :, None] | b[:, None, None],
    lambda a, b: (a.unsqueeze(-1) & a.unsqueeze(-2)).unsqueeze(1),
    lambda a, b: a[:, None].repeat_interleave(HEADS, 0).view(-1, HEADS, 1, LENGTH),
    lambda a, b: a[:, None].repeat(HEADS, 1, 1).view(HEADS, -1, 1, LENGTH).transpose(0, 1),
    lambda a, b: a[:, None, None] & (torch.arange(HEADS)[:, None, None] > 0),
    lambda a, b: a[:, None, None] & torch.ones(LENGTH, LENGTH).tril().bool(),
    lambda a, b: a[:1],
    lambda a, b: a.any(1)[:, None, None, None] & b[:, None, None],
]

JOINS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda p, q: p,
    lambda p, q: p & q,
    lambda p, q: p | q,
    lambda p, q: p * q,
    lambda p, q: torch.where(p, q, p),
]

ENCODINGS: list[Callable[[Tensor], Tensor]] = [
    lambda p: p,
    lambda p: torch.where(p, 0.0, float("-inf")),
    lambda p: (1 - p.float()) * -10000.0,
    lambda p: torch.zeros(p.shape).masked_fill_(~p, -1e5),
    lambda p: p.float(),
    lambda p: p.expand(BATCH, HEADS, LENGTH, LENGTH),
]


@st.composite
def programs(draw: st.DrawFn) -> Build:
    """A mask made of two vectors by random steps."""
    steps = draw(
        st.lists(
            st.tuples(st.sampled_from(VECTOR_STEPS), st.integers(0, 9), st.integers(0, 9)),
            max_size=4,
        )
    )
    planes = draw(st.lists(st.sampled_from(PLANES), min_size=2, max_size=2))
    picks = draw(st.lists(st.integers(0, 9), min_size=4, max_size=4))
    join, encode = draw(st.sampled_from(JOINS)), draw(st.sampled_from(ENCODINGS))

    def build(*given: Tensor) -> Tensor:
        pool = list(given)
        for step, i, j in steps:
            pool.append(step(pool[i % len(pool)], pool[j % len(pool)]))
        a, b, c, d = (pool[-1 - pick % len(pool)] for pick in picks)
        return encode(join(planes[0](a, b), planes[1](c, d)))

    return build


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs(), st.integers(0, 2**31))
def test_a_mask_that_is_accepted_is_what_it_is_taken_for(build: Build, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.rand(BATCH, LENGTH, generator=generator) > 0.4 for _ in range(2)]
    try:
        mask = build(*inputs)
        mask.expand(BATCH, HEADS, LENGTH, LENGTH)
    except (RuntimeError, IndexError):
        return  # steps that do not fit each other
    reading = read(build, *inputs)
    event(f"{type(reading.form).__name__} {getattr(reading.form, 'name', '')}")
    if isinstance(reading.form, MaskForm):
        assert_true(reading, mask)
