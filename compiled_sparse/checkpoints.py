"""Names of parameters in checkpoints: diffusers' and FastVideo's, and learned ones among them.

Both write the same numbers under different names. Published checkpoints mix the two: diffusers'
names for everything but the gates, which stand at the block and not at its attention module.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from typing import TypeVar

import torch
from torch import Tensor
from torch import nn

from compiled_sparse.errors import CheckpointError
from compiled_sparse.spread import placed_like

GATE = "to_gate_compress"
_ANY_LEARNED = ("gate_compress", ".proj_l.")
_OWN_PROJECTIONS = ("attn_impl.proj_l", "attn_op.local_attn.proj_l", "proj_l")
_BLOCK_PROJECTION = "self_attn.attn_op.local_attn.proj_l"
"""Where published models have the projection, from the attention module and from the block."""

_PARAMETERS = ("weight", "bias")
_SHOWN_NAMES = 3

_DIFFUSERS_AND_FASTVIDEO = (
    *((f"attn1.to_{each}", f"to_{each}") for each in "qkv"),
    ("attn1.to_out.0", "to_out"),
    ("attn1.norm_q", "norm_q"),
    ("attn1.norm_k", "norm_k"),
    (f"attn1.{GATE}", GATE),
    ("attn2.to_out.0", "attn2.to_out"),
    ("ffn.net.0.proj", "ffn.fc_in"),
    ("ffn.net.2", "ffn.fc_out"),
    ("norm2", "self_attn_residual_norm.norm"),
)
"""Modules of a block, by both names."""

_WRAPPED = r"(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)"
_WRAPPERS = re.compile(rf"(?:^|(?<=\.)){_WRAPPED}")
_PREFIXES = re.compile(r"^(?:(?:module|transformer)\.)+")
_BLOCK = re.compile(rf"((?:.*\.)?blocks\.\d+\.{_WRAPPED}*)(.*)")

Value = TypeVar("Value")


@dataclass(frozen=True)
class LoadReport:
    """Which parameters of a model a state dict holds, learned ones and others.

    Args:
        found: Full names of the learned parameters it has, as the model calls them.
        missing: Full names of the learned parameters it has not.
        zero_filled: Those of the missing ones that loading sets to zero; the others keep their
            initial values.
        missing_weights: Full names of the model's other parameters and saved buffers it has not.
        unexpected: Names in the state dict that the model has no place for.
    """

    found: tuple[str, ...]
    missing: tuple[str, ...]
    zero_filled: tuple[str, ...] = ()
    missing_weights: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return one line for each kind of name: how many there are, and the first few."""
        kinds = {
            "learned, found": self.found,
            "learned, missing": self.missing,
            "set to zero": self.zero_filled,
            "others, missing": self.missing_weights,
            "unexpected": self.unexpected,
        }
        return "\n".join(f"{kind + ':':18}{_few(names)}" for kind, names in kinds.items())


@dataclass(frozen=True)
class _Learned:
    """Paths of learned layers, each with that of the linear layer it is or wraps."""

    gates: dict[str, str]
    projections: dict[str, str]

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.gates.values(), *self.projections.values())


def to_diffusers(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Return a state dict under the names diffusers gives to the parameters of a Wan block.

    Only what stands inside `blocks.<number>.` is renamed, whatever comes in front of it. Names
    that are diffusers' already, or not known, stay.

    Args:
        state_dict: Names, with values of any kind.

    Raises:
        CheckpointError: if it is no mapping of names, or two names would become one.
    """
    return _renamed(state_dict, _diffusers_name)


def to_fastvideo(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Return a state dict under the names FastVideo gives to the parameters of a Wan block.

    The way back from `to_diffusers`, gates included: they then stand at the block.

    Args:
        state_dict: Names, with values of any kind.

    Raises:
        CheckpointError: if it is no mapping of names, or two names would become one.
    """
    return _renamed(state_dict, lambda name: _rename(name, _DIFFUSERS_AND_FASTVIDEO))


def load_with_gates(
    model: nn.Module,
    gates: Sequence[str],
    state_dict: Mapping[str, Tensor],
    *,
    projections: Sequence[str] = (),
    strict: bool = True,
) -> LoadReport:
    """Load a checkpoint into a model that has learned gates; those it does not have become zero.

    Names may be diffusers' or FastVideo's, gates may stand at the block or at its attention module,
    and either side may have the prefixes of wrappers: each name is matched with the one the model
    really has. Projections of `SLA` may be called `<attention>.attn_impl.proj_l` or
    `<block>.self_attn.attn_op.local_attn.proj_l`. The learned parameters of the report are weight
    and bias of the gates and projections.

    Args:
        model: The model, compiled or not.
        gates: Paths of its gates: `nn.Linear` modules, or modules that wrap one.
        state_dict: What to load; for a sharded model the whole of it, in each process.
        projections: Paths of its projections, likewise.
        strict: Whether it is an error that other parameters get no value, or that names are left
            over.

    Returns:
        What was found, and what was not.

    Raises:
        CheckpointError: if an argument is no model, no mapping of names or no path of a gate; two
            names mean one parameter; the checkpoint has a gate or projection that the model lacks,
            strict or not;
            shapes differ; a tensor has no memory; or as `strict` says. Nothing is changed then.
    """
    model, own, learned = _checked(model, gates, projections)
    values, report = _matched(own, learned, state_dict)
    _check_learned(report, learned)
    if strict:
        _check_complete(report)
    _check_values(own, values)
    values |= {name: torch.zeros_like(own[name]) for name in report.zero_filled}
    _check_memory(own, values)
    values = {n: placed_like(v, own[n]) if isinstance(v, Tensor) else v for n, v in values.items()}
    # Strictness was applied to the names of the checkpoint; torch would see those of the model.
    model.load_state_dict(values, strict=False)
    return report


def report_on(
    model: nn.Module,
    gates: Sequence[str],
    state_dict: Mapping[str, Any],
    *,
    projections: Sequence[str] = (),
) -> LoadReport:
    """Say what `load_with_gates` would find and fill, without changing anything.

    Gates that the model has no place for are among `unexpected`; shapes are not compared.

    Args:
        model: The model, compiled or not.
        gates: Paths of its gates.
        state_dict: What is going to be loaded.
        projections: Paths of its projections.

    Raises:
        CheckpointError: if an argument is no model, no mapping of names or no path of a gate, or
            two names mean one parameter.
    """
    _, own, learned = _checked(model, gates, projections)
    return _matched(own, learned, state_dict)[1]


def _rename(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Replace the name of a module inside its block; a number behind it makes it another one."""
    found = _BLOCK.fullmatch(name)
    if found is None:
        return name
    head, rest = found.groups()
    for old, new in pairs:
        tail = rest[len(old) :]
        if rest.startswith(old) and re.match(r"\.(?!\d)|$", tail):
            return f"{head}{new}{tail}"
    return name


def _diffusers_name(name: str) -> str:
    return _rename(name, ((theirs, ours) for ours, theirs in _DIFFUSERS_AND_FASTVIDEO))


def _canonical(name: str) -> str:
    """Return diffusers' name without wrappers: what two names of one parameter have in common."""
    return _diffusers_name(_PREFIXES.sub("", _WRAPPERS.sub("", name)))


def _check_names(state_dict: Any) -> None:
    if not isinstance(state_dict, Mapping) or not all(isinstance(name, str) for name in state_dict):
        raise CheckpointError(
            "the state dict is not a mapping of names",
            got=repr(state_dict)[:80],
            expected="parameters by name, as model.state_dict() returns them",
            next_step="load a file first, with safetensors.torch.load_file for instance",
        )


def _renamed(state_dict: Mapping[str, Value], rename: Callable[[str], str]) -> dict[str, Value]:
    _check_names(state_dict)
    origins: dict[str, str] = {}
    for name in state_dict:
        new = rename(name)
        first = origins.setdefault(new, name)
        if first != name:
            raise CheckpointError(
                "two names of the checkpoint mean one parameter",
                got=f"{first!r} and {name!r}, both {new!r}",
                expected="each parameter once",
                next_step="remove one of the two",
            )
    return {new: state_dict[name] for new, name in origins.items()}


def _checked(
    model: nn.Module, gates: Sequence[str], projections: Sequence[str]
) -> tuple[nn.Module, dict[str, Any], _Learned]:
    """Return the model as it was before compiling, its own state dict, and what it learns."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            "a checkpoint is loaded into a module",
            got=repr(model)[:80],
            expected="an nn.Module",
            next_step="pass the transformer of a pipeline: pipe.transformer",
        )
    own: dict[str, Any] = model.state_dict()
    names = {each: name for name, each in model.named_modules()}
    found = [
        {path: _linear(model, path, names, own) for path in _as_paths(paths)}
        for paths in (gates, projections)
    ]
    return model, own, _Learned(*found)


def _as_paths(gates: Any) -> list[Any]:
    """Return what was given as paths as a list; what is no path is refused when it is looked up."""
    return list(gates) if isinstance(gates, Iterable) and not isinstance(gates, str) else [gates]


def _linear(
    model: nn.Module, path: str, names: Mapping[nn.Module, str], own: Mapping[str, Any]
) -> str:
    """Return the path of the linear layer that a gate is or wraps: the outermost one in it.

    The path is that of its parameters, which has the wrappers of blocks compiled one by one.
    """
    inner: list[nn.Module] = []
    with suppress(AttributeError):  # torch's way to say that there is no such module
        inner = list(model.get_submodule(path).modules())
    linears = [names[each] for each in inner if isinstance(each, nn.Linear)]
    linears = [name for name in linears if f"{name}.weight" in own]
    depth = min((name.count(".") for name in linears), default=0)
    outermost = [name for name in linears if name.count(".") == depth]
    if len(outermost) != 1:
        raise CheckpointError(
            "a gate or projection is not a linear layer of the model",
            got=f"{path!r}, with {len(outermost)} linear layers",
            expected="paths of nn.Linear modules with a weight, or of modules that wrap one",
            next_step=f'pass gates=["blocks.0.attn1.{GATE}", ...]',
        )
    return outermost[0]


def _matched(
    own: Mapping[str, Any], layers: _Learned, state_dict: Mapping[str, Any]
) -> tuple[dict[str, Any], LoadReport]:
    """Return the values for the model by its own names, and what to say about them."""
    places = _places(own, layers)

    def place(name: str) -> str:
        return name if name in own else places.get(_canonical(name), name)

    given = _renamed(state_dict, place)
    names = [f"{linear}.{parameter}" for linear in layers.linears for parameter in _PARAMETERS]
    learned = [name for name in dict.fromkeys(names) if name in own]
    missing = tuple(name for name in learned if name not in given)
    report = LoadReport(
        found=tuple(name for name in learned if name in given),
        missing=missing,
        zero_filled=missing,
        missing_weights=tuple(name for name in own if name not in given and name not in learned),
        unexpected=tuple(name for name in given if name not in own),
    )
    return {name: value for name, value in given.items() if name in own}, report


def _places(own: Iterable[str], layers: _Learned) -> dict[str, str]:
    """Return the model's names by all canonical names they may have in a checkpoint."""
    places = _unambiguous((_canonical(name), name) for name in own)
    # A layer's own name goes first, then the usual names beside it, then the one at the block.
    of_gates = (_own_name, _at_parent(GATE), _at_block(GATE))
    of_projections = (_own_name, *map(_at_parent, _OWN_PROJECTIONS), _at_block(_BLOCK_PROJECTION))
    for paths, names in ((layers.gates, of_gates), (layers.projections, of_projections)):
        for name_of in names:
            claims = [
                (f"{_canonical(name_of(path))}.{parameter}", f"{linear}.{parameter}")
                for path, linear in paths.items()
                for parameter in _PARAMETERS
                if f"{linear}.{parameter}" in own
            ]
            places = {**_unambiguous(claims), **places}
    return places


def _unambiguous(claims: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return as a mapping what only one claims."""
    pairs = list(claims)
    counts = Counter(key for key, _ in pairs)
    return {key: value for key, value in pairs if counts[key] == 1}


def _own_name(path: str) -> str:
    return path


def _at_parent(name: str) -> Callable[[str], str]:
    """Return what puts a name in the place of the last one of a path."""
    return lambda path: ".".join((*path.split(".")[:-1], name))


def _at_block(name: str) -> Callable[[str], str]:
    """Return what puts a name behind the block of a path; one without a block stays."""

    def rename(path: str) -> str:
        found = _BLOCK.fullmatch(path)
        return path if found is None else f"{found[1]}{name}"

    return rename


def _check_learned(report: LoadReport, layers: _Learned) -> None:
    own = {_last_word(path) for path in (*layers.gates, *layers.projections)}
    left = [
        name
        for name in report.unexpected
        if any(each in name for each in _ANY_LEARNED) or own & set(name.split("."))
    ]
    if left:
        raise CheckpointError(
            "the checkpoint has gates or projections that the model lacks",
            got=_few(left),
            expected="a place for each: without them the pictures are wrong",
            next_step="attach VSA or SLA and load with the handle, which knows the places, or "
            "remove them from the checkpoint if dense attention is wanted",
        )


def _last_word(path: str) -> str:
    """Return the last part of a path that is no number: a place in a list names no gate."""
    return next((part for part in reversed(path.split(".")) if not part.isdigit()), path)


def _check_complete(report: LoadReport) -> None:
    if report.missing_weights or report.unexpected:
        raise CheckpointError(
            "the checkpoint does not fit the model",
            got=f"missing: {_few(report.missing_weights)}; unexpected: {_few(report.unexpected)}",
            expected="a value for each parameter but those of gates, and no other names",
            next_step="check that it is a checkpoint of this model, or pass strict=False",
        )


def _check_values(own: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Check shapes; what a module saves beside tensors is its own matter."""
    wrong = [
        f"{name}: {_shape(value)} for {_shape(own[name])}"
        for name, value in values.items()
        if isinstance(own[name], Tensor) and _shape(value) != _shape(own[name])
    ]
    if wrong:
        raise CheckpointError(
            "tensors of the checkpoint have other shapes than the model's",
            got="; ".join(wrong),
            expected="the same shapes under the same names",
            next_step="make the model with the configuration of the checkpoint",
        )


def _shape(value: object) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _check_memory(own: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    tensors = {f"{name} of the model": own[name] for name in values}
    tensors |= {f"{name} of the checkpoint": value for name, value in values.items()}
    empty = [name for name, each in tensors.items() if isinstance(each, Tensor) and each.is_meta]
    if empty:
        raise CheckpointError(
            "there are tensors without memory",
            got=f"on the meta device: {_few(empty)}",
            expected="a model and a checkpoint that hold numbers",
            next_step='call model.to_empty(device="cpu") first, and load the file without meta',
        )


def _few(names: Sequence[str]) -> str:
    if not names:
        return "none"
    more = ", ..." if len(names) > _SHOWN_NAMES else ""
    return f"{len(names)} ({', '.join(names[:_SHOWN_NAMES])}{more})"
