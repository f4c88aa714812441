"""Reports to make pages of, and pages taken apart."""

from __future__ import annotations

import json
from dataclasses import dataclass
from dataclasses import field
from html.parser import HTMLParser
from typing import Any

import compiled_sparse as cs
from compiled_sparse.config import MechanismConfig
from compiled_sparse.report import Decision
from compiled_sparse.report import Report

VOID = {"img", "input", "meta"}
GRID = (3, 7, 10)
STA = cs.STA(window_thw=(1, 3, 3), tile_thw=(2, 3, 4))
TABLE = cs.WindowTable(
    windows=((1, 1, 1), (3, 3, 3)),
    choice=[[[0, 1, 1], [0, 0, 1]], [[1, 1, 1], [0, 1, 0]]],  # two steps, two layers, three heads
)


def sparse(path: str, config: MechanismConfig = STA, **changes: Any) -> Decision:
    """Return a decision about a call that becomes sparse."""
    facts: dict[str, Any] = {
        "path": path,
        "kind": "self",
        "decision": "sparse",
        "mechanism": config.describe(),
        "config": config,
        "config_origin": "options",
        "query_shape": (1, 3, 210, 64),
        "key_shape": (1, 3, 210, 64),
        "grid_thw": GRID,
        "density": 0.25,
        "predicted_gain": 3.2,
    }
    return Decision(**{**facts, **changes})


def dense(path: str, reason: str = "cross_attention", **changes: Any) -> Decision:
    """Return a decision about a call that stays dense."""
    facts = {"kind": "cross", "query_shape": (1, 3, 210, 64), "key_shape": (1, 3, 12, 64)}
    return Decision(path=path, decision="dense", reason=reason, **{**facts, **changes})


SMALL = Report(
    (
        sparse("blocks.0.attn1", layer=0, schedule="dense at step 0"),
        dense("blocks.0.attn2", detail="queries and keys differ in length"),
        sparse("blocks.1.attn1", layer=1, density=0.5, predicted_gain=1.6),
        dense("refiner.attn", "causal", kind="self"),
    ),
    strict_problems=("1 attention calls the policy wants sparse stay dense: refiner.attn: causal",),
)


@dataclass
class Node:
    """An element: its name, its attributes and all text inside it."""

    name: str
    attributes: dict[str, str | None]
    text: str = ""
    children: list[Node] = field(default_factory=list)

    def all(self, name: str) -> list[Node]:
        """Return the elements of a name inside this one, in order."""
        found = []
        for child in self.children:
            found += [child] if child.name == name else []
            found += child.all(name)
        return found

    def by_id(self, identifier: str) -> Node:
        """Return the one element with an id."""
        (found,) = [n for n in self.everything() if n.attributes.get("id") == identifier]
        return found

    def everything(self) -> list[Node]:
        """Return this element and all inside it."""
        return [self, *(node for child in self.children for node in child.everything())]


class _Tree(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Node("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, dict(attrs))
        assert len(node.attributes) == len(attrs), f"{tag} has an attribute twice"
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].name == tag, f"</{tag}> ends <{self.open[-1].name}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for node in self.open:
            node.text += data


def parsed(page: str) -> Node:
    """Return the tree of a page; an element that is not closed in its place is an error."""
    tree = _Tree()
    tree.feed(page)
    tree.close()
    assert tree.open == [tree.root]
    return tree.root


def embedded(page: str) -> Any:
    """Return the JSON values in a page."""
    return json.loads(parsed(page).by_id("report").text)
