"""What a mechanism's op reads at run time, as nodes in front of an attention call."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from compiled_sparse.config import MechanismConfig
from compiled_sparse.passes.fx import hint
from compiled_sparse.passes.fx import same
from compiled_sparse.passes.fx import shape_of
from compiled_sparse.passes.gates import find_hidden_state
from compiled_sparse.passes.gates import insert_gate
from compiled_sparse.passes.hidden import HiddenState
from compiled_sparse.passes.layouts import SiteLayout
from compiled_sparse.passes.markers import Marker
from compiled_sparse.passes.markers import Projection
from compiled_sparse.passes.runtime_inputs import RuntimeInput
from compiled_sparse.passes.runtime_inputs import RuntimeInputs
from compiled_sparse.passes.runtime_inputs import fake_mode_of
from compiled_sparse.passes.sites import Site
from compiled_sparse.registry import Refused
from compiled_sparse.selector import SiteFacts


class RuntimeArguments:
    """The tensors one attention call can be given.

    Args:
        runtime: The inputs appended to the graph.
        site: The call.
        facts: Its layer index, where the graph shows it.
        layout: Where its video is.
        marker: What the module that makes the call says.
        has_sparsity: Whether the call is given a sparsity.
    """

    def __init__(
        self,
        runtime: RuntimeInputs,
        site: Site,
        facts: SiteFacts,
        layout: SiteLayout,
        marker: Marker | None,
        *,
        has_sparsity: bool = False,
    ) -> None:
        self._runtime = runtime
        self._site = site
        self._facts = facts
        self._layout = layout
        self._layer = None if marker is None else marker.layer
        self._gate = None if marker is None else marker.gate
        self._projection = None if marker is None else marker.projection
        self._has_sparsity = has_sparsity

    def refusal(self, names: tuple[str, ...], config: MechanismConfig) -> Refused | None:
        """Return why the call cannot be given what an op reads, if it cannot.

        Args:
            names: Names among `registry.RUNTIME_INPUTS` and `OPTIONAL_INPUTS`.
            config: The config the op is for.
        """
        refused = self._gate_refusal(config) if "gate" in names else None
        if refused is None and "proj_weight" in names:
            refused = self._projection_refusal(config)
        is_elsewhere = self._is_projection_elsewhere(config)
        is_read = {"given_sparsity": self._has_sparsity, "gate": False}
        is_read |= {"proj_weight": is_elsewhere, "proj_bias": is_elsewhere}
        names = tuple(name for name in names if is_read.get(name, True))
        if refused is not None or not names:
            return refused
        if not self._runtime.can_reach(self._site.owner):
            return Refused("nested_graph")
        num_layers = 1 if config.table is None else config.table.num_layers
        total = self._facts.num_layers
        if total is not None and num_layers not in (1, total):
            detail = f"{num_layers} layers in the table, {total} in the model"
            return Refused("layers_mismatch", detail)
        needs_layer = "layer" in names and (config.table is None or num_layers > 1)
        if needs_layer and self._layer is None and self._facts.layer is None:
            return Refused("layer_unknown", "the graph is a part of the model")
        return None

    def _gate_refusal(self, config: MechanismConfig) -> Refused | None:
        name = config.gate_name
        if self._gate is None:
            return Refused("gate_missing", f"gate {name!r}") if name is not None else None
        if name not in (None, self._gate.name):
            return Refused("gate_missing", f"gate {name!r}, the module has {self._gate.name!r}")
        if not config.takes_gate:
            return Refused("gate_unused", f"gate {self._gate.name!r}")
        return self._hidden if isinstance(self._hidden, Refused) else None

    @functools.cached_property
    def _hidden(self) -> HiddenState | Refused:
        assert self._gate is not None
        return find_hidden_state(self._site.local, self._layout, self._gate)

    def _used_projection(self, config: MechanismConfig) -> Projection | None:
        return None if config.projection_name is None else self._projection

    def _is_projection_elsewhere(self, config: MechanismConfig) -> bool:
        projection = self._used_projection(config)
        return projection is not None and projection.weight.graph is not self._site.node.graph

    def _projection_refusal(self, config: MechanismConfig) -> Refused | None:
        projection, name = self._used_projection(config), config.projection_name
        if projection is None:
            return None
        if projection.name != name:
            detail = f"projection {name!r}, the module has {projection.name!r}"
            return Refused("projection_unfit", detail)
        shape, head_dim = shape_of(projection.weight), self._site.tensor("query").shape[3]
        if shape is None or len(shape) != 2 or not all(same(size, head_dim) for size in shape):
            detail = f"{name!r} has a weight {shape}, heads are of size {hint(head_dim)}"
            return Refused("projection_unfit", detail)
        is_elsewhere = self._is_projection_elsewhere(config)
        is_at_hand = not is_elsewhere or self._runtime.is_at_root(projection.weight)
        return None if is_at_hand else Refused("nested_graph")

    def detail(self, names: tuple[str, ...], config: MechanismConfig) -> str:
        """Return what a report should say about the tensors that the call is not given.

        Args:
            names: Names among `registry.RUNTIME_INPUTS` and `OPTIONAL_INPUTS`.
            config: The config the op is for.
        """
        if "proj_weight" not in names or self._used_projection(config) is not None:
            return ""
        return "no projection, so no linear branch"

    def nodes(
        self, names: tuple[str, ...], config: MechanismConfig, text: tuple[Any, Any]
    ) -> list[fx.Node | None]:
        """Return what an op reads, in the order of `names`, for which `refusal` is None.

        The graph's insertion point must be in front of the call.

        Args:
            names: Names among `registry.RUNTIME_INPUTS` and `OPTIONAL_INPUTS`.
            config: The config the op is for.
            text: Text tokens before and after the video, as graph arguments.
        """
        return [self._node(name, config, text) for name in names]

    def _node(self, name: str, config: MechanismConfig, text: tuple[Any, Any]) -> fx.Node | None:
        if name == "layer":
            return self._layer_node()
        if name == "gate":
            return self._gate_node(text)
        if name in ("proj_weight", "proj_bias"):
            return self._projection_node(name, config)
        if name == "given_sparsity" and not self._has_sparsity:
            return None
        table = config.table if name == "windows" else None
        device = self._site.tensor("query").device
        return self._runtime.node(RuntimeInput(name, device, table), self._site)

    def _gate_node(self, text: tuple[Any, Any]) -> fx.Node | None:
        if self._gate is None:
            return None
        assert not isinstance(self._hidden, Refused)
        exchange = self._site.exchange
        if exchange is None:
            return insert_gate(self._site, self._hidden, self._gate, text)
        with self._site.node.graph.inserting_before(exchange.node):
            gate = insert_gate(self._site.local, self._hidden, self._gate, text)
        return exchange.carry(gate)

    def _projection_node(self, name: str, config: MechanismConfig) -> fx.Node | None:
        projection = self._used_projection(config)
        if projection is None:
            return None
        node = projection.weight if name == "proj_weight" else projection.bias
        return None if node is None else self._here(node)

    def _here(self, node: fx.Node) -> fx.Node:
        """Return a node as one of the call's graph."""
        is_here = node.graph is self._site.node.graph
        return node if is_here else self._runtime.reach(node, self._site.owner)

    def _layer_node(self) -> fx.Node:
        site = self._site
        if self._layer is not None:
            return self._here(self._layer)
        settings: dict[str, Any] = {"dtype": torch.int64, "device": site.tensor("query").device}
        arguments = ((), self._facts.layer or 0)
        node = site.node.graph.call_function(torch.full, arguments, settings)
        with fake_mode_of(site):
            node.meta["example_value"] = torch.full(*arguments, **settings)
        return node
