"""Opt-in per module: `attach` for models somebody else wrote, `sparse` for one's own classes.

Both make attention modules emit a marker when they are traced. The compile backend reads from it
the module's own policy and its layer index, which no graph of a single block can tell.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from types import TracebackType
from typing import Any
from typing import TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor
from torch import nn

from compiled_sparse.attach_forward import LEARNED
from compiled_sparse.attach_forward import POLICY
from compiled_sparse.attach_forward import Names
from compiled_sparse.attach_forward import bind_module
from compiled_sparse.attach_forward import bind_root
from compiled_sparse.attach_forward import check_bindable
from compiled_sparse.attach_forward import check_releasable
from compiled_sparse.attach_forward import patch
from compiled_sparse.attach_forward import release_module
from compiled_sparse.attach_forward import release_root
from compiled_sparse.attach_gates import GATE
from compiled_sparse.attach_learned import LearnedLayer
from compiled_sparse.attach_modules import attention_modules
from compiled_sparse.attach_projections import PROJECTION
from compiled_sparse.checkpoints import LoadReport
from compiled_sparse.checkpoints import load_with_gates
from compiled_sparse.checkpoints import report_on
from compiled_sparse.config import Dense
from compiled_sparse.config import MechanismConfig
from compiled_sparse.errors import AttachError
from compiled_sparse.policy import KINDS
from compiled_sparse.policy import Policy
from compiled_sparse.policy import PolicyLike
from compiled_sparse.policy import as_policy
from compiled_sparse.spread import check_addable

CLASS_POLICY = "_compiled_sparse_class_policy"
_NOWHERE = "/"
"""A glob that no module path matches."""

Target = TypeVar("Target")

_holders: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()
"""By which attach a module is held, the latest one."""


class Handle:
    """What `attach` did, and the way back; also a context manager that removes it at the end.

    Args:
        model: The model.
        layers: Path and module of each attached attention layer, in layer order.
    """

    def __init__(self, model: nn.Module, layers: list[tuple[str, nn.Module]]) -> None:
        self._model = model
        self._layers = layers
        self._held = {id(module): module for module in (model, *(each for _, each in layers))}
        self._token = object()
        _holders.update((module, self._token) for module in self._held.values())

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the attached modules; the position is the layer index."""
        return tuple(path for path, _ in self._layers)

    def remove(self) -> None:
        """Restore the model; classes decorated with `sparse` keep their own policy.

        What was attached again since is that handle's matter and left alone.

        Raises:
            AttachError: if something else has patched the model since; nothing is changed then.
        """
        held = [each for each in self._held.values() if _holders.get(each) is self._token]
        layers = [module for _, module in self._layers if any(module is each for each in held)]
        root = [each for each in held if all(each is not module for _, module in self._layers)]
        for module in layers:
            _check_releasable(module)
        for module in root:
            check_releasable(module, is_root=True)
        for module in layers:
            _release(module)
        for module in root:
            release_root(module)
            del _holders[module]

    @property
    def gates(self) -> tuple[str, ...]:
        """Paths of the learned gates in the model, in layer order."""
        return self._paths(GATE)

    @property
    def projections(self) -> tuple[str, ...]:
        """Paths of the learned projections in the model, in layer order."""
        return self._paths(PROJECTION)

    def _paths(self, learned: LearnedLayer) -> tuple[str, ...]:
        named = [(path, learned.name_of(module)) for path, module in self._layers]
        return tuple(f"{path}.{name}" if path else name for path, name in named if name)

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], *, strict: bool = True
    ) -> LoadReport:
        """Load weights into the model, learned layers under the names of published checkpoints.

        Args:
            state_dict: Weights by diffusers' or FastVideo's names; gates at the attention module
                or at its block, projections wherever published models have them.
            strict: Whether every name must fit; gates and projections that are missing are zero in
                any case.

        Returns:
            What was found, zero-filled, missing and unexpected.

        Raises:
            CheckpointError: as `compiled_sparse.checkpoints.load_with_gates` does, for one where
                the model has no place for a gate. The model is unchanged then.
        """
        return load_with_gates(
            self._model, self.gates, state_dict, projections=self.projections, strict=strict
        )

    def load_state_dict_report(self, state_dict: Mapping[str, Any]) -> LoadReport:
        """Say what `load_state_dict` would find, without loading anything.

        Args:
            state_dict: What is going to be loaded into the model.
        """
        return report_on(self._model, self.gates, state_dict, projections=self.projections)

    def report(self) -> str:
        """Return what is attached and when it takes effect, in words."""
        first, last = self.modules[0], self.modules[-1]
        return (
            f"{len(self._layers)} attention modules attached, {first} to {last}"
            f"{self._describe(GATE)}{self._describe(PROJECTION)}.\n"
            'They become sparse when compiled with backend="compiled_sparse", alone or within the '
            "model. Run eagerly or compiled by another backend they compute dense attention."
        )

    def _describe(self, learned: LearnedLayer) -> str:
        paths = self._paths(learned)
        return f"; {len(paths)} learned {learned.kind}s, the first {paths[0]}" if paths else ""

    def __enter__(self) -> Handle:
        """Return the handle."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove what was attached."""
        self.remove()


def attach(
    model: nn.Module, policy: PolicyLike = None, *, modules: str | Iterable[str] | None = None
) -> Handle:
    """Tell the attention modules of a model their policy and their place in the model.

    For models that are compiled in parts, such as with diffusers' `compile_repeated_blocks`: the
    graph of a block knows neither which block it is nor the grid. Attached modules say the former;
    of the latter the model's `forward` reads what its call tells. Attaching again replaces what was
    attached before, but for what is learned; doing so after compiling is fine.

    A config that names a learned gate, such as `VSA(gate="to_gate_compress")`, or a learned
    projection, as `SLA()` does, gives each module whose rule it is a linear layer of this name,
    zero at first.

    Args:
        model: The model, compiled or not, or a single attention module.
        policy: Forms as in `options={"policy": ...}`; it outranks the options. None only numbers
            the layers.
        modules: Globs on module paths to attach to, instead of the self-attention modules in the
            model's lists of blocks. Their order in the model gives the layer indices.

    Returns:
        A handle that can undo it.

    Raises:
        AttachError: if the arguments are no module and no globs, there is no attention module, a
            glob matches none, the model is on the meta device, a table of windows has another
            number of layers, no sparse rule of the policy matches any of the modules, a module
            cannot have the gate or projection it is to have, the model is already spread over
            processes and one would be added, or something else has hidden what an earlier attach
            did. Nothing is changed then.
        ConfigError: if the policy is not one.
    """
    model = getattr(model, "_orig_mod", model)
    _check_model(model)
    resolved = None if policy is None else as_policy(policy)
    layers = attention_modules(model, _as_globs(modules))
    policies = [_policy_of(module, resolved) for _, module in layers]
    _check(model, policies)
    if resolved is not None:
        _check_rules(resolved, [path for path, _ in layers])
    attached = {id(module) for _, module in layers}
    others = [m for m in model.modules() if hasattr(m, POLICY) and id(m) not in attached]
    has_root = id(model) not in attached
    learned = _checked_names(layers, policies)
    check_addable(model, _added(layers, learned))
    _check_patches([module for _, module in layers], others, model if has_root else None)
    for module in others:
        _release(module)
    for index, ((path, module), own) in enumerate(zip(layers, policies, strict=True)):
        bind_module(module, _for_layer(own, path, index, len(layers)), index, learned[index])
    if has_root:
        bind_root(model)
    return Handle(model, layers)


def sparse(policy: PolicyLike) -> Callable[[Target], Target]:
    """Give an attention module its own policy, as a class decorator or applied to an instance.

        @cs.sparse(cs.STA(window_thw=(3, 3, 3)))
        class SelfAttention(nn.Module): ...

    It outranks the backend's options. Modules do not know their layer index until `attach` is
    called on the whole model.

    Args:
        policy: Forms as in `options={"policy": ...}`.

    Returns:
        A function that takes the class or instance and returns it.

    Raises:
        ConfigError: if the policy is not one.
        AttachError: if it is applied to something else.
    """
    resolved = as_policy(policy)
    document = resolved.to_json()
    names = _wanted(config for _, config in resolved.rules)

    def decorate(target: Target) -> Target:
        if isinstance(target, nn.Module):
            _check_names(target, names)
            bind_module(target, document, None, names)
        elif isinstance(target, type) and issubclass(target, nn.Module):
            _decorate_class(target, document, names)
        else:
            raise AttachError(
                "cs.sparse is for modules",
                got=repr(target),
                expected="an nn.Module, or a class of modules",
                next_step="decorate the class of the attention module",
            )
        return target

    return decorate


def _decorate_class(cls: Any, document: str, names: Names) -> None:
    initialise, restore = cls.__init__, cls.__setstate__

    @functools.wraps(initialise)
    def initialise_and_bind(self: Any, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        _check_names(self, names)
        bind_module(self, document, None, names)

    @functools.wraps(restore)
    def restore_and_patch(self: Any, state: Any) -> None:
        restore(self, state)
        patch(self)

    cls.__init__, cls.__setstate__ = initialise_and_bind, restore_and_patch
    setattr(cls, CLASS_POLICY, document)


def _check_patches(
    layers: list[nn.Module], others: list[nn.Module], root: nn.Module | None
) -> None:
    for module in layers:
        check_bindable(module)
    for module in others:
        _check_releasable(module)
    if root is not None:
        check_bindable(root, is_root=True)


def _check_releasable(module: nn.Module) -> None:
    keeps_policy = hasattr(type(module), CLASS_POLICY)
    check_bindable(module) if keeps_policy else check_releasable(module)


def _release(module: nn.Module) -> None:
    _holders.pop(module, None)
    own = getattr(type(module), CLASS_POLICY, None)
    if own is None:
        release_module(module)
        for learned in LEARNED:
            learned.remove(module)
    else:
        bind_module(module, own, None)


def _policy_of(module: nn.Module, policy: Policy | None) -> Policy | None:
    own = getattr(type(module), CLASS_POLICY, None)
    return Policy.from_json(own) if policy is None and own is not None else policy


def _for_layer(policy: Policy | None, path: str, layer: int, num_layers: int) -> str:
    """Return the JSON of what a policy says about one layer, the same for like layers.

    Whether the layer is one of the dense ones is said by the policy having one dense layer, or
    none: compiled artifacts are shared by modules that say the same.
    """
    if policy is None:
        return ""
    configs = {kind: each.for_layer(layer) for kind, each in _configs(policy, path).items()}
    same = len(configs) == len(KINDS) and len(set(configs.values())) == 1
    rules: dict[str, MechanismConfig] = (
        {"*": configs[KINDS[0]]} if same else {f"{kind}:*": each for kind, each in configs.items()}
    )
    is_last = layer >= num_layers - policy.dense_last_layers
    is_dense = layer < policy.dense_first_layers or is_last
    steps = (policy.dense_first_steps, policy.dense_last_steps)
    return Policy(rules or {_NOWHERE: Dense()}, *steps, dense_first_layers=int(is_dense)).to_json()


def _checked_names(
    layers: list[tuple[str, nn.Module]], policies: list[Policy | None]
) -> list[Names]:
    """Return the names of what each module is to learn."""
    found = []
    for (path, module), policy in zip(layers, policies, strict=True):
        found.append(_wanted(_configs(policy, path).values()))
        _check_names(module, found[-1])
    return found


def _added(layers: list[tuple[str, nn.Module]], learned: list[Names]) -> list[str]:
    """Return the paths of the layers that modules are to learn and do not have yet."""
    return [
        f"{path}.{name}" if path else name
        for (path, module), names in zip(layers, learned, strict=True)
        for name in names
        if name is not None and getattr(module, name, None) is None
    ]


def _wanted(configs: Iterable[MechanismConfig]) -> Names:
    given = list(configs)
    names = tuple(learned.wanted(given) for learned in LEARNED)
    found = [name for name in names if name is not None]
    if len(set(found)) < len(found):
        raise AttachError(
            "a learned gate and a learned projection have one name",
            got=f"{found[0]!r} for both",
            expected="two names: they are two layers",
            next_step="change gate= or proj= of the configs",
        )
    return names


def _check_names(module: nn.Module, names: Names) -> None:
    for learned, name in zip(LEARNED, names, strict=True):
        learned.check(module, name)


def _configs(policy: Policy | None, path: str) -> dict[str, MechanismConfig]:
    """Return what a policy says about a module, by kind of call."""
    found = {} if policy is None else {kind: policy.match(path, kind) for kind in KINDS}
    return {kind: match[1] for kind, match in found.items() if match is not None}


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise AttachError(
            "cs.attach is for modules",
            got=repr(model)[:80],
            expected="an nn.Module",
            next_step="pass the transformer of a pipeline: cs.attach(pipe.transformer, policy)",
        )


def _as_globs(modules: Any) -> list[str] | None:
    if modules is None or isinstance(modules, str):
        return None if modules is None else [modules]
    globs = list(modules) if isinstance(modules, Iterable) else []
    if not globs or not all(isinstance(each, str) for each in globs):
        raise AttachError(
            "modules is neither a glob nor several",
            got=repr(modules),
            expected="globs on module paths, or None for the model's self-attention",
            next_step='pass modules="blocks.*.attn1", for instance',
        )
    return globs


def _check(model: nn.Module, policies: list[Policy | None]) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise AttachError(
            "the model has no memory yet",
            got="parameters on the meta device",
            expected="a model whose weights are loaded",
            next_step="call cs.attach after loading the weights",
        )
    configs = {config for policy in policies if policy for _, config in policy.rules}
    for config in configs:
        table = config.table
        if table is not None and table.num_layers not in (1, len(policies)):
            raise AttachError(
                "a table of windows is for another number of layers",
                got=f"{table.num_layers} layers in the table, {len(policies)} in the model",
                expected=f"1 or {len(policies)} layers",
                next_step="see Handle.modules of an attach without a policy for their order",
            )


def _check_rules(policy: Policy, paths: list[str]) -> None:
    found = (policy.match(path, kind) for path in paths for kind in KINDS)
    is_used = any(rule is not None and rule[0] in policy.sparse_globs for rule in found)
    if policy.sparse_globs and not is_used:
        raise AttachError(
            "no sparse rule of the policy matches any attention module",
            got=f"globs {', '.join(map(repr, policy.sparse_globs))}; modules {paths[0]!r} to "
            f"{paths[-1]!r}",
            expected="globs on the paths of the attached modules; the first match wins",
            next_step="see cs.attach(model).modules for the paths",
        )
