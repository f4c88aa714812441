"""A mechanism from a function that selects blocks, and at most one extra branch.

    MECHANISM = block_selector_mechanism("mine", Mine, select_blocks, density=my_density)

The result is a record as the built-in mechanisms have one, around a composite op of its own,
`compiled_sparse::<name>`, which carries the config as JSON and the layout as integers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from compiled_sparse.config import MechanismConfig
from compiled_sparse.errors import ConfigError
from compiled_sparse.layout import BlockLayout
from compiled_sparse.layout import Text
from compiled_sparse.ops.autocast import register_autocast_like_sdpa
from compiled_sparse.ops.block_sparse import block_sparse_attention
from compiled_sparse.ops.checks import KERNEL_CAPABILITIES
from compiled_sparse.ops.library import LIBRARY
from compiled_sparse.ops.library import NAMESPACE
from compiled_sparse.reference.blocks import attention_over_blocks
from compiled_sparse.registry import KERNEL_EFFICIENCY
from compiled_sparse.registry import RUNTIME_INPUTS
from compiled_sparse.registry import Capabilities
from compiled_sparse.registry import Chosen
from compiled_sparse.registry import Mechanism
from compiled_sparse.registry import OpCall
from compiled_sparse.registry import Refused

Runtime = Mapping[str, Tensor]
SelectBlocks = Callable[..., tuple[Tensor, Tensor]]
Density = Callable[[Any, BlockLayout], float]
Preprocess = Callable[..., tuple[Tensor, Tensor, Tensor]]

_ARGUMENTS = "str config, SymInt[] grid, int[] tile, SymInt text_before, SymInt text_after"


def block_selector_mechanism(
    name: str,
    config: type[MechanismConfig],
    select_blocks: SelectBlocks,
    *,
    density: Density,
    extra_branch: Callable[..., Tensor] | None = None,
    preprocess: Preprocess | None = None,
    postprocess: Callable[..., Tensor] | None = None,
    reference: Callable[..., tuple[Tensor, Tensor]] | None = None,
    capabilities: Capabilities = KERNEL_CAPABILITIES,
    runtime_inputs: tuple[str, ...] = (),
) -> Mechanism:
    """Make a mechanism of a block selector; give it to `register`, or to an entry point.

    Tokens stay in raster order, so nothing has to be moved before or after; `preprocess` and
    `postprocess` are for what changes the values themselves. All functions are torch code that can
    be traced, and are called with the layout's integers.

    Args:
        name: The mechanism's name, also that of its op; the config's `name`.
        config: Config class, every field with a default.
        select_blocks: From (q, k, layout, config, runtime) to int32 block indices
            [batch or 1, query heads or 1, blocks, K] and counts [.., blocks].
        density: From (config, layout) to the fraction of token pairs attended.
        extra_branch: From (out, q, k, v, layout, config, runtime) to the final output.
        preprocess: From (q, k, v, layout, config) to the queries, keys and values to use.
        postprocess: From (out, layout, config) to the output.
        reference: The definition; by default dense attention over the selected blocks.
        capabilities: What the tensors of a call may be.
        runtime_inputs: Names among `registry.RUNTIME_INPUTS` of the tensors in `runtime`.

    Returns:
        The mechanism, not registered yet.

    Raises:
        ConfigError: if the name is not the config's or no identifier, or an input is unknown.
    """
    unknown = sorted(set(runtime_inputs) - set(RUNTIME_INPUTS))
    if name != config.name or not name.isidentifier() or unknown:
        raise ConfigError(
            "not the name of a mechanism and its op, or an unknown runtime input",
            got=f"name {name!r}, config.name {config.name!r}, runtime inputs {unknown}",
            expected="the config's name, an identifier, and inputs among "
            + ", ".join(RUNTIME_INPUTS),
            next_step=f'set `name = "{name}"` on the config class, or correct runtime_inputs',
        )

    def before(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        return (q, k, v) if preprocess is None else preprocess(q, k, v, *rest)

    def after(out: Tensor, qkv: tuple[Tensor, ...], *rest: Any) -> Tensor:
        layout, values, runtime = rest
        if extra_branch is not None:
            out = extra_branch(out, *qkv, layout, values, runtime)
        return out if postprocess is None else postprocess(out, layout, values)

    _define_op(name, runtime_inputs, before, select_blocks, after)
    return Mechanism(
        config=config,
        capabilities=capabilities,
        evaluate=_evaluate(density),
        lower=_lower(name, runtime_inputs),
        reference=reference or _reference(before, select_blocks, after),
    )


def _define_op(
    name: str,
    runtime_inputs: tuple[str, ...],
    before: Preprocess,
    select_blocks: SelectBlocks,
    after: Callable[..., Tensor],
) -> None:
    tensors = "".join(f", Tensor {each}" for each in runtime_inputs)
    LIBRARY.define(
        f"{name}(Tensor q, Tensor k, Tensor v, Tensor? key_mask, {_ARGUMENTS}{tensors}, "
        "float? scale) -> (Tensor out, Tensor lse)"
    )

    def body(
        q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, config: str, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        (grid, tile, text_before, text_after), scale = rest[:4], rest[-1]
        layout = _layout(grid, tile, text_before, text_after)
        values = _parse(config)
        runtime = dict(zip(runtime_inputs, rest[4:-1], strict=True))
        q, k, v = before(q, k, v, layout, values)
        indices, counts = select_blocks(q, k, layout, values, runtime)
        out, lse = block_sparse_attention(
            q,
            k,
            v,
            indices,
            counts,
            grid=layout.grid,
            q_tile=layout.tile,
            kv_tile=layout.tile,
            key_mask=key_mask,
            text_before=layout.text_before,
            text_after=layout.text_after,
            scale=scale,
        )
        return after(out, (q, k, v), layout, values, runtime), lse

    LIBRARY.impl(name, body, "CompositeImplicitAutograd")
    register_autocast_like_sdpa(name)


def _layout(grid: Any, tile: Any, text_before: Any, text_after: Any) -> BlockLayout:
    """The layout in plain integers; a symbolic size becomes constant and is guarded on."""
    before, after = operator.index(text_before), operator.index(text_after)
    return BlockLayout(tuple(map(operator.index, grid)), tuple(tile), before, after)


@lru_cache(maxsize=256)
def _parse(config: str) -> MechanismConfig:
    return MechanismConfig.from_json(config)


def _to_json(config: MechanismConfig) -> str:
    return config.to_json()


# Dynamo calls it instead of tracing it, as `torch.compiler.assume_constant_result` would have it.
_to_json._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _lower(name: str, runtime_inputs: tuple[str, ...]) -> Callable[..., OpCall]:
    op = getattr(getattr(torch.ops, NAMESPACE), name).default

    def lower(
        config: MechanismConfig, tile: tuple[int, ...], grid: list[Any], before: Any, after: Any
    ) -> OpCall:
        arguments = (_to_json(config), grid, list(tile), before, after)
        return OpCall(op, arguments, runtime_inputs)

    return lower


def _evaluate(density: Density) -> Callable[[Any, BlockLayout, int], Chosen | Refused]:
    def evaluate(config: Any, layout: BlockLayout, heads: int) -> Chosen | Refused:
        fraction = density(config, layout)
        return Chosen(config, layout.tile, fraction, KERNEL_EFFICIENCY / fraction)

    return evaluate


def _reference(
    before: Preprocess, select_blocks: SelectBlocks, after: Callable[..., Tensor]
) -> Callable[..., tuple[Tensor, Tensor]]:
    def reference(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        config: MechanismConfig,
        *,
        grid_thw: tuple[int, ...],
        text: Text | None = None,
        key_mask: Tensor | None = None,
        scale: float | None = None,
        runtime: Runtime | None = None,
    ) -> tuple[Tensor, Tensor]:
        text = text or Text()
        tile = config.resolve_tile(tuple(grid_thw))
        layout = BlockLayout(tuple(grid_thw), tile, text.before, text.after)
        q, k, v = before(q, k, v, layout, config)
        lists = select_blocks(q, k, layout, config, runtime or {})
        out, lse = attention_over_blocks(q, k, v, layout, *lists, key_mask=key_mask, scale=scale)
        return after(out, (q, k, v), layout, config, runtime or {}), lse

    return reference
