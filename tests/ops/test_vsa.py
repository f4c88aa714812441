"""Video sparse attention as an op: values, gradients, selection, and what the compiler sees."""

from __future__ import annotations

import itertools
import math
from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
import vsa_oracle
from attending import DTYPES
from attending import NAMES
from attending import Attend
from attending import Inputs
from attending import Selections
from attending import assert_same_outcome
from attending import cast
from attending import outcome
from attending import over_blhd
from attending import relative
from attending import weights_for
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from strategies import layouts
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from vsa_oracle import Case

import compiled_sparse as cs
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops.plan import tile_of_token

OPS = torch.ops.compiled_sparse
GRID, TILE, TEXT = (5, 7, 3), (2, 3, 2), (4, 9)
VIDEO_AND_TEXT = Case(GRID, TILE, 0.6, TEXT)
CASES = {
    "video": Case(GRID, TILE, 0.7),
    "video and text": VIDEO_AND_TEXT,
    "image": Case((13, 11), (3, 4), 0.8, (0, 5)),
    "audio": Case((61,), (4,), 0.85, (7, 0)),
    "more text than video": Case((3, 2), (2, 2), 0.5, (40, 3)),
    "one tile": Case((3, 2, 2), (4, 4, 4), 0.9, (2, 0)),
    "all tiles": Case(GRID, TILE, 0.0, TEXT),
}
PUBLISHED = pytest.param(Case((9, 10, 7), (4, 4, 4), 0.8), marks=pytest.mark.slow)
GATES = ["no gate", "gate", "ungated"]
GATE_FIRST = ["gate", *(pytest.param(kind, marks=pytest.mark.slow) for kind in GATES[::2])]
"""A gate takes in both branches: the fast tests that are long make do with it."""


def vsa(case: Case, **changes: Any) -> Attend:
    """`cs.attention` as a function of q, k, v and perhaps a gate."""
    name = "ungated" if case.ungated else None
    arguments: dict[str, Any] = {
        "config": cs.VSA(sparsity=case.sparsity, tile_thw=case.tile, gate=name),
        "grid_thw": case.grid,
        "text": cs.Text(*case.text),
        "key_mask": case.key_mask,
        "scale": case.scale,
        "return_lse": True,
        **changes,
    }

    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None) -> Any:
        return cs.attention(q, k, v, gate=gate, **arguments)

    return attend


def tensors(
    case: Case,
    kind: str = "gate",
    *,
    heads: int = 3,
    kv_heads: int = 3,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Queries, keys and values, and a gate where the kind says so; all want gradients."""
    count = 4 if kind == "gate" else 3
    return [
        torch.randn(2, each, case.length, head_dim).to(dtype).requires_grad_()
        for each in (heads, kv_heads, kv_heads, heads)[:count]
    ]


def loops(
    case: Case, chosen: vsa_oracle.Chosen | None = None, rounding: torch.dtype | None = None
) -> Attend:
    """The oracle as a function of q, k, v and perhaps a gate."""

    def attend(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        result = vsa_oracle.attention(
            *inputs[:3], case, *inputs[3:], chosen=chosen, rounding=rounding
        )
        return result.out, result.lse

    return attend


def of_kind(case: Case, kind: str) -> Case:
    return case._replace(ungated=kind == "ungated")


def assert_error_is_that_of_plain_arithmetic(case: Case, inputs: Inputs) -> None:
    """Check against float64 with the tiles that were selected, by the rule of `helpers`."""
    weights, dtype = weights_for(inputs), inputs[0].dtype
    with Selections() as selections:
        actual = outcome(vsa(case), inputs, weights)
    (chosen,) = selections.chosen
    exact = outcome(loops(case, chosen), cast(inputs, torch.float64), weights)
    plain = plain_outcomes(case, chosen, inputs, weights)
    for name, result in actual.items():
        assert result.dtype == (torch.float32 if name == "lse" else dtype)
        helpers.assert_error_within_budget(name, result, exact[name], *(p[name] for p in plain))


def plain_outcomes(
    case: Case, chosen: vsa_oracle.Chosen, inputs: Inputs, weights: tuple[Tensor, Tensor]
) -> list[dict[str, Tensor]]:
    """The same in low precision: textbook attention, and the compressed branch as published."""
    dtype, mask = inputs[0].dtype, vsa_oracle.mask(chosen, case)
    q, k, v, *gate = cast(inputs, torch.float32)
    compressed = vsa_oracle.attention(
        q, k, v, case, *gate, chosen=chosen, rounding=dtype
    ).compressed
    shares = {name: torch.zeros_like(each) for name, each in zip(NAMES, inputs, strict=False)}
    if compressed.requires_grad:
        leaves = [q, k, v, *gate]
        grads = torch.autograd.grad(compressed, leaves, weights[0].float())
        shares = {name: each.to(dtype) for name, each in zip(NAMES, grads, strict=False)}
    qkv = tuple(each.detach() for each in inputs[:3])
    results = []
    for factor_on, base in itertools.product(("queries", "keys", "scores"), (math.e, 2.0)):
        rounding = (factor_on, base, False)
        sparse = helpers.textbook(qkv, weights, mask, case.key_mask, case.scale, rounding)
        summed = {name: sparse.get(name, 0) + share for name, share in shares.items()}
        out = (sparse["out"].float() + compressed.detach()).to(dtype)
        results.append({"out": out, "lse": sparse["lse"], **summed})
    return results


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("case", [*CASES.values(), PUBLISHED], ids=[*CASES, "published tile"])
def test_the_error_is_that_of_plain_arithmetic(case: Case, kind: str, dtype: torch.dtype) -> None:
    inputs = tensors(case, kind, dtype=dtype)
    assert_error_is_that_of_plain_arithmetic(of_kind(case, kind), inputs)


def padding(case: Case) -> Tensor:
    """A key mask that hides whole tiles of one sequence and half of the other."""
    key_mask = torch.rand(2, case.length) < 0.5
    key_mask[0, case.tiles[-1]] = False
    key_mask[1, case.tiles[0]] = True
    return key_mask


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("case", [VIDEO_AND_TEXT, CASES["audio"], PUBLISHED])
def test_padding_grouped_heads_and_scale_keep_that_error(
    case: Case, kind: str, dtype: torch.dtype
) -> None:
    case = case._replace(key_mask=padding(case), scale=0.4)
    inputs = tensors(case, kind, kv_heads=1, dtype=dtype)
    assert_error_is_that_of_plain_arithmetic(of_kind(case, kind), inputs)


@given(layouts(), st.floats(0, 0.99), st.booleans(), st.sampled_from(GATES))
@settings(max_examples=25)
def test_any_layout_gives_what_the_reference_gives(
    layout: BlockLayout, sparsity: float, masked: bool, kind: str
) -> None:
    case = Case(layout.grid, layout.tile, sparsity, (layout.text_before, layout.text_after))
    case = of_kind(case._replace(key_mask=padding(case) if masked else None), kind)
    q, k, v, *gate = tensors(case, kind, head_dim=3, dtype=torch.float64)
    weights = weights_for([q])
    actual = outcome(vsa(case), [q, k, v, *gate], weights)
    name = "ungated" if case.ungated else None
    config = cs.VSA(sparsity=sparsity, tile_thw=case.tile, gate=name)

    def reference(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None) -> Any:
        where = {"grid_thw": case.grid, "text": cs.Text(*case.text), "key_mask": case.key_mask}
        return cs.reference.attention(q, k, v, config, **where, gate=gate, return_lse=True)

    expected = outcome(reference, [q, k, v, *gate], weights)
    for each, other in zip(actual.values(), expected.values(), strict=True):
        torch.testing.assert_close(each, other)


@pytest.mark.parametrize("kind", GATE_FIRST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1, 4, 16])
def test_large_queries_and_keys_stay_within_the_published_errors(
    factor: int, dtype: torch.dtype, kind: str
) -> None:
    case = of_kind(Case((8, 8, 8), (4, 4, 4), 0.625), kind)
    q, k, *rest = (torch.randn(1, 2, 512, 128) for _ in range(4 if kind == "gate" else 3))
    inputs = [each.to(dtype).requires_grad_() for each in (q * factor, k * factor, *rest)]
    weights = weights_for(inputs)
    with Selections() as selections:
        actual = outcome(vsa(case), inputs, weights)
    assert selections.counts == {3}
    exact = outcome(loops(case, *selections.chosen), cast(inputs, torch.float64), weights)
    limits = (2e-2, 5e-2, 2e-2)
    if dtype == torch.float32:
        # An exponential is off by as much as its exponent is rounded.
        largest = float((inputs[0] @ inputs[1].mT).detach().abs().max()) / math.sqrt(128)
        limits = (2 * torch.finfo(dtype).eps * largest,) * 3
    assert relative(actual["out"], exact["out"]) < limits[0]
    for name in NAMES[: len(inputs)]:
        assert relative(actual[name], exact[name]) < limits[1], name
        ratio = float(actual[name].double().norm() / exact[name].norm())
        assert abs(ratio - 1) < limits[2], name


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "key mask"])
def test_gradcheck_agrees_in_float64(masked: bool, kind: str) -> None:
    case = of_kind(Case((3, 5), (2, 2), 0.5, (1, 2)), kind)
    inputs = tensors(case, kind, heads=2, kv_heads=1, head_dim=3, dtype=torch.float64)
    attend = vsa(case._replace(key_mask=padding(case) if masked else None))
    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


def test_the_selection_passes_no_gradient_on() -> None:
    case = CASES["video"]._replace(sparsity=0.95)
    inputs = tensors(case, "no gate")
    with Selections() as selections:
        out, _ = vsa(case)(*inputs)
    (chosen,) = selections.chosen
    (grad,) = torch.autograd.grad(out[0, 0, case.tiles[0]].sum(), inputs[1])
    for tile, tokens in enumerate(case.tiles):
        assert bool((grad[0, 0, tokens] != 0).any()) == (tile in chosen[0][0][0])


@pytest.mark.parametrize("wanted", range(4), ids=["q", "k", "v", "gate"])
def test_one_input_alone_may_want_a_gradient(wanted: int) -> None:
    inputs = tensors(VIDEO_AND_TEXT)
    weights = weights_for(inputs)
    everything = outcome(vsa(VIDEO_AND_TEXT), inputs, weights)
    for number, each in enumerate(inputs):
        each.requires_grad_(number == wanted)
    attend = vsa(VIDEO_AND_TEXT, return_lse=False)
    out = attend(*inputs)
    (grad,) = torch.autograd.grad(out, inputs[wanted], weights[0])
    if wanted > 1:  # lse depends on neither values nor gate
        torch.testing.assert_close(grad, everything[NAMES[wanted]])
    else:
        all_of_them = [each.detach().requires_grad_() for each in inputs]
        expected = torch.autograd.grad(attend(*all_of_them), all_of_them[wanted], weights[0])
        torch.testing.assert_close(grad, *expected)


def test_nothing_left_out_is_dense_without_or_with_a_closed_gate() -> None:
    case = CASES["all tiles"]
    q, k, v, gate = tensors(case, dtype=torch.float64)
    dense = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(vsa(case)(q, k, v)[0], dense)
    torch.testing.assert_close(vsa(case)(q, k, v, torch.zeros_like(gate))[0], dense)
    assert not torch.allclose(vsa(case)(q, k, v, gate)[0], dense)


def test_text_has_no_part_in_the_compressed_branch() -> None:
    q, k, v, gate = tensors(VIDEO_AND_TEXT)
    out, lse = vsa(VIDEO_AND_TEXT)(q, k, v, gate)
    alone, alone_lse = vsa(VIDEO_AND_TEXT)(q, k, v)
    before, after = TEXT
    video = slice(before, VIDEO_AND_TEXT.length - after)
    assert not torch.allclose(out[:, :, video], alone[:, :, video])
    assert torch.equal(out[:, :, :before], alone[:, :, :before])
    assert torch.equal(out[:, :, -after:], alone[:, :, -after:])
    assert torch.equal(lse, alone_lse)


@pytest.mark.parametrize(
    ("tiles", "sparsity", "kept"),
    [(10, 0.7, 4), (10, 0.4, 6), (20, 0.85, 4), (10, 0.99, 1), (10, 0.0, 10)],
)
@pytest.mark.parametrize("given_as", ["config", "number", "tensor", "metadata"])
def test_the_number_of_tiles_follows_the_published_arithmetic(
    tiles: int, sparsity: float, kept: int, given_as: str
) -> None:
    case = Case((4 * tiles - 1,), (4,), sparsity if given_as == "config" else 0.5)
    tensor = torch.tensor(sparsity, dtype=torch.float64)
    given = {"number": sparsity, "tensor": tensor}.get(given_as)
    call = sparsity if given_as == "metadata" else 0.25
    with cs.metadata(sparsity=None if given_as == "config" else call):
        out, _ = vsa(case, sparsity=given)(*(inputs := tensors(case, "no gate")))
    for tokens in case.tiles:
        (grad,) = torch.autograd.grad(out[0, 0, tokens[0]].sum(), inputs[2], retain_graph=True)
        reached = [bool((grad[0, 0, each] != 0).all()) for each in case.tiles]
        assert sum(reached) == kept


@given(st.integers(1, 60), st.floats(0, 1, exclude_max=True))
def test_a_sparsity_as_a_tensor_keeps_as_many_tiles_as_the_number(
    tiles: int, sparsity: float
) -> None:
    x = torch.zeros(1, 1, tiles, 1)
    case = Case((tiles,), (1,))
    for given_sparsity in (sparsity, torch.tensor(sparsity, dtype=torch.float64)):
        with Selections() as selections:
            vsa(case, sparsity=given_sparsity)(x, x, x)
        assert selections.counts == {case._replace(sparsity=sparsity).kept}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_of_equal_scores_the_first_tiles_are_taken_and_no_more(dtype: torch.dtype) -> None:
    case = Case((40,), (4,), 0.7)
    q, k, v = (each.detach() for each in tensors(case, "no gate", dtype=dtype))
    for queries, keys in ((torch.zeros_like(q), k), (q, torch.ones_like(k))):
        with Selections() as selections:
            vsa(case)(queries, keys, v)
        assert selections.counts == {4}
        rows = torch.tensor(selections.chosen).flatten(0, -2)
        assert bool((rows == torch.arange(4)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nearly_every_row_in_low_precision_is_selected_as_the_loops_do(dtype: torch.dtype) -> None:
    case = Case((12, 12), (2, 2), 0.75)
    inputs = tensors(case, "no gate", head_dim=32, dtype=dtype)
    with Selections() as selections:
        vsa(case)(*inputs)
    q, k, v = cast(inputs, torch.float32)
    expected = torch.tensor(vsa_oracle.attention(q, k, v, case, rounding=dtype).chosen)
    rows = (torch.tensor(*selections.chosen) == expected).all(-1)
    assert float(rows.double().mean()) > 0.99


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", GATES)
def test_what_masked_keys_hold_never_matters(bad: float, kind: str) -> None:
    key_mask = padding(VIDEO_AND_TEXT)
    key_mask[1] = False
    case = of_kind(VIDEO_AND_TEXT._replace(key_mask=key_mask), kind)
    inputs = tensors(case, kind)
    weights = weights_for(inputs)
    results = []
    for fill in (0.0, bad):
        leaves = [each.detach().clone() for each in inputs]
        for each in leaves[1:3]:
            each.masked_fill_(~key_mask[:, None, :, None], fill)
        results.append(outcome(vsa(case), [each.requires_grad_() for each in leaves], weights))
    for name, each in results[1].items():
        assert torch.equal(each, results[0][name]), name
    assert bool((results[1]["out"][1] == 0).all())
    assert bool((results[1]["lse"][1] == -math.inf).all())


def test_hidden_tiles_are_selected_last() -> None:
    case = Case((40,), (4,), 0.7)
    key_mask = torch.ones(2, 40, dtype=torch.bool)
    key_mask[0, :20] = False
    key_mask[1, 8:] = False
    with Selections() as selections:
        vsa(case._replace(key_mask=key_mask))(*tensors(case))
    first, second = (torch.tensor(each) for each in selections.chosen[0])
    assert bool((first >= 5).all())
    assert bool((second == torch.arange(4)).all())


def test_an_empty_batch_gives_an_empty_output_and_gradients() -> None:
    inputs = [each.detach()[:0].requires_grad_() for each in tensors(VIDEO_AND_TEXT)]
    out, _ = vsa(VIDEO_AND_TEXT)(*inputs)
    assert out.shape == inputs[0].shape
    grads = torch.autograd.grad(out.sum(), inputs)
    assert [grad.shape for grad in grads] == [each.shape for each in inputs]


@pytest.mark.parametrize("head_dim", [1, 5, 65])
def test_any_head_size_agrees_with_the_loops(head_dim: int) -> None:
    inputs = tensors(VIDEO_AND_TEXT, head_dim=head_dim, dtype=torch.float64)
    weights = weights_for(inputs)
    actual = outcome(vsa(VIDEO_AND_TEXT), inputs, weights)
    expected = outcome(loops(VIDEO_AND_TEXT), inputs, weights)
    for name, each in actual.items():
        torch.testing.assert_close(each, expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "key mask"])
def test_strides_of_inputs_do_not_matter_and_those_of_the_output_are_the_kernel_ops(
    masked: bool, dtype: torch.dtype
) -> None:
    case = VIDEO_AND_TEXT._replace(key_mask=padding(VIDEO_AND_TEXT) if masked else None)
    inputs = tensors(case, dtype=dtype)
    weights = weights_for(inputs)
    expected = outcome(vsa(case), inputs, weights)
    sliced = [torch.cat([each, each], dim=3)[..., :8] for each in cast(inputs, dtype)]
    for others in (list(map(over_blhd, inputs)), sliced):
        others = [each.detach().requires_grad_() for each in others]
        actual = outcome(vsa(case), others, weights)
        for name, each in actual.items():
            torch.testing.assert_close(each, expected[name])
        for kind in (others, others[:3]):
            assert vsa(case)(*kind)[0].transpose(1, 2).is_contiguous()


def test_expanded_heads_and_batches_are_read_as_what_they_are() -> None:
    q, k, v, gate = (each.detach() for each in tensors(VIDEO_AND_TEXT))
    expanded = [each[:1, :1].expand(2, 3, -1, -1) for each in (k, v, gate)]
    expected = vsa(VIDEO_AND_TEXT)(q, *(each.contiguous() for each in expanded))
    for each, other in zip(vsa(VIDEO_AND_TEXT)(q, *expanded), expected, strict=True):
        torch.testing.assert_close(each, other)


def test_batch_entries_do_not_see_each_other() -> None:
    inputs = [each.detach() for each in tensors(VIDEO_AND_TEXT)]
    both = vsa(VIDEO_AND_TEXT)(*inputs)
    for number in range(2):
        alone = vsa(VIDEO_AND_TEXT)(*(each[number : number + 1] for each in inputs))
        for each, other in zip(alone, both, strict=True):
            torch.testing.assert_close(each, other[number : number + 1])


def test_autocast_computes_in_its_dtype_and_leaves_the_sparsity_alone() -> None:
    inputs = tensors(VIDEO_AND_TEXT)
    sparsity = torch.tensor(0.7, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16), Selections() as selections:
        out, _ = vsa(VIDEO_AND_TEXT, sparsity=sparsity)(*inputs)
    assert out.dtype == torch.bfloat16
    assert selections.counts == {VIDEO_AND_TEXT._replace(sparsity=0.7).kept}
    low = cast(inputs, torch.bfloat16)
    assert torch.equal(out, vsa(VIDEO_AND_TEXT, sparsity=0.7)(*low)[0])
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(grad.dtype == torch.float32 for grad in grads)


def test_what_inference_mode_made_serves_training() -> None:
    tile_of_token.cache_clear()
    inputs = tensors(VIDEO_AND_TEXT)
    with torch.inference_mode():
        out, _ = vsa(VIDEO_AND_TEXT)(*inputs)
    again, _ = vsa(VIDEO_AND_TEXT)(*inputs)
    assert torch.equal(out, again)
    assert all(bool((grad != 0).any()) for grad in torch.autograd.grad(again.sum(), inputs))


def test_a_changed_default_device_does_not_leak_in() -> None:
    case = VIDEO_AND_TEXT._replace(key_mask=padding(VIDEO_AND_TEXT))
    inputs = tensors(case)
    expected, _ = vsa(case)(*inputs)
    tile_of_token.cache_clear()
    with torch.device("meta"):
        out, _ = vsa(case)(*inputs)
    assert torch.equal(out, expected)


def op_arguments(case: Case, inputs: Inputs) -> tuple[Any, ...]:
    q, k, v, *gate = inputs
    where = (list(case.grid), list(case.tile), *case.text, case.sparsity, case.ungated)
    return (q, k, v, case.key_mask, *where, None, gate[0] if gate else None, case.scale)


@pytest.mark.slow
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "key mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck_accepts_the_op(dtype: torch.dtype, masked: bool, kind: str) -> None:
    # Not bfloat16: eagerly and traced, sums of gradients over a tile are rounded at other points.
    case = of_kind(VIDEO_AND_TEXT, kind)
    case = case._replace(key_mask=padding(case) if masked else None)
    inputs = [over_blhd(each) for each in tensors(case, kind, kv_heads=1, dtype=dtype)]
    torch.library.opcheck(OPS.vsa.default, op_arguments(case, inputs))


def test_the_traced_op_is_one_selection_and_one_kernel_op() -> None:
    inputs = [each.detach() for each in tensors(VIDEO_AND_TEXT)]
    graph = torch.fx.experimental.proxy_tensor.make_fx(vsa(VIDEO_AND_TEXT))(*inputs)
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    ours = [op for op in called if "compiled_sparse" in str(op)]
    assert ours == [OPS.top_k_blocks.default, OPS.block_sparse_attention.default]


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", GATE_FIRST)
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "key mask"])
def test_a_compiled_call_gives_the_eager_values_strides_and_gradients(
    masked: bool, kind: str, backend: str
) -> None:
    case = of_kind(VIDEO_AND_TEXT, kind)
    case = case._replace(key_mask=padding(case) if masked else None)
    inputs = tensors(case, kind, kv_heads=1)
    compiled = torch.compile(vsa(case), fullgraph=True, backend=backend)
    assert_same_outcome(compiled, vsa(case), inputs)
    with torch.no_grad():
        out = compiled(*inputs)[0]
        torch.testing.assert_close(out, vsa(case)(*inputs)[0])
    assert out.stride() == vsa(case)(*inputs)[0].stride()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
def test_traced_gradients_in_low_precision_are_within_a_rounding_of_eager_ones(
    backend: str,
) -> None:
    inputs = tensors(VIDEO_AND_TEXT, dtype=torch.bfloat16)
    weights = weights_for(inputs)
    eager = vsa(VIDEO_AND_TEXT)
    compiled = torch.compile(eager, fullgraph=True, backend=backend)
    actual, expected = outcome(compiled, inputs, weights), outcome(eager, inputs, weights)
    for name, each in actual.items():
        assert relative(each, expected[name]) < 5e-3, (name, relative(each, expected[name]))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
def test_another_sparsity_in_a_tensor_compiles_nothing(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)

    def attend(*inputs: Tensor) -> Any:
        *inputs, sparsity = inputs
        return vsa(VIDEO_AND_TEXT, sparsity=sparsity)(*inputs)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    inputs = tensors(VIDEO_AND_TEXT)
    compilations = []
    for sparsity in (0.9, 0.7, 0.4, 0.0, 0.99):
        given_sparsity = torch.tensor(sparsity, dtype=torch.float64)
        actual, _ = compiled(*inputs, given_sparsity)
        expected, _ = vsa(VIDEO_AND_TEXT._replace(sparsity=sparsity))(*inputs)
        torch.testing.assert_close(actual, expected)
        compilations.append(counter.frame_count)
    assert compilations == compilations[:1] * 5


def joint(video: Tensor, text: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Video of frames of 3 x 4 tokens, and text behind it, sizes read from the tensors."""
    x = torch.cat([video, text], dim=2)
    grid = (video.shape[2] // 12, 3, 4)
    config = cs.VSA(sparsity=0.6, tile_thw=(2, 2, 3))
    text_after = cs.Text(after=text.shape[2])
    return cs.attention(x, x, x, config, grid_thw=grid, text=text_after, gate=gate, return_lse=True)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "training", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["inference", "training"]
)
def test_dynamic_grids_and_text_take_at_most_two_compilations(training: bool, backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(joint, fullgraph=True, backend=counter)
    for frames, text in ((3, 5), (6, 9), (9, 17)):
        sizes = (12 * frames, text, 12 * frames + text)
        inputs = [torch.randn(1, 2, n, 8).requires_grad_(training) for n in sizes]
        (out, lse), expected = compiled(*inputs), joint(*inputs)
        torch.testing.assert_close((out, lse), expected)
        if training:
            grads = torch.autograd.grad(out.square().sum(), inputs)
            expected_grads = torch.autograd.grad(expected[0].square().sum(), inputs)
            torch.testing.assert_close(grads, expected_grads)
    assert counter.frame_count <= 2
