"""Measuring in a model's calls: what is kept, what goes on after a break, what is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import GRID
from modules import TinyDiT
from modules import dit_inputs
from torch import nn

import compiled_sparse as cs
from compiled_sparse import calibration
from compiled_sparse.calibration import Call
from compiled_sparse.calibration import CallKey
from compiled_sparse.calibration import Measurements
from compiled_sparse.calibration import SiteErrors
from compiled_sparse.calibration.documents import with_checksum
from compiled_sparse.errors import CalibrationError

pytestmark = pytest.mark.usefixtures("fresh_compiler")

CANDIDATES = ("sta:window_thw=1x1x1,tile_thw=2x3x2", "sta:window_thw=3x1x1,tile_thw=2x3x2")


@pytest.fixture
def model() -> nn.Module:
    return TinyDiT(2).requires_grad_(False).eval()


MADE_UP = Measurements(
    candidates=(cs.VSA(sparsity=0.5),),
    calls={
        CallKey(): (
            SiteErrors(
                path="attn",
                kind="self",
                grid_thw=(2, 2, 2),
                text=(0, 0),
                head_dim=8,
                densities=(0.5,),
                tiles=((1, 1, 1),),
                squared_dense=(1.0,),
                squared_error=((0.5,),),
                absolute_error=((0.5,),),
                cosine=((-0.5,),),
                captured_mass=((0.5,),),
            ),
        )
    },
)


def calls(number: int = 3) -> list[Call]:
    keys = [CallKey(sample="clip", step=step) for step in range(number)]
    return [Call(args=dit_inputs(), key=key) for key in keys]


def test_every_call_layer_candidate_and_head_is_measured(model: nn.Module) -> None:
    seen: list[CallKey] = []
    found = calibration.measure(model, calls(), CANDIDATES, inner="eager", on_call=seen.append)
    assert seen == list(found.calls)
    assert found.steps == (0, 1, 2)
    assert [site.path for site in found.layers] == ["blocks.0.attn1", "blocks.1.attn1"]
    shape = (3, 2, 2, 2)
    for name in ("relative_squared_error", "cosine", "captured_mass", "absolute_error"):
        assert found.mean(name).shape == shape
    # A wider window keeps all the keys of a narrower one.
    mass = found.mean("captured_mass")
    assert bool((mass[:, :, 1] > mass[:, :, 0]).all())
    assert [config.describe() for config in found.candidates] == list(CANDIDATES)


def test_a_fit_promises_what_the_report_of_its_policy_says(model: nn.Module) -> None:
    found = calibration.fit(
        calibration.measure(model, calls(1), CANDIDATES, inner="eager"), max_error=0.3
    )
    assert 0 < found.usage["dense"] < 4
    report = cs.explain(model, *dit_inputs(), policy=found.policy)
    sparse = [decision for decision in report.sites if decision.is_sparse]
    assert [decision.density for decision in sparse] == pytest.approx([found.density] * 2)
    assert [d.predicted_gain for d in sparse] == pytest.approx([found.predicted_gain] * 2)


def test_a_compiled_model_and_its_cache_are_left_alone(model: nn.Module) -> None:
    compiled = torch.compile(model, backend="eager")
    inputs = dit_inputs()
    before = compiled(*inputs)
    found = calibration.measure(compiled, calls(1), CANDIDATES, inner="eager")
    assert len(found.calls) == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(*inputs), before)


def test_a_run_goes_on_where_it_was_broken_off(model: nn.Module, tmp_path: Path) -> None:
    whole = calibration.measure(model, calls(), CANDIDATES, inner="eager")

    def broken_off() -> Iterator[Call]:
        yield from calls(2)
        raise KeyboardInterrupt

    journal = tmp_path / "run.journal"
    with pytest.raises(KeyboardInterrupt):
        calibration.measure(model, broken_off(), CANDIDATES, inner="eager", journal=journal)
    made: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: made.append(1))
    again = calibration.measure(model, calls(), CANDIDATES, inner="eager", journal=journal)
    hook.remove()
    assert len(made) == 1
    assert again.candidates == whole.candidates
    assert list(again.calls) == list(whole.calls)


def test_measurements_are_files_and_back(model: nn.Module, tmp_path: Path) -> None:
    found = calibration.measure(model, calls(), CANDIDATES, inner="eager")
    path, again = tmp_path / "found.json", tmp_path / "again.json"
    calibration.save_measurements(found, path)
    assert calibration.load_measurements(path) == found
    calibration.save_measurements(calibration.load_measurements(path), again)
    assert again.read_bytes() == path.read_bytes()
    path.write_text(path.read_text().replace("0.", "1.", 1))
    with pytest.raises(CalibrationError, match="checksum"):
        calibration.load_measurements(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"candidates": []},
        {"candidates": 5},
        {"calls": []},
        {"calls": {"0/positive/0": 5}},
        {"calls": {"zero": []}},
        {"calls": {"0/positive/0": [{"path": "x"}]}},
    ],
    ids=str,
)
def test_a_file_of_another_form_with_its_checksum_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = tmp_path / "edited.json"
    calibration.save_measurements(MADE_UP, path)
    path.write_text(json.dumps(with_checksum({**json.loads(path.read_text()), **changes})))
    with pytest.raises(CalibrationError, match=r"edited\.json"):
        calibration.load_measurements(path)


def test_a_journal_of_other_candidates_is_refused(model: nn.Module, tmp_path: Path) -> None:
    journal = tmp_path / "run.journal"
    calibration.measure(model, calls(1), CANDIDATES, inner="eager", journal=journal)
    with pytest.raises(CalibrationError, match="candidates"):
        calibration.measure(model, calls(1), CANDIDATES[:1], inner="eager", journal=journal)


@pytest.mark.parametrize(
    ("candidates", "got"),
    [((), r"\(\)"), (("dense",), "dense"), (("auto",), "auto"), ((CANDIDATES[0],) * 2, "sta")],
    ids=["none", "dense", "automatic", "twice"],
)
def test_candidates_are_different_mechanisms(
    model: nn.Module, candidates: tuple[str, ...], got: str
) -> None:
    with pytest.raises(CalibrationError, match="these are no candidates") as caught:
        calibration.measure(model, calls(1), candidates, inner="eager")
    assert caught.match(got)


def test_each_call_has_its_own_key(model: nn.Module) -> None:
    twice = [*calls(1), *calls(1)]
    with pytest.raises(CalibrationError, match="two calls have the same key"):
        calibration.measure(model, twice, CANDIDATES, inner="eager")


def test_a_call_without_video_attention_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="nothing was measured in a call"):
        calibration.measure(
            nn.Linear(3, 3), [Call(args=(torch.zeros(2, 3),))], CANDIDATES, inner="eager"
        )


def test_values_that_are_not_finite_are_an_error(model: nn.Module) -> None:
    video, *rest = dit_inputs()
    poisoned = Call(args=(video * torch.nan, *rest))
    with pytest.raises(CalibrationError, match="not finite"):
        calibration.measure(model, [poisoned], CANDIDATES, inner="eager")


def test_calls_of_two_resolutions_are_not_mixed(model: nn.Module) -> None:
    found = calibration.measure(model, calls(1), CANDIDATES, inner="eager")
    (sites,) = found.calls.values()
    with pytest.raises(CalibrationError, match="the same layers"):
        Measurements(
            candidates=found.candidates,
            calls={CallKey(step=0): sites, CallKey(step=1): sites[:1]},
        )


class Pipeline:
    """What matters of a diffusers pipeline: a transformer, guidance, and a callback."""

    def __init__(self, transformer: nn.Module, steps: int) -> None:
        self.transformer = transformer
        self.num_timesteps = steps

    def __call__(self, callback: Any, *, stop_at: int | None = None) -> torch.Tensor:
        latents, *rest = dit_inputs()
        for step in range(self.num_timesteps):
            if step == stop_at:
                raise KeyboardInterrupt
            one, other = (self.transformer(latents, *rest) for _ in range(2))
            latents = latents + 0.1 * (one.mean() + other.std())
            callback(self, step, None, {})
        return latents


def test_a_pipeline_is_recorded_and_gives_what_it_gave(model: nn.Module) -> None:
    pipe = Pipeline(model, 3)
    torch.manual_seed(5)
    expected = pipe(cs.step_callback())
    torch.manual_seed(5)
    with calibration.recording(model, CANDIDATES, sample="prompt", inner="eager") as found:
        actual = pipe(cs.step_callback())
    assert torch.equal(actual, expected)
    keys = {(key.step, key.branch) for key in found.measurements.calls}
    assert keys == {(step, branch) for step in range(3) for branch in ("positive", "negative")}
    assert model._compiled_call_impl is None


def test_a_recorded_pipeline_goes_on_where_it_was_broken_off(
    model: nn.Module, tmp_path: Path
) -> None:
    pipe, journal = Pipeline(model, 3), tmp_path / "run.journal"
    torch.manual_seed(5)
    with calibration.recording(model, CANDIDATES, inner="eager") as whole:
        pipe(cs.step_callback())
    settings: dict[str, Any] = {"inner": "eager", "journal": journal}
    torch.manual_seed(5)
    with (
        pytest.raises(KeyboardInterrupt),
        calibration.recording(model, CANDIDATES, **settings),
    ):
        pipe(cs.step_callback(), stop_at=2)
    torch.manual_seed(5)
    with calibration.recording(model, CANDIDATES, **settings) as found:
        pipe(cs.step_callback())
    assert found.measurements == whole.measurements


def test_a_pipeline_with_a_compiled_transformer_is_recorded(model: nn.Module) -> None:
    compiled: Any = torch.compile(model, backend="eager")
    inputs = dit_inputs()
    expected = compiled(*inputs)
    with (
        calibration.recording(compiled, CANDIDATES, inner="eager") as found,
        cs.metadata(step=0),
    ):
        assert torch.equal(compiled(*inputs), expected)
    assert len(found.measurements.layers) == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(*inputs), expected)


def test_calls_of_several_threads_are_told_apart(model: nn.Module) -> None:
    inputs = dit_inputs()

    def run(step: int) -> None:
        with cs.metadata(step=step):
            model(*inputs)

    with calibration.recording(model, CANDIDATES, inner="eager") as found:
        threads = [threading.Thread(target=run, args=(step,)) for step in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [len(sites) for sites in found.measurements.calls.values()] == [2, 2, 2]


def test_the_step_of_a_key_outranks_what_was_said_around_it(model: nn.Module) -> None:
    table = cs.WindowTable(windows=((9, 9, 9), (1, 1, 1)), choice=(((0,),), ((1,),)))
    candidate = cs.STA(window_thw=table, tile_thw=(2, 3, 2))
    with cs.metadata(step=1):
        found = calibration.measure(model, calls(1), [candidate], inner="eager")
    assert float(found.mean("captured_mass").min()) == pytest.approx(1.0)


def test_a_pipeline_whose_step_is_not_known_is_refused(model: nn.Module) -> None:
    with (
        pytest.raises(CalibrationError, match="no step"),
        calibration.recording(model, CANDIDATES, inner="eager"),
    ):
        model(*dit_inputs())


def test_a_third_call_at_a_step_is_refused(model: nn.Module) -> None:
    inputs = dit_inputs()
    with calibration.recording(model, CANDIDATES, inner="eager"), cs.metadata(step=4):
        for _ in range(2):
            model(*inputs)
        with pytest.raises(CalibrationError, match="a third call at step 4"):
            model(*inputs)


def test_keys_are_text_and_back() -> None:
    for key in (CallKey(), CallKey(sample="a/b c", branch="negative", step=49)):
        assert CallKey.parse(str(key)) == key
    with pytest.raises(CalibrationError, match="names no call"):
        CallKey.parse("x/positive/0")
    with pytest.raises(CalibrationError, match="names no call"):
        CallKey(branch="both")


def test_a_site_of_another_form_is_refused(model: nn.Module) -> None:
    found = calibration.measure(model, calls(1), CANDIDATES, inner="eager")
    document = found.layers[0].to_dict()
    assert SiteErrors.from_dict(document) == found.layers[0]
    with pytest.raises(CalibrationError, match="fields"):
        SiteErrors.from_dict({"path": "x"})
    with pytest.raises(CalibrationError, match="cosine of another shape"):
        SiteErrors.from_dict({**document, "cosine": document["cosine"][:1]})


def test_text_and_grid_of_a_call_reach_the_pass() -> None:
    class Plain(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, q, q)

    q = torch.randn(1, 2, 65, 8)
    call = Call(args=(q,), grid_thw=GRID, text=cs.Text(after=5))
    found = calibration.measure(Plain(), [call], CANDIDATES, inner="eager")
    assert (found.layers[0].grid_thw, found.layers[0].text) == (GRID, (0, 5))
    assert found.layers[0].kind == "joint"


def test_layers_are_counted_with_those_that_are_not_measured(model: nn.Module) -> None:
    found = calibration.measure(model, calls(1), CANDIDATES, inner="eager")
    assert [(site.layer, site.num_layers) for site in found.layers] == [(0, 2), (1, 2)]
