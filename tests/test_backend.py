"""The backend as users call it: values, gradients, modes of use, options."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import GRID
from modules import POLICY
from modules import Tiny
from modules import TinyDiT
from modules import assert_close
from modules import assert_gradients_close
from modules import compile_sparse
from modules import dit_inputs
from modules import expected_output
from modules import parameter_gradients
from modules import raster
from modules import video
from test_regional import Counting
from torch import Tensor
from torch import fx
from torch import nn

import compiled_sparse as cs
from compiled_sparse.backend import compiled_sparse_backend
from compiled_sparse.errors import CompiledSparseError
from compiled_sparse.errors import StrictRewriteError
from compiled_sparse.passes.fx import nested_graphs

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def root_cause(error: BaseException) -> BaseException:
    """Return the package's own error inside one Dynamo wrapped around it."""
    current: BaseException | None = error
    while current is not None and not isinstance(current, CompiledSparseError):
        current = current.__cause__ or getattr(current, "inner_exception", None)
    return current or error


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_values_and_all_gradients_are_those_of_the_reference(inner: str, dynamic: bool) -> None:
    model, inputs = TinyDiT(), dit_inputs((5, 7, 6), batch=2)
    expected = expected_output(model, *inputs, grid_thw=(5, 7, 6))
    actual = compile_sparse(model, inner=inner, dynamic=dynamic)(*inputs)
    assert_close(actual, expected)
    assert_gradients_close(parameter_gradients(model, actual), parameter_gradients(model, expected))


def test_one_frame_is_computed_right() -> None:
    model, inputs = TinyDiT(), dit_inputs((1, 7, 6))
    actual = compile_sparse(model)(*inputs)
    assert_close(actual, expected_output(model, *inputs, grid_thw=(1, 7, 6)))


def test_a_window_over_the_whole_grid_is_dense_attention() -> None:
    model, inputs = TinyDiT(), dit_inputs()
    policy = cs.STA(window_thw=(9, 9, 9), tile_thw=(2, 3, 2))
    assert_close(compile_sparse(model, policy=policy)(*inputs), model(*inputs))


def test_a_bfloat16_model_is_as_exact_as_the_reference_in_bfloat16() -> None:
    model, inputs = TinyDiT(), dit_inputs(batch=2)
    exact = expected_output(model.double(), *(x.double() for x in inputs))
    model, half = model.bfloat16(), tuple(x.bfloat16() for x in inputs)
    plain = expected_output(model, *half)
    actual = compile_sparse(model)(*half)
    assert actual.dtype == torch.bfloat16
    assert (actual - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_without_gradients_the_values_are_the_same() -> None:
    model, inputs = TinyDiT(), dit_inputs()
    compiled = compile_sparse(model, inner="aot_eager")
    with_gradients = compiled(*inputs)
    with torch.no_grad():
        without = compiled(*inputs)
    assert with_gradients.requires_grad
    assert not without.requires_grad
    assert torch.equal(with_gradients, without)


def test_module_compile_and_compiled_functions_work() -> None:
    model, inputs = TinyDiT(), dit_inputs()
    expected = expected_output(model, *inputs)
    function = compile_sparse(lambda *args: model(*args) * 2)
    assert_close(function(*inputs), expected * 2)
    options = {"policy": POLICY, "inner": "eager"}
    model.compile(backend="compiled_sparse", options=options)
    assert_close(model(*inputs), expected)


def test_the_backend_is_listed_by_name() -> None:
    assert "compiled_sparse" in torch._dynamo.list_backends(exclude_tags=())


def test_without_options_the_mechanism_is_chosen_automatically(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, inputs = TinyDiT(), dit_inputs()
    with caplog.at_level(logging.INFO, "compiled_sparse"):
        actual = torch.compile(model, backend="compiled_sparse", options={"inner": "eager"})(
            *inputs
        )
    assert_close(actual, model(*inputs))
    (line,) = [r.message for r in caplog.records if r.name == "compiled_sparse"]
    assert line == "0 of 4 attention calls sparse, 2 too_short, 2 cross_attention"


def test_the_models_parameters_buffers_and_code_stay_as_they_were() -> None:
    model, inputs = TinyDiT(), dit_inputs()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forward = type(model).forward
    dense = model(*inputs)
    compile_sparse(model)(*inputs)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert type(model).forward is forward
    assert torch.equal(model(*inputs), dense)


def test_dynamos_own_graph_is_left_untouched() -> None:
    seen: list[tuple[Any, Any]] = []

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
        before = _state(graph)
        options = {"policy": POLICY, "inner": "aot_eager"}
        compiled = compiled_sparse_backend(graph, inputs, options=options)
        seen.append((before, _state(graph)))
        return compiled

    torch.compile(TinyDiT(checkpoint=True), backend=backend, dynamic=False)(*dit_inputs())
    ((before, after),) = seen
    assert after == before


def _state(graph: fx.GraphModule) -> list[Any]:
    graphs = [graph, *(inner for _, inner in nested_graphs(graph))]
    return [[(n.format_node(), sorted(n.meta)) for n in g.graph.nodes] for g in graphs]


def test_nothing_is_remembered_over_a_reset() -> None:
    model, inputs = TinyDiT(), dit_inputs()
    expected = expected_output(model, *inputs)
    compiled = compile_sparse(model)
    assert_close(compiled(*inputs), expected)
    torch.compiler.reset()
    assert_close(compiled(*inputs), expected)


def test_graph_breaks_leave_calls_behind_them_dense_and_right() -> None:
    def body(m: Tiny, x: Tensor) -> Tensor:
        x = raster(x)
        x = x + m.attn(x)
        torch._dynamo.graph_break()
        return x + m.attn(x)

    model, x = Tiny(body), video()
    compiled = torch.compile(
        model, backend="compiled_sparse", options={"policy": POLICY, "inner": "eager"}
    )
    assert_close(compiled(x), model(x))
    with cs.metadata(grid_thw=GRID):
        assert_close(compiled(x), expected_output(model, x))


# Autocast.


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast_gives_the_dtype_and_values_dense_attention_has(inner: str, inside: bool) -> None:
    def body(m: Tiny, x: Tensor) -> Tensor:
        q = raster(x).unflatten(2, (2, 8)).transpose(1, 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            out = F.scaled_dot_product_attention(q, q * 2, q * 3)
        dtypes.append(out.dtype)
        return out * 1.0 + q.float()

    dtypes: list[torch.dtype] = []
    model, x = Tiny(body), video()
    policy = cs.STA(window_thw=(9, 9, 9), tile_thw=(2, 3, 2))
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        dense = model(x)
        actual = compile_sparse(model, policy=policy, inner=inner)(x)
    assert actual.dtype == dense.dtype
    assert set(dtypes) == {torch.bfloat16}
    assert_close(actual, dense, torch.finfo(torch.bfloat16).eps)
    assert_gradients_close(
        parameter_gradients(model.patch, actual.float()),
        parameter_gradients(model.patch, dense.float()),
        2 * torch.finfo(torch.bfloat16).eps,
    )


def test_a_model_under_autocast_is_as_exact_as_the_reference_under_autocast() -> None:
    model, inputs = TinyDiT(), dit_inputs()
    exact = expected_output(model, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        plain = expected_output(model, *inputs)
        actual = compile_sparse(model)(*inputs)
    assert actual.dtype == plain.dtype
    assert (actual - exact).abs().max() <= 2 * (plain - exact).abs().max()


# Activation checkpointing.


@pytest.mark.parametrize("inner", ["aot_eager"])
def test_calls_inside_activation_checkpointing_are_rewritten_and_right(
    inner: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = TinyDiT(checkpoint=True), dit_inputs(batch=2)
    plain = TinyDiT()
    plain.load_state_dict(model.state_dict())
    expected = expected_output(plain, *inputs)
    with caplog.at_level(logging.INFO, "compiled_sparse"):
        actual = compile_sparse(model, inner=inner, dynamic=False)(*inputs)
    assert "2 of 4 attention calls sparse" in caplog.text
    assert_close(actual, expected)
    assert_gradients_close(parameter_gradients(model, actual), parameter_gradients(plain, expected))


@pytest.mark.slow
def test_dynamic_shapes_inside_activation_checkpointing_are_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, inputs = TinyDiT(checkpoint=True), dit_inputs()
    with caplog.at_level(logging.WARNING, "compiled_sparse"):
        actual = compile_sparse(model, inner="aot_eager", dynamic=True)(*inputs)
    assert "layout_dynamic" in caplog.text
    assert_close(actual, TinyDiT.forward(model, *inputs))


# Options.


@pytest.mark.parametrize("options", [{"mode": "reduce-overhead"}, {"max_autotune": False}])
def test_modes_and_inductor_options_are_accepted(options: dict[str, Any]) -> None:
    model, inputs = TinyDiT(), dit_inputs()
    assert_close(compile_sparse(model, **options)(*inputs), expected_output(model, *inputs))


def test_the_mode_argument_reaches_the_backend() -> None:
    model = Tiny(lambda m, x: m.attn(raster(x)))
    compiled = torch.compile(model, backend="compiled_sparse", mode="no-such-mode")
    with pytest.raises(Exception, match="no-such-mode") as caught:
        compiled(video())
    assert "reduce-overhead" in str(root_cause(caught.value))


@pytest.mark.parametrize(
    ("option", "known"),
    [
        ({"polixy": "sta"}, "did you mean policy"),
        ({"inner": "tvm"}, "one of inductor, aot_eager, eager"),
        ({"policy": "stb"}, "one of auto, dense, sage_sla, sla, sta"),
        ({"mode": "fast"}, "reduce-overhead"),
    ],
)
def test_an_option_nobody_knows_is_an_error_that_lists_the_known(
    option: dict[str, Any], known: str
) -> None:
    model = Tiny(lambda m, x: m.attn(raster(x)))
    with pytest.raises(Exception, match="got:") as caught:
        compile_sparse(model, **option)(video())
    error = root_cause(caught.value)
    assert isinstance(error, CompiledSparseError)
    assert known in str(error)


def test_a_graph_without_attention_is_handed_on() -> None:
    linear = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(compile_sparse(linear)(x), linear(x))


def test_short_sequences_of_many_sizes_share_one_graph_until_one_is_long(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, counts = TinyDiT(1).requires_grad_(False), []
    backend = Counting(policy=cs.Auto(min_tokens=100))
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    with caplog.at_level(logging.INFO, "compiled_sparse"):
        for grid in ((3, 4, 5), (2, 4, 6), (3, 5, 6), (2, 6, 4), (5, 6, 7)):
            inputs = dit_inputs(grid)
            assert_close(compiled(*inputs), model(*inputs))
            counts.append(backend.calls)
    assert counts == [1, 1, 1, 1, 2]
    said = [r.getMessage() for r in caplog.records if "attention calls sparse" in r.getMessage()]
    assert ["too_short" in each for each in said] == [True, False]


# Policies that match nothing.


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    ours = (record for record in caplog.records if record.name == "compiled_sparse")
    return [record for record in ours if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "blocks"])
def test_globs_that_match_no_video_call_are_warned_about_once(
    whole: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = TinyDiT().requires_grad_(False), dit_inputs()
    policy = {"layers.*": POLICY, "blocks.*.attn2": POLICY}
    expected = model(*inputs)
    if whole:
        model.compile(backend="compiled_sparse", options={"policy": policy, "inner": "eager"})
    else:
        for block in model.blocks:
            block.compile(backend="compiled_sparse", options={"policy": policy, "inner": "eager"})
    with cs.metadata(grid_thw=GRID):
        assert_close(model(*inputs), expected)
        with cs.force("dense"):
            assert_close(model(*inputs), expected)
    (record,) = warnings_of(caplog)
    assert "no rule of the policy ('layers.*', 'blocks.*.attn2') matches" in record.getMessage()
    paths = "('blocks.0.attn1', 'blocks.1.attn1')" if whole else "('attn1')"
    assert paths in record.getMessage()
    assert "cs.attach" in record.getMessage()


def test_globs_that_match_no_video_call_are_an_error_when_strict() -> None:
    model, inputs = TinyDiT(), dit_inputs()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        compile_sparse(model, policy={"layers.*": POLICY}, strict=True)(*inputs)
    error = caught.value.inner_exception
    assert isinstance(error, StrictRewriteError)
    assert error.got == "rules 'layers.*'; calls of 'blocks.0.attn1', 'blocks.1.attn1'"


@pytest.mark.parametrize("policy", [{"blocks.0.*": POLICY}, {"layers.*": "dense"}])
def test_a_policy_that_matches_some_calls_or_wants_none_is_not_warned_about(
    policy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    compile_sparse(TinyDiT(), policy=policy, strict=True)(*dit_inputs())
    assert not warnings_of(caplog)


def test_attached_modules_without_a_rule_are_not_warned_about(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, inputs = TinyDiT(), dit_inputs()
    cs.attach(model, {"blocks.1.*": POLICY})
    report = cs.explain(model, *inputs)
    assert [site.reason for site in report.sites if site.kind == "self"] == ["no_rule", ""]
    for block in model.blocks:
        block.compile(backend="compiled_sparse", options={"inner": "eager", "strict": True})
    with cs.metadata(grid_thw=GRID):
        model(*inputs)
    assert not warnings_of(caplog)
