"""`compiled-sparse completion`: scripts that a shell can read, and that complete what there is."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from compiled_sparse.cli import main
from compiled_sparse.cli.completion import SHELLS
from compiled_sparse.presets import MODELS


def script(capsys: pytest.CaptureFixture[str], shell: str) -> str:
    assert main(["completion", shell]) == 0
    captured = capsys.readouterr()
    assert not captured.err
    return captured.out


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_knows_commands_options_and_models(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = script(capsys, shell)
    assert all(name in text for name in ("doctor", "plan", "mechanism", *MODELS))


def completed(text: str, *words: str) -> set[str]:
    """What bash offers for the last of the words."""
    listed = " ".join(f"'{word}'" for word in words)
    code = f"""{text}
    COMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}
    function=$(complete -p compiled-sparse | sed -E 's/.*-F ([^ ]+).*/\\1/')
    "$function"; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert not done.stderr
    return set(done.stdout.split())


def test_bash_completes_commands_options_and_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert shutil.which("bash")
    text = script(capsys, "bash")
    assert completed(text, "compiled-sparse", "pl") == {"plan", "plot"}
    assert completed(text, "compiled-sparse", "plan", "--mech") == {"--mechanism"}
    assert completed(text, "compiled-sparse", "plan", "--model", "coz") == set()
    models = {name for name in MODELS if name.startswith("cog")}
    assert completed(text, "compiled-sparse", "plan", "--model", "cog") == models


def test_without_the_package_the_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert "compiled_sparse[completion]" in captured.err


def test_another_shell_ends_with_status_2() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["completion", "powershell"])
    assert caught.value.code == 2
