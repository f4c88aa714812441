"""Which modules of a model are its attention layers, found without a list of models."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from compiled_sparse.attach_forward import POLICY
from compiled_sparse.errors import AttachError

_OTHER_NAMES = ("cross", "_to_", "audio", "text", "context")


def attention_modules(
    model: nn.Module, globs: Sequence[str] | None = None
) -> list[tuple[str, nn.Module]]:
    """Return path and module of every attention layer, in the order the model registers them.

    Without globs these are the modules that look like attention (a diffusers `processor`, a class
    called `...Attention`) or have a policy of their own, hold no such module themselves, are not
    cross-attention by attribute or name, and lie in the model's outermost lists of blocks: not in a
    text refiner.

    Args:
        model: The model, or a single attention module.
        globs: Globs on module paths, which replace all these rules.

    Raises:
        AttachError: if there is none, or a glob matches no module.
    """
    named = [(path, module) for path, module in model.named_modules() if path or not globs]
    if globs is not None:
        return _matching(named, globs)
    found = [(path, module) for path, module in named if _is_attention(module)]
    leaves = [(path, module) for path, module in found if not _has_attention_inside(module)]
    layers = [(path, module) for path, module in leaves if not is_cross_attention(path, module)]
    depth = min((_list_depth(path) for path, _ in layers), default=0)
    layers = [(path, module) for path, module in layers if _list_depth(path) == depth]
    if layers:
        return layers
    raise AttachError(
        "no attention module found",
        got=f"{type(model).__name__} with {len(named)} modules",
        expected='modules with a `processor`, or of a class called "...Attention"',
        next_step='name them: cs.attach(model, policy, modules="blocks.*.attn")',
    )


def is_cross_attention(path: str, module: nn.Module) -> bool:
    """Whether a module says, by attribute or else by name, that it is not over the video alone.

    `attn2` and `cross` are the usual names of cross-attention, `audio` and `text` of other streams.
    """
    said = getattr(module, "is_cross_attention", None)
    if isinstance(said, bool):
        return said
    name = path.rpartition(".")[2].lower()
    is_other = name.endswith("attn2") or any(part in name for part in _OTHER_NAMES)
    return is_other or "Cross" in type(module).__name__


def _matching(
    named: list[tuple[str, nn.Module]], globs: Iterable[str]
) -> list[tuple[str, nn.Module]]:
    globs = tuple(globs)
    for glob in globs:
        if not any(fnmatchcase(path, glob) for path, _ in named):
            raise AttachError(
                "a glob of modules matches nothing",
                got=repr(glob),
                expected="globs on dotted module paths",
                next_step="see [name for name, _ in model.named_modules()]",
            )
    return [(p, module) for p, module in named if any(fnmatchcase(p, glob) for glob in globs)]


def _is_attention(module: nn.Module) -> bool:
    looks_like_it = hasattr(module, "processor") or type(module).__name__.endswith("Attention")
    return looks_like_it or hasattr(module, POLICY)


def _has_attention_inside(module: nn.Module) -> bool:
    return any(_is_attention(inner) for inner in module.modules() if inner is not module)


def _list_depth(path: str) -> int:
    """Number of names in front of the first list index; large where there is no list."""
    parts = path.split(".")
    return next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
