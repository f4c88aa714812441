"""The lines of docs/recipes.md, run on the random models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from builders import BUILDERS

pytestmark = pytest.mark.usefixtures("fresh_compiler")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
MODELS = {
    "Wan": "wan",
    "Wan 2.2": "wan timesteps",
    "SkyReels-V2": "skyreels v2",
    "HunyuanVideo": "hunyuan video",
    "HunyuanVideo 1.5": "hunyuan video 1.5",
    "CogVideoX": "cogvideox 5b",
    "LTX": "ltx",
    "Cosmos": "cosmos",
    "Allegro": "allegro",
    "Kandinsky 5": "kandinsky 5",
    "Flux": "flux",
    "Qwen-Image": "qwen image",
    "Mochi": "mochi",
}
DENSE = {"Mochi"}


def _recipes() -> list[tuple[str, str]]:
    """Return each block of the page with the heading above it."""
    heading, found = "", []
    text = PAGE.read_text(encoding="utf-8")
    for match in re.finditer(r"^## ([^\n]*)$|^```py\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if match[1]:
            heading = match[1]
        else:
            found.append((heading, match[2]))
    return found


def _namespace() -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    heading, source = _recipes()[0]
    assert heading == ""
    exec(source, namespace)
    return namespace


RECIPES = _recipes()[1:]


@pytest.mark.parametrize(
    ("heading", "source"),
    RECIPES,
    ids=[f"{heading} {index}" for index, (heading, _) in enumerate(RECIPES)],
)
def test_a_recipe_makes_all_attention_over_the_grid_sparse(heading: str, source: str) -> None:
    builder = BUILDERS[MODELS[heading]]
    config = harness.narrow(len(builder.grid))
    case = harness.build(builder)
    sites = harness.true_sites(harness.truths(builder), builder.grid)
    if heading in DENSE:
        sites = [None] * len(sites)
    with torch.no_grad():
        expected = harness.replay(case, sites, config)
        namespace = _namespace()
        namespace["options"] = {**namespace["options"], "policy": config, "inner": "eager"}
        namespace |= {"transformer": case.model, "inputs": case.inputs, "grid": builder.grid}
        exec(source, namespace)
        assert harness.relative_error(namespace["output"][0].flatten(), expected) < 1e-5


def test_every_recipe_has_a_model() -> None:
    assert {heading for heading, _ in RECIPES} == set(MODELS)
