"""VMoBA as an op: what is selected, values, gradients, and what the compiler sees."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from attending import assert_same_outcome
from attending import assert_same_sums
from attending import relative
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import compiled_sparse as cs
from compiled_sparse.errors import ConfigError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.ops import cpu
from compiled_sparse.ops.plan import block_tokens
from compiled_sparse.reference.vmoba import vmoba_token_mask

OPS = torch.ops.compiled_sparse
GRID, TEXT = (5, 7, 3), cs.Text(3, 6)
KINDS = ("temporal", "spatial", "st")
RULES = {
    "topk": ("query_head", "head_global", "overall"),
    "threshold": ("query_head", "block", "head_global", "overall"),
}
RULE_CASES = [(mode, groups) for mode in RULES for groups in RULES[mode]]
NUMBERS = {"topk": (1, 2, 3, 99), "threshold": (0.0, 0.25, 0.7, 1.0, 1.5)}


def vmoba(kind: str, mode: str = "topk", groups: str = "query_head", number: float = 3) -> cs.VMoBA:
    """A config of one kind of chunks, which do not divide the grid."""
    share = {f"{kind}_topk": number} if mode == "topk" else {"moba_threshold": number}
    fields: dict[str, Any] = {f"{each}_layer": int(each == kind) for each in KINDS} | share
    return cs.VMoBA(
        temporal_chunk_size=1.4,
        spatial_chunk_size=(3, 2),
        st_chunk_size=(2, 3, 2),
        moba_select_mode=mode,
        moba_threshold_type=groups,
        **fields,
    )


def inputs(values: str = "random", dtype: torch.dtype = torch.float32, text: bool = False) -> Any:
    """Queries, keys and values; the gates of what is not "random" are exact in any order.

    Of "ties" a query has one channel alone, and keys are quarters: a gate is one product.
    """
    torch.manual_seed(0)
    length = 105 + (TEXT.before + TEXT.after if text else 0)
    q = torch.randn(2, 4, length, 8, dtype=dtype)
    k, v = torch.randn(2, 2, 2, length, 8, dtype=dtype)
    if values == "ties":
        channel = torch.randint(8, q.shape[:-1])
        q = torch.nn.functional.one_hot(channel, 8) * (q * 2).round().to(dtype) / 4
        k = (k * 2).round() / 4
    if values == "equal":
        q, k = torch.ones_like(q), torch.ones_like(k)
    return q, k, v


def ragged(text: bool) -> Tensor:
    """A mask with holes, an empty chunk, and another length for each batch entry."""
    length = 105 + (TEXT.before + TEXT.after if text else 0)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, 40:60] = False
    mask[0, 2] = False
    mask[1, 70:] = False
    return mask


def selection(q: Tensor, k: Tensor, config: cs.VMoBA, text: bool, mask: Tensor | None) -> Tensor:
    """What the op selects: the tokens each attends to, bool [batch, heads, length, length]."""
    before, after = (TEXT.before, TEXT.after) if text else (0, 0)
    grid, tile = config.resolve_grid(GRID), config.resolve_tile(GRID)
    rule = (config.moba_select_mode, config.moba_threshold_type, config.topk)
    bits = OPS.select_chunks(
        q, k, mask, grid, tile, before, after, *rule, float(config.moba_threshold)
    )
    chunks = cs.ops.unpack_bits(bits, q.shape[2])
    chunk_of = torch.empty(q.shape[2], dtype=torch.int64)
    for chunk, tokens in enumerate(block_tokens(BlockLayout(grid, tile, before, after))):
        chunk_of[tokens[tokens >= 0].long()] = chunk
    return chunks[:, :, chunk_of].transpose(-1, -2)


def cases() -> list[Any]:
    """Every mode and type with every number, chunk and kind of gates; a seventh of it is fast."""
    everything = [
        (kind, mode, groups, number)
        for mode, groups in RULE_CASES
        for number in NUMBERS[mode]
        for kind in KINDS
    ]
    marks = [() if i % 7 == 0 else (pytest.mark.slow,) for i in range(len(everything))]
    return [pytest.param(*case, marks=mark) for case, mark in zip(everything, marks, strict=True)]


@pytest.mark.parametrize(("kind", "mode", "groups", "number"), cases())
def test_the_selection_is_the_reference_s(kind: str, mode: str, groups: str, number: float) -> None:
    config = vmoba(kind, mode, groups, number)
    for values, text, masked in itertools.product(
        ("random", "ties", "equal"), (False, True), (False, True)
    ):
        q, k, _ = inputs(values, text=text)
        mask = ragged(text) if masked else None
        keys = k.repeat_interleave(2, dim=1)
        if mask is not None:
            keys = keys.masked_fill(~mask[:, None, :, None], 0.0)
            k = k.masked_fill(~mask[:, None, :, None], float("nan"))
        expected = vmoba_token_mask(q, keys, config, GRID, TEXT if text else cs.Text(), mask)
        actual = selection(q, k, config, text, mask)
        if mask is not None:  # of masked keys only those of the same chunk are comparable
            expected, actual = (each & mask[:, None, None] for each in (expected, actual))
        assert torch.equal(actual, expected), (values, text, masked)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", RULES)
def test_without_a_compiler_the_selection_is_the_reference_s(
    kind: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cpu.KERNEL_VARIABLE, "portable")
    number = 3 if mode == "topk" else 0.3
    test_the_selection_is_the_reference_s(kind, mode, "query_head", number)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("mode", "groups"), RULE_CASES)
def test_values_and_gradients_are_the_reference_s(kind: str, mode: str, groups: str) -> None:
    config = vmoba(kind, mode, groups, 3 if mode == "topk" else 0.3)
    settings = {"grid_thw": GRID, "text": TEXT, "key_mask": ragged(True), "return_lse": True}
    leaves = [each.requires_grad_() for each in inputs("ties", torch.float64, text=True)]
    assert_same_outcome(
        lambda *qkv: cs.attention(*qkv, config, **settings),
        lambda *qkv: cs.reference.attention(*qkv, config, **settings),
        leaves,
    )


@pytest.mark.parametrize(("mode", "groups"), RULE_CASES)
def test_one_chunk_is_dense_attention(mode: str, groups: str) -> None:
    config = cs.VMoBA(
        temporal_chunk_size=9,
        moba_select_mode=mode,
        moba_threshold_type=groups,
        spatial_layer=0,
        st_layer=0,
    )
    q, k, v = inputs()
    out = cs.attention(q, k, v, config, grid_thw=GRID)
    assert_same_sums(out, cs.attention(q, k, v, cs.Dense()))


def test_topk_one_is_dense_as_published() -> None:
    q, k, v = inputs()
    dense = cs.attention(q, k, v, cs.Dense())
    for groups in RULES["topk"]:
        config = vmoba("st", "topk", groups, 1)
        assert_same_sums(cs.attention(q, k, v, config, grid_thw=GRID), dense)


@pytest.mark.parametrize(("mode", "groups"), RULE_CASES)
def test_sequences_of_a_batch_never_see_each_other(mode: str, groups: str) -> None:
    """Ragged entries compete under some types, but no value of one is in the output of another."""
    config = vmoba("st", mode, groups, 3 if mode == "topk" else 0.3)
    q, k, v = inputs()
    mask = ragged(False)
    changed = v.clone()
    changed[1] = float("nan")
    one, other = (
        cs.attention(q, k, each, config, grid_thw=GRID, key_mask=mask) for each in (v, changed)
    )
    assert torch.equal(one[0], other[0])
    alone = cs.attention(q[:1], k[:1], v[:1], config, grid_thw=GRID, key_mask=mask[:1])
    competes = groups in ("head_global", "overall")
    assert torch.allclose(one[:1], alone, atol=1e-6) != competes


def test_a_shorter_sequence_is_what_it_would_be_alone() -> None:
    """Padding behind the frames of a sequence changes nothing of it, chunk for chunk."""
    q, k, v = inputs()
    frames = 3 * GRID[1] * GRID[2]
    mask = torch.ones(2, 105, dtype=torch.bool)
    mask[1, frames:] = False
    for kind in KINDS:
        config = vmoba(kind, "threshold")
        padded = cs.attention(q, k, v, config, grid_thw=GRID, key_mask=mask)
        short = [each[1:, :, :frames] for each in (q, k, v)]
        alone = cs.attention(*short, config, grid_thw=(3, *GRID[1:]))
        assert_same_sums(padded[1:, :, :frames], alone)


def selected_at_random(layout: BlockLayout, batch: int, heads: int) -> Tensor:
    torch.manual_seed(2)
    return cs.ops.pack_bits(torch.rand(batch, heads, layout.num_blocks, layout.num_tokens) < 0.3)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_for_a_fixed_selection_pass_gradcheck(masked: bool) -> None:
    layout = BlockLayout((2, 3, 2), (1, 2, 2), 1, 2)
    leaves = [torch.randn(1, 2, 15, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = torch.rand(1, 15) < 0.7 if masked else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = cs.ops.chunk_sparse_attention(
            *(q, k, v, selected),
            grid=layout.grid,
            tile=layout.tile,
            key_mask=mask,
            text_before=1,
            text_after=2,
        )
        return out, lse.masked_fill(lse.isinf(), 0.0)

    selected = selected_at_random(layout, 1, 2)
    assert torch.autograd.gradcheck(attend, leaves, atol=1e-7)


def test_opcheck_of_both_kernel_ops() -> None:
    layout = BlockLayout((5, 7, 3), (2, 3, 2), 3, 6)
    q, k, v = (each.requires_grad_() for each in inputs(text=True))
    geometry = ([5, 7, 3], [2, 3, 2], 3, 6)
    selected = selected_at_random(layout, 2, 4)
    arguments = (q, k, v, selected, ragged(True), *geometry, None)
    torch.library.opcheck(OPS.chunk_sparse_attention.default, arguments)
    out, lse = OPS.chunk_sparse_attention(*arguments)
    saved = (q, k, v, out.detach(), lse.detach(), selected, ragged(True))
    saved = tuple(each.detach() for each in saved)
    backward = (torch.randn_like(out), torch.randn_like(lse), *saved, *geometry, None)
    torch.library.opcheck(OPS.chunk_sparse_attention_backward.default, backward)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "groups"), RULE_CASES)
def test_opcheck_of_the_selection(mode: str, groups: str) -> None:
    q, k, _ = inputs(text=True)
    rule = (mode, groups, 3, 0.3)
    arguments = (q, k, ragged(True), [5, 7, 3], [2, 3, 2], 3, 6, *rule)
    torch.library.opcheck(OPS.select_chunks.default, arguments)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("mode", "groups"), RULE_CASES[::3])
def test_compiled_it_is_one_graph_with_the_same_outcome(mode: str, groups: str) -> None:
    config = vmoba("st", mode, groups, 3 if mode == "topk" else 0.3)
    backend = CompileCounterWithBackend("aot_eager")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return cs.attention(q, k, v, config, grid_thw=GRID, text=TEXT, return_lse=True)

    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    for _ in range(2):
        leaves = [each.requires_grad_() for each in inputs("ties", text=True)]
        assert_same_outcome(compiled, attend, leaves)
    assert backend.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", KINDS)
def test_lengths_of_text_and_batch_compile_nothing_anew(kind: str) -> None:
    config = vmoba(kind, "threshold")
    backend = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=backend, dynamic=True, fullgraph=True)
    def attend(q: Tensor, k: Tensor, v: Tensor, after: int) -> Any:
        return cs.attention(q, k, v, config, grid_thw=GRID, text=cs.Text(2, after))

    counts = []
    for batch, after in ((2, 5), (3, 9), (5, 40), (2, 33)):
        q, k, v = (torch.randn(batch, 4, 107 + after, 8) for _ in range(3))
        expected = cs.reference.attention(q, k, v, config, grid_thw=GRID, text=cs.Text(2, after))
        assert_same_sums(attend(q, k, v, after), expected)
        counts.append(backend.frame_count)
    assert counts == [counts[0]] * 4


def test_more_chunks_than_there_are_are_all_of_them() -> None:
    q, k, v = inputs()
    for groups in RULES["topk"]:
        config = vmoba("st", "topk", groups, 2**31 - 1)
        out = cs.attention(q, k, v, config, grid_thw=GRID)
        assert_same_sums(out, cs.attention(q, k, v, cs.Dense()))


def test_a_chunk_far_larger_than_the_grid_is_the_grid() -> None:
    q, k, v = inputs()
    config = cs.VMoBA(st_chunk_size=(10**9,) * 3, temporal_layer=0, spatial_layer=0)
    out = cs.attention(q, k, v, config, grid_thw=GRID)
    assert_same_sums(out, cs.attention(q, k, v, cs.Dense()))


@pytest.mark.parametrize(("mode", "groups"), RULE_CASES)
def test_nothing_in_gives_nothing_out_and_no_visible_token_nothing_seen(
    mode: str, groups: str
) -> None:
    q, k, v = inputs()
    config = vmoba("st", mode, groups, 3 if mode == "topk" else 0.3)
    mask = torch.zeros(2, 105, dtype=torch.bool)
    for attention in (cs.attention, cs.reference.attention):
        assert not attention(q, k, v, config, grid_thw=GRID, key_mask=mask).any()
    assert cs.attention(q[:0], k[:0], v[:0], config, grid_thw=GRID).shape == (0, 4, 105, 8)


def test_a_layer_that_nobody_gave_is_an_error_and_a_step_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    q, k, v = inputs()
    with pytest.raises(ConfigError, match="differs by layer or step"):
        cs.attention(q, k, v, cs.VMoBA(), grid_thw=GRID)
    config = vmoba("st")
    late = dataclasses.replace(config, first_full_step=7)
    dense = cs.attention(q, k, v, late, grid_thw=GRID)
    assert torch.equal(dense, cs.attention(q, k, v, cs.Dense()))
    assert "keeps 7 denoising steps dense, but the step is not known" in caplog.text


@pytest.mark.usefixtures("fresh_compiler")
def test_traced_code_does_not_take_an_unknown_step_for_the_first() -> None:
    q, k, v = inputs()
    config = dataclasses.replace(vmoba("st"), first_full_step=7)

    def attend(q: Tensor, step: int | None = None) -> Tensor:
        out: Tensor = cs.attention(q, k, v, config, grid_thw=GRID, step=step)
        return out

    compiled = torch.compile(attend, backend="eager")
    with cs.metadata(step=7):  # which no graph can read
        assert_same_sums(compiled(q, 7), attend(q))
        with pytest.raises(ConfigError, match="in traced code the step's"):
            compiled(q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_error_is_that_of_dense_attention(dtype: torch.dtype) -> None:
    q, k, v = (each.to(dtype) for each in inputs("ties"))
    config = vmoba("spatial", "threshold")
    exact = cs.reference.attention(*(each.double() for each in (q, k, v)), config, grid_thw=GRID)
    out = cs.attention(q, k, v, config, grid_thw=GRID)
    assert out.dtype == dtype
    plain = cs.attention(q, k, v, cs.Dense())
    of_dense = relative(plain, cs.attention(*(each.double() for each in (q, k, v)), cs.Dense()))
    assert relative(out, exact) <= 2 * of_dense


def test_autocast_casts_as_it_does_for_dense_attention() -> None:
    q, k, v = inputs("ties")
    config = vmoba("temporal")
    with torch.autocast("cpu", torch.bfloat16):
        out = cs.attention(q, k, v, config, grid_thw=GRID)
    halves = (each.to(torch.bfloat16) for each in (q, k, v))
    assert torch.equal(out, cs.attention(*halves, config, grid_thw=GRID))


def test_a_config_of_several_kinds_does_what_its_layer_and_step_say() -> None:
    q, k, v = inputs()
    config = cs.VMoBA(
        spatial_chunk_size=(3, 2), st_chunk_size=(2, 3, 2), first_full_layer=1, first_full_step=2
    )
    dense = cs.attention(q, k, v, cs.Dense())

    def attend(**where: Any) -> Tensor:
        out: Tensor = cs.attention(q, k, v, config, grid_thw=GRID, **where)
        return out

    assert torch.equal(attend(layer=3), dense), "an unknown step is the first"
    assert torch.equal(attend(step=5, layer=0), dense)
    assert torch.equal(attend(step=1, layer=1), dense)
    with cs.metadata(step=2):
        outputs = [attend(layer=layer) for layer in range(1, 5)]
    for layer, out in enumerate(outputs, 1):
        one = config.for_layer(layer)
        assert isinstance(one, cs.VMoBA)
        assert one.kind == KINDS[(layer - 1) % 3]
        expected = cs.reference.attention(q, k, v, config, grid_thw=GRID, step=2, layer=layer)
        assert_same_sums(out, expected)
    assert torch.equal(outputs[0], outputs[3])
    assert not torch.allclose(outputs[0], outputs[1])
