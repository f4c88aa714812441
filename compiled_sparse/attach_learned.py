"""Linear layers that attention modules learn: added and taken away, without editing the model.

Each is a child of the attention module, so that checkpoints, optimisers, LoRA and sharding see it
like any other layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from compiled_sparse.config import MechanismConfig
from compiled_sparse.errors import AttachError

NOTHING = ("", 0)

_QUERY = re.compile(r"(?:.*_)?(?:w?q|query)(?:_proj|_linear)?")
_FUSED = re.compile(r"(?:.*_)?(?:w?qkv|query_key_value)(?:_proj|_linear)?", re.IGNORECASE)
_OF_TEXT = re.compile(r"text|txt|context|encoder|add_")


@dataclass(frozen=True)
class LearnedLayer:
    """A kind of layer that an attention module can have one of.

    An attached module says on its attribute `_compiled_sparse_<kind>` what its layer is called and
    how wide the layer's input is; an empty name where it has none.

    Args:
        kind: "gate", for instance.
        wanted_by: From a config to the layer's name, if the config asks for one.
        sizes: From an attention module to the widths of input and output of a layer for it.
        dtype: From an attention module to the dtype of a layer for it.
    """

    kind: str
    wanted_by: Callable[[MechanismConfig], str | None]
    sizes: Callable[[nn.Module], tuple[int, int]]
    dtype: Callable[[nn.Module], torch.dtype]

    @property
    def attribute(self) -> str:
        """Where an attached module says what its layer is called."""
        return f"_compiled_sparse_{self.kind}"

    @property
    def _added(self) -> str:
        return f"_compiled_sparse_added_{self.kind}"

    def wanted(self, configs: Iterable[MechanismConfig]) -> str | None:
        """Return the name of the layer that a module's configs ask for, if any does.

        Raises:
            AttachError: if they ask for layers of different names.
        """
        found = {self.wanted_by(config) for config in configs}
        names = sorted(name for name in found if name is not None)
        if len(names) > 1:
            raise AttachError(
                f"a module can have one learned {self.kind}",
                got="configs that name " + ", ".join(map(repr, names)),
                expected="one name",
                next_step="use one name for all; rules may differ in sparsity and tile",
            )
        return names[0] if names else None

    def name_of(self, module: nn.Module) -> str:
        """Return the name of the layer of an attached module; empty if it has none."""
        return str(getattr(module, self.attribute, NOTHING)[0])

    def check(self, module: nn.Module, name: str | None) -> None:
        """Check that a module can have a layer, without changing it.

        Raises:
            AttachError: if its name is taken, it has another one, or nothing tells the size.
        """
        if name is None:
            return
        has = self.name_of(module)
        taken = getattr(module, name, None)
        if has not in ("", name) or not (taken is None or isinstance(taken, nn.Module)):
            raise AttachError(
                f"the module cannot have a learned {self.kind} of this name",
                got=f"{self.kind} {name!r}; {type(module).__name__} has "
                + (f"the {self.kind} {has!r}" if has else f"something else there: {taken!r}"[:80]),
                expected=f"a free name, or that of a {self.kind} which the module already has",
                next_step="remove what was attached before, or choose another name",
            )
        self._widths(module, name)

    def add(self, module: nn.Module, name: str | None) -> None:
        """Give a module a layer, zero at first, unless it has one of this name.

        Args:
            module: An attention module for which `check` holds.
            name: The layer's name; None leaves the module's layer as it is.
        """
        if name is None:
            setattr(module, self.attribute, getattr(module, self.attribute, NOTHING))
            return
        width, out_width = self._widths(module, name)
        if getattr(module, name, None) is None:
            device = next((each.device for each in module.parameters()), torch.device("cpu"))
            layer = nn.Linear(width, out_width, device=device, dtype=self.dtype(module))
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
            module.add_module(name, layer)
            setattr(module, self._added, name)
        setattr(module, self.attribute, (name, width))

    def remove(self, module: nn.Module) -> None:
        """Take away the layer that `add` gave to a module; one of its own stays."""
        added = module.__dict__.pop(self._added, None)
        module.__dict__.pop(self.attribute, None)
        if added is not None and hasattr(module, added):
            delattr(module, added)

    def _widths(self, module: nn.Module, name: str) -> tuple[int, int]:
        """Return the widths of the layer's input and output."""
        own = getattr(module, name, None)
        found = None if own is None else features(own)
        return self.sizes(module) if found is None else found


def query_projection(module: nn.Module) -> tuple[nn.Module, int] | None:
    """Return the layer that makes the queries, and of how many parts it makes one."""
    linear = [
        (name, each)
        for name, each in module.named_children()
        if features(each) is not None and not _OF_TEXT.search(name)
    ]
    for pattern, parts in ((_QUERY, 1), (_FUSED, 3)):
        found = [each for name, each in linear if pattern.fullmatch(name)]
        if found:
            return found[0], parts
    return None


def features(module: nn.Module) -> tuple[int, int] | None:
    """Return a linear layer's widths; layers that wrap one, as LoRA's do, have them too."""
    widths = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    width, out_width = widths
    return (width, out_width) if isinstance(width, int) and isinstance(out_width, int) else None


def children_of(module: nn.Module) -> str:
    """Return the names of a module's children, for messages."""
    names = ", ".join(name for name, _ in module.named_children()) or "(none)"
    return f"{type(module).__name__} with the children {names}"
