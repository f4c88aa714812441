"""Attaching: which modules, what it leaves alone, and how it is undone."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import types
from typing import Any

import pytest
import torch
from modules import POLICY
from modules import Attention
from modules import TinyDiT
from modules import assert_close
from modules import dit_inputs
from torch import nn

import compiled_sparse as cs
from compiled_sparse.attach_forward import LAYER
from compiled_sparse.attach_forward import is_bound
from compiled_sparse.errors import AttachError

PATHS = ("blocks.0.attn1", "blocks.1.attn1", "blocks.2.attn1")


def model_of(blocks: int = 3) -> TinyDiT:
    return TinyDiT(blocks)


def attentions(model: nn.Module) -> list[Any]:
    return [model.get_submodule(path) for path in PATHS]


def layers(model: nn.Module) -> list[int]:
    return [int(getattr(module, LAYER)) for module in attentions(model)]


# Which modules.


def test_self_attention_in_the_list_of_blocks_is_numbered_in_order() -> None:
    model = model_of()
    handle = cs.attach(model, POLICY)
    assert handle.modules == PATHS
    assert layers(model) == [0, 1, 2]
    assert not is_bound(model.get_submodule("blocks.0.attn2"))


class Refined(nn.Module):
    """A text refiner in front of the blocks, and attention of several streams in them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedder = nn.Module()
        self.embedder.refiner = nn.ModuleList([nn.ModuleDict({"attn": Attention()})])
        names = ("attn", "audio_attn", "cross_attention", "audio_to_video_attn", "attn2")
        self.blocks = nn.ModuleList([nn.ModuleDict({n: Attention() for n in names})])
        self.single_blocks = nn.ModuleList([nn.ModuleDict({"attn": Attention()})])


def test_refiners_and_other_streams_are_left_out() -> None:
    assert cs.attach(Refined()).modules == ("blocks.0.attn", "single_blocks.0.attn")


def test_what_a_module_says_of_itself_counts_more_than_its_name() -> None:
    model = Refined()
    model.get_submodule("blocks.0.attn").is_cross_attention = True
    model.get_submodule("blocks.0.attn2").is_cross_attention = False
    assert cs.attach(model).modules == ("blocks.0.attn2", "single_blocks.0.attn")


def test_a_processor_makes_a_module_attention_whatever_its_class_is_called() -> None:
    block = nn.ModuleDict({"mix": nn.Linear(2, 2), "up": nn.Linear(2, 2)})
    block["mix"].processor = object()
    model = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    assert cs.attach(model).modules == ("blocks.0.mix",)


def test_an_attention_module_inside_another_one_is_the_one() -> None:
    outer = Attention()
    outer.inner = Attention()
    assert cs.attach(nn.ModuleDict({"outer_attention": outer})).modules == (
        "outer_attention.inner",
    )


def test_globs_name_the_modules_instead() -> None:
    model = Refined()
    handle = cs.attach(model, modules=["*.audio_attn", "single_blocks.*.attn"])
    assert handle.modules == ("blocks.0.audio_attn", "single_blocks.0.attn")
    assert cs.attach(model_of(), modules="blocks.1.attn?").modules == (
        "blocks.1.attn1",
        "blocks.1.attn2",
    )


def test_a_single_attention_module_can_be_attached_to() -> None:
    attention = Attention()
    assert cs.attach(attention).modules == ("",)
    assert is_bound(attention)


# What cannot be attached.


def table(num_layers: int) -> cs.STA:
    windows = cs.WindowTable(windows=((1, 1, 1),), choice=[[[0]] * num_layers])
    return cs.STA(window_thw=windows, tile_thw=(2, 3, 2))


@pytest.mark.parametrize(
    ("model", "arguments", "problem"),
    [
        (nn.Linear(2, 2), {}, "no attention module found"),
        (Attention(), {"modules": "nothing.*"}, "a glob of modules matches nothing"),
        (Attention().to("meta"), {}, "the model has no memory yet"),
        (TinyDiT(2), {"policy": table(3)}, "a table of windows is for another number of layers"),
        (TinyDiT(2), {"policy": {"blocks.*.attnX": "sta", "*": "dense"}}, "no sparse rule"),
    ],
    ids=["none", "glob", "meta", "table", "rule"],
)
def test_what_cannot_be_attached_is_refused_with_the_next_step(
    model: nn.Module, arguments: dict[str, Any], problem: str
) -> None:
    before = set(vars(model))
    with pytest.raises(AttachError, match=problem) as caught:
        cs.attach(model, **arguments)
    assert all((caught.value.got, caught.value.expected, caught.value.next_step))
    assert set(vars(model)) == before


# What it leaves alone.


def test_outputs_state_signature_and_gradients_stay_as_they_were() -> None:
    model, inputs = model_of(), dit_inputs()
    expected, names = model(*inputs), list(model.state_dict())
    signature = inspect.signature(model.blocks[0].attn1.forward)
    cs.attach(model, POLICY)
    assert torch.equal(model(*inputs), expected)
    assert list(model.state_dict()) == names
    assert inspect.signature(model.blocks[0].attn1.forward) == signature
    model(*inputs).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_loading_weights_is_as_strict_as_before_and_nothing_is_missing() -> None:
    model, other = model_of(), model_of()
    handle = cs.attach(model, POLICY)
    model.load_state_dict(other.state_dict(), strict=True)
    report = handle.load_state_dict_report(other.state_dict())
    assert report.found == report.missing == ()


def test_moving_and_casting_a_model_keeps_the_layer_index() -> None:
    model = model_of()
    cs.attach(model)
    model.to(torch.float64).half().bfloat16()
    assert layers(model) == [0, 1, 2]
    assert getattr(model.blocks[0].attn1, LAYER).dtype == torch.int64
    assert getattr(model.to("meta").blocks[0].attn1, LAYER).is_meta


def test_a_linear_that_was_wrapped_for_fine_tuning_stays_wrapped() -> None:
    model = model_of()

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + 1

    cs.attach(model)
    model.blocks[0].attn1.to_q = Adapted(model.blocks[0].attn1.to_q)
    adapted = model(*dit_inputs())
    cs.attach(model).remove()
    assert isinstance(model.blocks[0].attn1.to_q, Adapted)
    torch.manual_seed(0)
    assert adapted.isfinite().all()


# Copies.


def test_a_copy_is_attached_on_its_own() -> None:
    model = model_of()
    handle = cs.attach(model, POLICY)
    twin = copy.deepcopy(model)
    handle.remove()
    assert all(is_bound(module) for module in attentions(twin))
    assert all(module.forward.__self__ is module for module in attentions(twin))
    assert layers(twin) == [0, 1, 2]
    inputs = dit_inputs()
    assert_close(twin(*inputs), model(*inputs))


@pytest.mark.parametrize("save", ["pickle", "torch.save"])
def test_a_pickled_model_loads_as_it_was_before_and_can_be_attached_again(save: str) -> None:
    model, inputs = model_of(), dit_inputs()
    cs.attach(model, POLICY)
    if save == "pickle":
        loaded = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    assert not any(is_bound(module) for module in attentions(loaded))
    assert_close(loaded(*inputs), model(*inputs))
    with cs.attach(loaded, POLICY):
        assert all(is_bound(module) for module in attentions(loaded))


# Undoing.


def snapshot(model: nn.Module) -> list[tuple[str, list[str], list[str]]]:
    """Attribute names of every module, buffers included."""
    return [(path, sorted(vars(m)), sorted(m._buffers)) for path, m in model.named_modules()]


def test_removing_restores_every_module() -> None:
    model = model_of()
    before = snapshot(model)
    handle = cs.attach(model, POLICY)
    assert snapshot(model) != before
    handle.remove()
    assert snapshot(model) == before
    handle.remove()
    assert snapshot(model) == before


def test_a_handle_is_a_context_manager() -> None:
    model = model_of()
    before = snapshot(model)
    with cs.attach(model, POLICY) as handle:
        assert handle.modules == PATHS
    assert snapshot(model) == before


def test_attaching_to_fewer_modules_releases_the_others() -> None:
    model = model_of()
    cs.attach(model, POLICY)
    cs.attach(model, POLICY, modules="blocks.1.attn1")
    assert [is_bound(module) for module in attentions(model)] == [False, True, False]
    assert int(getattr(model.blocks[1].attn1, LAYER)) == 0


def test_attaching_twice_is_attaching_once_with_the_later_policy() -> None:
    model = model_of()
    before = snapshot(model)
    cs.attach(model, "dense")
    second = cs.attach(model, POLICY)
    once = model_of()
    cs.attach(once, POLICY)
    assert snapshot(model) == snapshot(once)
    for one, other in zip(attentions(model), attentions(once), strict=True):
        assert one._compiled_sparse_policy == other._compiled_sparse_policy
    second.remove()
    assert snapshot(model) == before


def test_an_instance_forward_that_was_there_stays_in_force() -> None:
    model, inputs = model_of(), dit_inputs()
    module = model.blocks[0].attn1

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        return 2 * type(self).forward(self, *args, **kwargs)

    hook = types.MethodType(doubled, module)
    module.forward = hook
    expected = model(*inputs)
    handle = cs.attach(model, POLICY)
    assert torch.equal(model(*inputs), expected)
    handle.remove()
    assert module.forward is hook


def test_removing_from_under_a_later_patch_is_refused() -> None:
    model = model_of()
    handle = cs.attach(model)
    module = model.blocks[1].attn1
    module.forward = types.MethodType(lambda self, x: x, module)
    with pytest.raises(AttachError, match="patched by something else after"):
        handle.remove()


class Hooks:
    """What accelerate does with a module's forward, in small."""

    @staticmethod
    def add(module: Any) -> None:
        """Call a hook around the forward that is there."""
        old = module._old_forward if hasattr(module, "_old_forward") else module.forward
        module._old_forward = old

        def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            return module._old_forward(*args, **kwargs)

        hooked = functools.partial(new_forward, module)
        module.forward = functools.update_wrapper(hooked, old)

    @staticmethod
    def remove(module: Any) -> None:
        """Put the forward back that was there when the hook came."""
        module.forward = module._old_forward
        del module._old_forward


def hooked(model: TinyDiT) -> list[Any]:
    """The modules a loader hooks: the model and some of its attention."""
    return [model, *attentions(model)[:2]]


def dispatched_plainly(module: Any) -> Any:
    """A wrapper that shows what it wraps by `__wrapped__` alone."""
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    return forward


def test_attaching_again_under_a_loaders_hook_changes_policy_and_layers_alone() -> None:
    model, inputs = model_of(), dit_inputs()
    expected = model(*inputs)
    cs.attach(model, "dense")
    for module in hooked(model):
        Hooks.add(module)
    model.blocks[2].attn1.forward = dispatched_plainly(model.blocks[2].attn1)
    before = [module.forward for module in hooked(model)]
    cs.attach(model, POLICY)
    assert torch.equal(model(*inputs), expected)
    assert all(is_bound(module) for module in attentions(model))
    assert [module.forward for module in hooked(model)] == before
    policies = {module._compiled_sparse_policy for module in attentions(model)}
    assert [cs.Policy.from_json(p).rules for p in policies] == [(("*", POLICY),)]


def test_removing_under_a_loaders_hook_is_refused_and_breaks_nothing() -> None:
    model, inputs = model_of(), dit_inputs()
    expected, before = model(*inputs), snapshot(model)
    handle = cs.attach(model, POLICY)
    Hooks.add(model)
    with pytest.raises(AttachError, match="under the wrapper of something else"):
        handle.remove()
    assert all(is_bound(module) for module in attentions(model))
    assert torch.equal(model(*inputs), expected)
    Hooks.remove(model)
    handle.remove()
    assert snapshot(model) == before


def test_a_forward_that_a_loader_took_away_is_put_back_by_attaching_again() -> None:
    model, inputs = model_of(), dit_inputs()
    expected = model(*inputs)
    for module in hooked(model):
        Hooks.add(module)
    handle = cs.attach(model, POLICY)
    for module in hooked(model):
        Hooks.remove(module)
    assert [is_bound(module) for module in attentions(model)] == [False, False, True]
    assert torch.equal(model(*inputs), expected)
    again = cs.attach(model, POLICY)
    assert all(is_bound(module) for module in attentions(model))
    assert torch.equal(model(*inputs), expected)
    handle.remove()
    again.remove()
    assert not any(hasattr(module, LAYER) for module in model.modules())
    assert torch.equal(model(*inputs), expected)


def test_removing_what_a_loader_took_away_leaves_a_working_model() -> None:
    model, inputs = model_of(), dit_inputs()
    expected = model(*inputs)
    for module in hooked(model):
        Hooks.add(module)
    handle = cs.attach(model, POLICY)
    for module in hooked(model):
        Hooks.remove(module)
    handle.remove()
    assert not any(hasattr(module, LAYER) for module in model.modules())
    assert torch.equal(model(*inputs), expected)


def test_a_forward_that_hides_what_it_wraps_is_refused_before_anything_changes() -> None:
    model, inputs = model_of(), dit_inputs()
    cs.attach(model, "dense")
    for module in (model, model.blocks[2].attn1):
        expected = model(*inputs)
        inner = module.forward
        module.forward = lambda *args, inner=inner, **kwargs: inner(*args, **kwargs)
        policies = [each._compiled_sparse_policy for each in attentions(model)]
        for globs in (None, "blocks.0.attn1"):
            if globs is None or module is not model:
                with pytest.raises(AttachError, match="out of sight"):
                    cs.attach(model, POLICY, modules=globs)
        assert [each._compiled_sparse_policy for each in attentions(model)] == policies
        assert torch.equal(model(*inputs), expected)
        module.forward = inner


def test_a_stale_handle_leaves_a_newer_attach_alone() -> None:
    model = model_of()
    before = snapshot(model)
    stale = cs.attach(model, "dense")
    newer = cs.attach(model, POLICY)
    attached = snapshot(model)
    stale.remove()
    assert snapshot(model) == attached
    newer.remove()
    assert snapshot(model) == before
    with cs.attach(model, POLICY):
        newer.remove()
        assert snapshot(model) == attached


def test_the_report_says_when_it_takes_effect() -> None:
    report = cs.attach(model_of(), POLICY).report()
    assert report.startswith("3 attention modules attached, blocks.0.attn1 to blocks.2.attn1.")
    assert 'backend="compiled_sparse"' in report
    assert "dense attention" in report


# Own classes.


@cs.sparse(POLICY)
class Own(Attention):
    """A module whose author chose its policy; at the top of the file so that it pickles."""


class Stack(nn.Module):
    """Two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Own(), Own()])


def test_a_decorated_class_makes_modules_that_are_attached_without_a_place() -> None:
    module = Own()
    assert is_bound(module)
    assert getattr(module, LAYER).shape == (0,)
    assert list(module.state_dict()) == list(Attention().state_dict())
    x = torch.randn(1, 6, 16)
    assert torch.equal(module(x), Attention.forward(module, x))


def test_attaching_the_model_numbers_them_and_removing_takes_the_number_away() -> None:
    model = Stack()
    own = model.blocks[1]._compiled_sparse_policy
    handle = cs.attach(model)
    assert [int(getattr(block, LAYER)) for block in model.blocks] == [0, 1]
    assert cs.Policy.from_json(model.blocks[1]._compiled_sparse_policy).rules == (("*", POLICY),)
    handle.remove()
    assert all(is_bound(block) for block in model.blocks)
    assert getattr(model.blocks[1], LAYER).shape == (0,)
    assert model.blocks[1]._compiled_sparse_policy == own


def test_copies_and_pickles_of_a_decorated_class_keep_its_policy() -> None:
    model = Stack()
    cs.attach(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(is_bound(block) for block in twin.blocks)
        assert [int(getattr(block, LAYER)) for block in twin.blocks] == [0, 1]
        x = torch.randn(1, 6, 16)
        assert torch.equal(twin.blocks[0](x), model.blocks[0](x))


def test_an_instance_can_be_given_a_policy() -> None:
    module = Attention()
    assert cs.sparse("sta")(module) is module
    assert is_bound(module)
    assert not is_bound(Attention())


def test_only_modules_can_be_given_a_policy() -> None:
    with pytest.raises(AttachError, match=r"cs\.sparse is for modules"):
        cs.sparse(POLICY)(lambda x: x)
