"""Who decides at run time: `cs.force`, the environment, the schedule; nothing compiles again."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from modules import GRID
from modules import POLICY
from modules import Attention
from modules import TinyDiT
from modules import assert_close
from modules import compile_sparse
from modules import dit_inputs
from modules import expected_output
from modules import parameter_gradients
from modules import tokens
from torch import Tensor
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import compiled_sparse as cs
from compiled_sparse.backend import compiled_sparse_backend
from compiled_sparse.environment import VARIABLE
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import UnknownMechanismError

pytestmark = pytest.mark.usefixtures("fresh_compiler")

OTHER = cs.STA(window_thw=(1, 3, 1), tile_thw=(3, 2, 2))
STEPS = 50


@pytest.fixture
def model() -> nn.Module:
    return TinyDiT(2).requires_grad_(False)


def policy(**schedule: int) -> cs.Policy:
    return cs.Policy({"*": POLICY}, **schedule)


# cs.force


def test_force_holds_for_a_model_that_was_compiled_before(model: nn.Module) -> None:
    inputs = dit_inputs()
    compiled = compile_sparse(model)
    sparse = expected_output(model, *inputs)
    assert_close(compiled(*inputs), sparse)
    with torch._dynamo.config.patch(error_on_recompile=True):
        with cs.force("dense"):
            assert_close(compiled(*inputs), model(*inputs))
            with cs.force(OTHER):
                assert_close(compiled(*inputs), expected_output(model, *inputs, config=OTHER))
            assert_close(compiled(*inputs), model(*inputs))
        assert_close(compiled(*inputs), sparse)


def test_a_model_first_called_under_force_is_not_bound_to_it(model: nn.Module) -> None:
    inputs = dit_inputs()
    compiled = compile_sparse(model)
    with cs.force("dense"):
        assert_close(compiled(*inputs), model(*inputs))
    assert_close(compiled(*inputs), expected_output(model, *inputs))


def test_force_ends_with_an_exception_and_none_lifts_it() -> None:
    with pytest.raises(KeyError), cs.force("dense"):
        raise KeyError
    assert cs.forced() is None
    with cs.force("sta"), cs.force(None):
        assert cs.forced() is None
    with cs.force("sta"):
        assert cs.forced() == cs.Policy({"*": cs.STA()})


def test_force_takes_no_nonsense_and_then_forces_nothing() -> None:
    with pytest.raises(ConfigError), cs.force(3):
        pass
    assert cs.forced() is None


def test_threads_force_for_themselves() -> None:
    attn, x = Attention().requires_grad_(False), tokens()
    compiled = compile_sparse(attn)
    results: dict[Any, list[Tensor]] = {}
    errors: list[BaseException] = []
    barrier = threading.Barrier(2)

    def work(config: Any) -> None:
        try:
            with torch.no_grad(), cs.metadata(grid_thw=GRID), cs.force(config):
                barrier.wait(60)
                results[config] = [compiled(x) for _ in range(20)]
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(config,)) for config in (OTHER, "dense")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert_close(results[OTHER][0], expected_output(attn, x, config=OTHER))
    assert_close(results["dense"][0], attn(x))
    for outputs in results.values():
        assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_gradients_are_those_of_what_was_forced() -> None:
    model, inputs = TinyDiT(1), dit_inputs()
    compiled = compile_sparse(model, inner="aot_eager")
    compiled(*inputs)
    with cs.force("dense"):
        output = compiled(*inputs)
    actual = parameter_gradients(model, output)  # outside the block, as a training loop may
    expected = parameter_gradients(model, model(*inputs))
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, 1e-4)


# The environment


def test_the_environment_is_read_at_every_call(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = dit_inputs()
    compiled = compile_sparse(model)
    sparse = expected_output(model, *inputs)
    assert_close(compiled(*inputs), sparse)
    monkeypatch.setenv(VARIABLE, "TORCH_SDPA")
    assert_close(compiled(*inputs), model(*inputs))
    monkeypatch.setenv(VARIABLE, OTHER.describe())
    assert_close(compiled(*inputs), expected_output(model, *inputs, config=OTHER))
    with cs.force("dense"):
        assert_close(compiled(*inputs), model(*inputs))
    monkeypatch.setenv(VARIABLE, "")
    assert_close(compiled(*inputs), sparse)


def test_an_unknown_value_is_an_error_of_the_call(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = dit_inputs()
    compiled = compile_sparse(model)
    compiled(*inputs)
    monkeypatch.setenv(VARIABLE, "sliding")
    with pytest.raises(UnknownMechanismError, match="auto, dense, sage_sla, sla, sta"):
        compiled(*inputs)


# The schedule


def _counted(model: nn.Module, given: cs.Policy) -> tuple[Any, CompileCounterWithBackend]:
    def backend(graph: Any, inputs: Any) -> Any:
        return compiled_sparse_backend(graph, inputs, options={"policy": given, "inner": "eager"})

    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True), counter


@pytest.mark.parametrize("dynamic_step", [False, True], ids=["one step tensor", "new ones"])
def test_fifty_steps_compile_as_often_as_the_dense_model_and_each_is_right(
    model: nn.Module, dynamic_step: bool
) -> None:
    compiled, counter = _counted(model, policy(dense_first_steps=12, dense_last_steps=2))
    inputs = dit_inputs()
    for step in range(STEPS):
        if dynamic_step:
            inputs = (*inputs[:2], torch.full((1,), 1000.0 - step))
        with cs.metadata(step=step, num_steps=STEPS):
            actual = compiled(*inputs)
        is_dense = step < 12 or step >= STEPS - 2
        assert_close(actual, model(*inputs) if is_dense else expected_output(model, *inputs))
    assert counter.frame_count == 1


def test_an_unknown_step_counts_as_the_first_and_is_warned_of_once(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = dit_inputs()
    compiled = compile_sparse(model, policy=policy(dense_first_steps=1, dense_last_steps=1))
    for _ in range(3):
        assert_close(compiled(*inputs), model(*inputs))
    assert caplog.text.count("the step is not known") == 1
    assert "cs.step_callback()" in caplog.text


def test_a_graph_without_sparse_calls_does_not_ask_for_the_step(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    rules = {"blocks.9.*": POLICY, "*": "dense"}
    compile_sparse(model, policy=cs.Policy(rules, dense_first_steps=1))(*dit_inputs())
    assert "not known" not in caplog.text


def test_without_the_number_of_steps_none_is_the_last(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = dit_inputs()
    compiled = compile_sparse(model, policy=policy(dense_last_steps=1))
    with cs.metadata(step=9):
        assert_close(compiled(*inputs), expected_output(model, *inputs))
    assert "the number of steps is not known" in caplog.text
    with cs.metadata(step=9, num_steps=10):
        assert_close(compiled(*inputs), model(*inputs))


def test_a_schedule_whose_step_is_known_warns_of_nothing(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    with cs.metadata(step=0):
        compile_sparse(model, policy=policy(dense_first_steps=1))(*dit_inputs())
    assert "not known" not in caplog.text
    assert "stay dense although" not in caplog.text


def test_the_schedule_of_what_is_forced_holds_and_no_other(model: nn.Module) -> None:
    inputs = dit_inputs()
    compiled = compile_sparse(model, policy=policy(dense_first_steps=5))
    with cs.metadata(step=3):
        with cs.force(OTHER):
            assert_close(compiled(*inputs), expected_output(model, *inputs, config=OTHER))
        with cs.force(policy(dense_first_steps=2)):
            assert_close(compiled(*inputs), expected_output(model, *inputs))
        assert_close(compiled(*inputs), model(*inputs))


# Layers


def outcomes(model: nn.Module, *inputs: Any, given: Any) -> list[str]:
    report = cs.explain(model, *inputs, policy=given)
    return [site.reason or site.decision for site in report.sites if site.kind != "cross"]


def test_layers_at_both_ends_stay_dense_and_cross_attention_is_no_layer() -> None:
    found = outcomes(
        TinyDiT(5), *dit_inputs(), given=policy(dense_first_layers=2, dense_last_layers=1)
    )
    assert found == ["layer_dense", "layer_dense", "sparse", "sparse", "layer_dense"]


def test_checkpointed_layers_are_counted_as_the_others() -> None:
    model = TinyDiT(3, checkpoint=True)
    found = outcomes(model, *dit_inputs(), given=policy(dense_first_layers=1))
    assert found == ["layer_dense", "sparse", "sparse"]


def test_a_part_of_a_model_cannot_tell_its_layers() -> None:
    given = policy(dense_first_layers=1)
    with cs.metadata(grid_thw=GRID):
        assert outcomes(Attention(), tokens(), given=given) == ["layer_unknown"]
        assert outcomes(Attention(), tokens(), given=policy()) == ["sparse"]


class Broken(TinyDiT):
    """A model whose graph ends after its first block."""

    def forward(self, video: Tensor, text: Tensor, step: Tensor) -> Tensor:
        """Run one block in each graph."""
        x = self.patch(video).flatten(2).transpose(1, 2)
        angles = torch.arange(x.shape[1])[:, None] * torch.linspace(0.1, 1, 8)
        x = self.blocks[0](x, text, torch.zeros(1, 16), angles)
        torch._dynamo.graph_break()
        return self.blocks[1](x, text, torch.zeros(1, 16), angles)


def test_after_a_graph_break_the_last_layer_is_not_known_and_the_first_is() -> None:
    model, inputs = Broken(2), dit_inputs()
    with cs.metadata(grid_thw=GRID):
        last = outcomes(model, *inputs, given=policy(dense_last_layers=1))
        first = outcomes(model, *inputs, given=policy(dense_first_layers=1))
    assert last == ["layer_unknown", "layer_unknown"]
    assert first == ["layer_dense", "layer_unknown"]


# explain


def test_explain_shows_schedule_and_origin_and_honours_what_overrides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs = TinyDiT(2), dit_inputs()
    scheduled = policy(dense_first_steps=12, dense_first_layers=1)
    report = cs.explain(model, *inputs, policy=scheduled)
    video = [site for site in report.sites if site.kind == "self"]
    assert [site.reason or site.decision for site in video] == ["layer_dense", "sparse"]
    assert {site.schedule for site in video} == {"dense at steps 0-11, layer 0"}
    assert {site.config_origin for site in video} == {"options"}
    assert "schedule of 2 calls: dense at steps 0-11, layer 0" in str(report)
    with cs.metadata(step=3):
        assert outcomes(model, *inputs, given=scheduled) == ["layer_dense", "step_dense"]
    monkeypatch.setenv(VARIABLE, "sta")
    (site, *_) = cs.explain(model, *inputs, policy=scheduled).sites
    assert (site.config_origin, site.decision, site.schedule) == ("environment", "sparse", "")
    with cs.force("dense"):
        report = cs.explain(model, *inputs, policy=scheduled)
    assert (report.sites[0].config_origin, report.sites[0].reason) == ("force", "policy_dense")
    assert "policy of 2 calls: from cs.force" in str(report)
