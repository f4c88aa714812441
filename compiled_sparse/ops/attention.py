"""`attention`: any mechanism as a function, without a compiler."""

from __future__ import annotations

import logging
import operator
from functools import lru_cache
from typing import Literal
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_sparse.config import Dense
from compiled_sparse.config import MechanismConfig
from compiled_sparse.config import at_sparsity
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import MissingGridError
from compiled_sparse.errors import ShapeError
from compiled_sparse.layout import Text
from compiled_sparse.layout import as_grid
from compiled_sparse.layout import check_text
from compiled_sparse.layout import sequence_grid
from compiled_sparse.metadata import check_index
from compiled_sparse.metadata import current_call
from compiled_sparse.registry import mechanism_of
from compiled_sparse.runtime import call_tensor
from compiled_sparse.runtime import index_tensor

logger = logging.getLogger("compiled_sparse")


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MechanismConfig,
    *,
    grid_thw: tuple[int, ...] | None = ...,
    text: Text | None = ...,
    key_mask: Tensor | None = ...,
    scale: float | None = ...,
    step: int | None = ...,
    layer: int | None = ...,
    sparsity: float | Tensor | None = ...,
    gate: Tensor | None = ...,
    proj: tuple[Tensor, Tensor | None] | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MechanismConfig,
    *,
    grid_thw: tuple[int, ...] | None = ...,
    text: Text | None = ...,
    key_mask: Tensor | None = ...,
    scale: float | None = ...,
    step: int | None = ...,
    layer: int | None = ...,
    sparsity: float | Tensor | None = ...,
    gate: Tensor | None = ...,
    proj: tuple[Tensor, Tensor | None] | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MechanismConfig,
    *,
    grid_thw: tuple[int, ...] | None = None,
    text: Text | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    step: int | None = None,
    layer: int | None = None,
    sparsity: float | Tensor | None = None,
    gate: Tensor | None = None,
    proj: tuple[Tensor, Tensor | None] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention by one mechanism, eagerly or inside any compiled function.

    Args:
        q: [batch, query heads, length, head_dim], any strides.
        k: [batch, key heads, length, head_dim]; query heads is a multiple of key heads.
        v: like `k`.
        config: Mechanism and its parameters, e.g. `STA(window_thw=(3, 3, 3))`.
        grid_thw: Token grid of the video; every mechanism but `Dense` and those over the plain
            sequence (`SWBA`) needs it.
        text: Text tokens around the video in the same sequence.
        key_mask: bool [batch, key length], True where the key is attended.
        scale: Softmax scale; None means `head_dim ** -0.5`.
        step: Denoising step, for a config with a table of windows; None means that of
            `cs.metadata`, else the first. Traced code has no metadata: pass it there.
        layer: Layer, for the same, and for a config whose layers take turns (`VMoBA`).
        sparsity: Fraction of the work to leave out, in place of the config's (`VSA`, `SLA`); None
            means that of `cs.metadata`, else the config's. As a float64 tensor without axes it
            changes from call to call of a compiled function without a recompilation.
        gate: [batch, query heads, length, head_dim], what weighs the compressed branch of `VSA`.
        proj: Weight [head_dim, head_dim] and bias [head_dim] of the learned projection behind the
            linear branch of `SLA` and `SageSLA`, of any floating dtype; None leaves that branch
            out, as a projection of zeros would.
        return_lse: Also return the natural log-sum-exp, float32 [batch, query heads, length].

    Returns:
        The output, [batch, query heads, length, head_dim], or the output and the log-sum-exp.

    Raises:
        MissingGridError: if the mechanism needs a grid and none was given.
        ConfigError: if the mechanism cannot run on its own (`Auto`), its windows are not one per
            query head, its layers differ and none is given, or `return_lse` is not available.
        LayoutError: if the grid has another number of axes than the config, or grid or text are of
            another type.
        MetadataError: if step or layer are no indices.
        ShapeError: if queries and keys are not equally long, so that this is no self-attention, or
            keys and values are not.
        CompiledSparseError: whatever the mechanism's op raises for wrong shapes and dtypes.
    """
    if not torch.compiler.is_compiling():
        _check_arguments(grid_thw, text, step, layer)
    if isinstance(config, MechanismConfig):
        config.check_gate(gate is not None)
        config.check_sparsity(sparsity)
        config.check_projection(proj)
    if not torch.compiler.is_compiling():
        step = current_call().step if step is None else step
        sparsity = current_call().sparsity if sparsity is None else sparsity
    if isinstance(config, MechanismConfig):
        _check_schedule(config, step, layer)
        config = config.at(step, layer)
    if isinstance(config, Dense):
        return _dense(q, k, v, key_mask, scale, return_lse)
    given: object = config
    mechanism = mechanism_of(config) if isinstance(given, MechanismConfig) else None
    if mechanism is None:
        raise ConfigError(
            "this config names no mechanism that can be called",
            got=repr(config),
            expected="STA(...) or Dense(), or the config of another registered mechanism",
            next_step="pass one of these; 'auto' is only for the compile backend",
        )
    text = text or Text()
    if config.grid_is_sequence:
        grid_thw, text = _sequence(q, grid_thw, text), Text()
    if grid_thw is None:
        raise MissingGridError(
            f"{config.name} needs the token grid",
            got="grid_thw=None",
            expected="the (T, H, W) grid of the video tokens",
            next_step="pass grid_thw=(T, H, W), counted after patching",
        )
    if not isinstance(sparsity, Tensor):
        config = at_sparsity(config, sparsity)
    tile = _resolve_tile(config, tuple(grid_thw))
    _check_self_attention(q, k, config)
    call = mechanism.lower(config, tile, list(grid_thw), text.before, text.after)
    weight, bias = proj or (None, None)
    given = sparsity if isinstance(sparsity, Tensor) else None
    optional = {"given_sparsity": given, "gate": gate, "proj_weight": weight, "proj_bias": bias}
    runtime = [
        optional[name] if name in optional else _runtime_tensor(name, config, step, layer, q.device)
        for name in call.runtime_inputs
    ]
    out, lse = call.op(q, k, v, key_mask, *call.arguments, *runtime, scale)
    return (out, lse) if return_lse else out


def _check_schedule(config: MechanismConfig, step: int | None, layer: int | None) -> None:
    """Check that a config which differs by layer and step can tell where it is.

    Raises:
        ConfigError: if no layer is given, or in traced code no step.
    """
    asks_for_step = config.dense_first_steps > 0 and step is None
    if asks_for_step and not torch.compiler.is_compiling():
        _warn_of_step(config)
        asks_for_step = False
    if (config.needs_layer and layer is None) or asks_for_step:
        raise ConfigError(
            "the config differs by layer or step, and which one this is, is not given",
            got=f"layer={layer}, step={step} for {config.describe()}",
            expected="the layer's index, counted from 0, and in traced code the step's",
            next_step="pass layer= and step= to cs.attention, or config.for_layer(layer)",
        )


@lru_cache(maxsize=64)
def _warn_of_step(config: MechanismConfig) -> None:
    """Say once that an unknown step is dense."""
    logger.warning(
        "%s keeps %d denoising steps dense, but the step is not known: an unknown step counts as "
        "step 0. Pass step=, or use cs.metadata(step=i).",
        config.describe(),
        config.dense_first_steps,
    )


def _check_arguments(grid_thw: object, text: object, step: object, layer: object) -> None:
    """Check what is no tensor; in traced code these have other types."""
    if grid_thw is not None:
        as_grid(grid_thw)
    check_text(text)
    check_index("step", step)
    check_index("layer", layer)


def _sequence(q: Tensor, grid_thw: tuple[int, ...] | None, text: Text) -> tuple[int]:
    """Return the sequence as a grid; a grid that was given must add up to it, as the op checks."""
    if grid_thw is None:
        return sequence_grid(q.shape[2:3])  # a tensor of a wrong rank is left to the op
    return sequence_grid(grid_thw, text.before, text.after)


def _runtime_tensor(
    name: str, config: MechanismConfig, step: int | None, layer: int | None, device: torch.device
) -> Tensor:
    """Return what a mechanism reads at run time; what is not given comes from `cs.metadata`."""
    if name == "layer":
        return index_tensor(layer or 0, device)
    if name == "step" and step is not None:
        return index_tensor(step, device)
    return call_tensor(name, current_call(), device, config.table)


def _resolve_tile(config: MechanismConfig, grid: tuple[int, ...]) -> tuple[int, ...]:
    if config.needs_static_grid:
        # The choice follows the grid: a traced grid becomes constant, so that each compiles anew.
        grid = tuple(operator.index(side) for side in grid)
    return config.resolve_tile(grid)


def _check_self_attention(q: Tensor, k: Tensor, config: MechanismConfig) -> None:
    """Check what the op cannot tell from lists alone; tensors of a wrong rank are left to it."""
    if q.dim() != 4 or k.dim() != 4:
        return
    config.check_heads(q.shape[1])
    if q.shape[2] != k.shape[2]:
        raise ShapeError(
            f"{config.name} needs queries and keys of one sequence",
            got=f"{q.shape[2]} queries, {k.shape[2]} keys",
            expected="equal lengths",
            next_step="leave cross-attention dense, or call block_sparse_attention",
        )


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    scale: float | None,
    return_lse: bool,
) -> Tensor:
    if return_lse:
        raise ConfigError(
            "dense attention does not return the log-sum-exp",
            got="return_lse=True",
            expected="return_lse=False",
            next_step="leave it out for dense layers and steps, or call cs.reference.attention",
        )
    if k.dim() == v.dim() == 4 and k.shape[2] != v.shape[2]:
        raise ShapeError(
            "keys and values are of different lengths",
            got=f"{k.shape[2]} keys, {v.shape[2]} values",
            expected="equal lengths",
            next_step="pass keys and values of the same tokens",
        )
    mask = None if key_mask is None else key_mask[:, None, None, :]
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=gqa)
