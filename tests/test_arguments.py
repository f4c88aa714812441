"""Arguments of wrong types: an error of this package, never a bare one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from modules import Attention
from modules import TinyDiT
from modules import assert_close

import compiled_sparse as cs
from compiled_sparse.config import Auto
from compiled_sparse.errors import AttachError
from compiled_sparse.errors import CompiledSparseError
from compiled_sparse.errors import ConfigError
from compiled_sparse.errors import ConfigFormatError
from compiled_sparse.errors import DeviceError
from compiled_sparse.errors import DtypeError
from compiled_sparse.errors import LayoutError
from compiled_sparse.errors import MetadataError
from compiled_sparse.errors import ShapeError

GRID = (4, 4, 4)
CONFIG = cs.STA(window_thw=(1, 1, 1), tile_thw=(2, 2, 2))
TABLE = cs.WindowTable(windows=((1, 1, 1), (3, 3, 3)), choice=[[[0]], [[1]]])
X = torch.zeros(1, 2, 64, 8)


def attend(config: Any = CONFIG, **changes: Any) -> Any:
    return cs.attention(X, X, X, config, **{"grid_thw": GRID, **changes})


def say(**arguments: Any) -> None:
    with cs.metadata(**arguments):
        pass


def ask(**changes: Any) -> Any:
    given = {"grid_thw": GRID, "heads": 2, "head_dim": 8, "dtype": torch.float32}
    return cs.compatible(**{**given, **changes})


WRONG: dict[str, tuple[type[CompiledSparseError], Callable[[], Any]]] = {
    "name as config": (ConfigError, lambda: attend("sta")),
    "no config": (ConfigError, lambda: attend(None)),
    "policy as config": (ConfigError, lambda: attend(cs.Policy({"*": "sta"}))),
    "text of attention": (LayoutError, lambda: attend(text=3)),
    "number as grid": (LayoutError, lambda: attend(grid_thw=64)),
    "fractions as grid": (LayoutError, lambda: attend(grid_thw=(4.0, 4.0, 4.0))),
    "grid in words": (LayoutError, lambda: say(grid_thw="4x4x4")),
    "step": (MetadataError, lambda: attend(step=-1)),
    "layer": (MetadataError, lambda: attend(layer="x")),
    "values": (ShapeError, lambda: cs.attention(X, X, X[:, :, :9], cs.Dense())),
    "number as grid of metadata": (LayoutError, lambda: say(grid_thw=5)),
    "text of metadata": (LayoutError, lambda: say(grid_thw=GRID, text=10)),
    "number as JSON": (ConfigFormatError, lambda: cs.Policy.from_json(3)),
    "bytes as JSON": (ConfigFormatError, lambda: cs.Policy.from_json(b"\xff\xfe")),
    "tokens of auto": (ConfigError, lambda: Auto(min_tokens="a")),
    "share of auto": (ConfigError, lambda: Auto(window_fraction=None)),
    "gain of auto": (ConfigError, lambda: Auto(min_gain=math.nan)),
    "calls of a guard": (ConfigError, lambda: cs.Guard(calls="2")),
    "rows of a guard": (ConfigError, lambda: cs.Guard(rows=1.5)),
    "error of a guard": (ConfigError, lambda: cs.Guard(max_relative_error=None)),
    "nan of a guard": (ConfigError, lambda: cs.Guard(max_relative_error=math.nan)),
    "attach to a name": (AttachError, lambda: cs.attach("x", "sta")),
    "attach to a function": (AttachError, lambda: cs.attach(attend, "sta")),
    "no globs": (AttachError, lambda: cs.attach(TinyDiT(), modules=[])),
    "number as globs": (AttachError, lambda: cs.attach(TinyDiT(), modules=3)),
    "numbers as globs": (AttachError, lambda: cs.attach(TinyDiT(), modules=[3])),
    "explain nothing": (ConfigError, lambda: cs.explain(None, X)),
    "grid of compatible": (LayoutError, lambda: ask(grid_thw=5)),
    "text of compatible": (LayoutError, lambda: ask(text=3)),
    "heads": (ShapeError, lambda: ask(heads="2")),
    "head size": (ShapeError, lambda: ask(head_dim=-16)),
    "dtype": (DtypeError, lambda: ask(dtype="float32")),
    "device": (DeviceError, lambda: ask(device="cud")),
}


@pytest.mark.parametrize(("error", "provoke"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_an_error_with_a_next_step(
    error: type[CompiledSparseError], provoke: Callable[[], Any]
) -> None:
    with pytest.raises(CompiledSparseError) as caught:
        provoke()
    assert type(caught.value) is error
    assert all((caught.value.got, caught.value.expected, caught.value.next_step))


def test_a_policy_file_that_is_no_text_is_refused(tmp_path: Any) -> None:
    file = tmp_path / "policy.json"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigFormatError, match="cannot be read"):
        cs.explain(Attention(), torch.zeros(1, 6, 16), policy=str(file))


@pytest.mark.parametrize(
    ("value", "error"), [("sta:window_thw=0x1x1", ConfigError), ("no.json", ConfigFormatError)]
)
def test_errors_of_the_environment_name_the_variable(
    value: str, error: type[CompiledSparseError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPILED_SPARSE_BACKEND", value)
    with pytest.raises(error, match="COMPILED_SPARSE_BACKEND is set to something") as caught:
        cs.explain(Attention(), torch.zeros(1, 6, 16))
    assert "COMPILED_SPARSE_BACKEND" in caught.value.next_step


def test_attention_is_still_traced_whole() -> None:
    torch._dynamo.reset()
    x = torch.randn(1, 2, 64, 8)

    def function(x: torch.Tensor) -> torch.Tensor:
        return cs.attention(x, x, x, CONFIG, grid_thw=GRID, text=cs.Text(), step=0, layer=0)

    compiled = torch.compile(function, backend="eager", fullgraph=True, dynamic=True)
    assert_close(compiled(x), function(x))


def test_eagerly_the_step_of_a_table_is_that_of_the_metadata() -> None:
    x, config = torch.randn(1, 2, 64, 8), cs.STA(window_thw=TABLE, tile_thw=(2, 2, 2))

    def run(**changes: Any) -> torch.Tensor:
        return cs.attention(x, x, x, config, grid_thw=GRID, **changes)

    steps = [run(step=0), run(step=1)]
    assert not torch.equal(*steps)
    assert torch.equal(run(), steps[0])
    with cs.metadata(step=1):
        assert torch.equal(run(), steps[1])
        assert torch.equal(run(step=0), steps[0])
