"""Functions named on the command line are found, and their failures are told in a line."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from compiled_sparse.cli.entry import EntryError
from compiled_sparse.cli.entry import load_entry
from compiled_sparse.cli.entry import load_model
from compiled_sparse.errors import ConfigError

pytestmark = pytest.mark.usefixtures("loaded_entries")


def write(path: Path, source: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source), encoding="utf-8")
    return path


def test_a_function_of_a_file_is_called_and_may_import_the_modules_beside_it(
    tmp_path: Path,
) -> None:
    write(tmp_path / "beside_entry.py", "VALUE = 7")
    source = """
    def build():
        from beside_entry import VALUE
        return VALUE
    """
    assert load_entry(f"{write(tmp_path / 'model.py', source)}:build")() == 7


def test_a_function_of_a_module_in_the_working_directory_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "packed_entry" / "models.py", "def small():\n    return 'small'")
    monkeypatch.chdir(tmp_path)
    assert load_entry("packed_entry.models:small")() == "small"


def test_a_class_of_a_file_sees_its_module(tmp_path: Path) -> None:
    source = """
    from __future__ import annotations
    from dataclasses import dataclass, field
    @dataclass
    class Build:
        sizes: list[int] = field(default_factory=list)
    """
    built = load_entry(f"{write(tmp_path / 'model.py', source)}:Build")()
    assert built.sizes == []
    assert type(built).__module__ in sys.modules


@pytest.mark.parametrize(
    ("source", "problem", "got"),
    [
        ("def build(:", "cannot be loaded", "SyntaxError: invalid syntax"),
        ("import nowhere_at_all", "cannot be loaded", "No module named 'nowhere_at_all'"),
        ("raise SystemExit('over')", "cannot be loaded", "SystemExit: over"),
        ("build = 3", "has no function build", "int"),
        ("", "has no function build", "no such name"),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error(
    source: str, problem: str, got: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "model.py", source)
    with pytest.raises(EntryError) as caught:
        load_entry(f"{path}:build")
    assert problem in caught.value.problem
    assert got in caught.value.got
    if "cannot" in problem:
        assert caught.value.got.endswith(f"({path}:1)")


def test_a_module_that_misses_another_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "lacking_entry.py", "import nowhere_at_all")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EntryError, match="lacking_entry cannot be loaded") as caught:
        load_entry("lacking_entry:build")
    assert "No module named 'nowhere_at_all'" in caught.value.got
    with pytest.raises(EntryError, match="there is no such module"):
        load_entry("lacking_entry_.models:build")


def test_a_function_that_raises_is_told_with_its_own_line(tmp_path: Path) -> None:
    source = """
    import json
    def build():
        return json.loads("first line\\n second")
    """
    path = write(tmp_path / "model.py", source)
    with pytest.raises(EntryError) as caught:
        load_entry(f"{path}:build")()
    assert caught.value.problem == f"{path}:build failed"
    assert caught.value.got.startswith("JSONDecodeError: Expecting value")
    assert caught.value.got.endswith(f"({path}:4)")  # not a line of json
    assert "\n" not in caught.value.got


def test_a_long_message_is_cut(tmp_path: Path) -> None:
    source = "def build():\n    raise ValueError('word ' * 1000)"
    with pytest.raises(EntryError) as caught:
        load_entry(f"{write(tmp_path / 'model.py', source)}:build")()
    assert len(caught.value.got) < 500


def test_errors_of_the_package_come_as_they_are(tmp_path: Path) -> None:
    source = "import compiled_sparse as cs\ndef build():\n    return cs.VSA(sparsity=2)"
    with pytest.raises(ConfigError, match="sparsity"):
        load_entry(f"{write(tmp_path / 'model.py', source)}:build")()


@pytest.mark.parametrize(
    ("returned", "args", "kwargs"),
    [
        ("(abs, {'x': 1})", (), {"x": 1}),
        ("(abs, (1, 2), {})", (1, 2), {}),
        ("[abs, [1], {'x': 2}]", (1,), {"x": 2}),
    ],
)
def test_a_model_comes_with_its_inputs(
    returned: str, args: tuple[int, ...], kwargs: dict[str, int], tmp_path: Path
) -> None:
    path = write(tmp_path / "model.py", f"def build():\n    return {returned}")
    call = load_model(f"{path}:build")
    assert (call.model, call.args, call.kwargs) == (abs, args, kwargs)


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        ("None", "NoneType"),
        ("(abs, 3)", "(builtin_function_or_method, int)"),
        ("(3, {})", "(int, dict)"),
        ("(abs, {1: 2})", "(builtin_function_or_method, dict)"),
        ("(abs, 'xy', {})", "(builtin_function_or_method, str, dict)"),
    ],
)
def test_anything_else_is_named_by_its_types(returned: str, got: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.py", f"def build():\n    return {returned}")
    with pytest.raises(EntryError, match="no model with its inputs") as caught:
        load_model(f"{path}:build")
    assert caught.value.got == got
