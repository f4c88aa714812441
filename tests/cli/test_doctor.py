"""`compiled-sparse doctor`: facts without secrets, and an exit status that tells wrong results."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compiled_sparse import registry
from compiled_sparse.cli import diagnosis
from compiled_sparse.cli import machine
from compiled_sparse.cli import main
from compiled_sparse.cli.compilers import inductor_failure

ENVIRONMENT_PAGE = Path(__file__).resolve().parents[2] / "docs" / "environment.md"

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture(autouse=True)
def _no_cpp_compiler(tmp_path: Path) -> Iterator[None]:
    """Inductor fails at once instead of compiling for seconds."""
    no_compiler = {"cpp.cxx": (None, str(tmp_path / "no-compiler")), "force_disable_caches": True}
    with torch._inductor.config.patch(no_compiler):
        yield


def report(capsys: pytest.CaptureFixture[str], status: int = 0) -> dict[str, Any]:
    assert main(["doctor", "--json"]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["version"] == 1
    assert found["passed"] == (status == 0)
    return found


def test_the_report_names_versions_kernels_and_checks(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys)
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu_kernel"]["kernel"] in ("native", "portable")
    assert found["compiler"]["backend"] == "registered with Dynamo"
    names = {each.name for each in registry.mechanisms()}
    assert set(found["compiler"]["mechanisms"].split(", ")) == names
    assert len(found["checks"]) >= 2
    assert all(check["passed"] for check in found["checks"])


def test_the_text_has_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = [line for line in lines if line and not line.startswith(" ")]
    assert titles == [
        *("versions", "extras", "system", "devices", "cpu kernel", "gpu kernel", "compiler"),
        *("environment", "checks"),
    ]
    assert any(line.startswith("  sta, forward and backward, cpu  passed") for line in lines)


def test_an_inductor_that_does_not_work_is_reported_and_fails_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert report(capsys)["compiler"]["inductor"].startswith("does not work: ")


@pytest.mark.slow
def test_an_inductor_that_works_is_found() -> None:
    with torch._inductor.config.patch({"cpp.cxx": (None, "g++")}):
        assert inductor_failure() is None


def test_a_wrong_result_ends_with_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = diagnosis.attention

    def wrong(*arguments: Any, **keywords: Any) -> torch.Tensor:
        return 1.001 * right(*arguments, **keywords)

    monkeypatch.setattr(diagnosis, "attention", wrong)
    found = report(capsys, status=1)
    assert not any(check["passed"] for check in found["checks"])
    main(["doctor"])
    assert "FAILED: relative error" in capsys.readouterr().out


def test_an_unknown_kernel_is_reported_and_ends_with_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPILED_SPARSE_CPU_KERNEL", "fast")
    found = report(capsys, status=1)
    assert found["cpu_kernel"]["kernel"] == "none"
    assert "names no kernel" in found["cpu_kernel"]["why"]
    assert "UnknownKernelError" in found["checks"][0]["detail"]


def test_the_override_of_the_environment_is_shown_as_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COMPILED_SPARSE_BACKEND", "VIDEO_SPARSE_ATTN")
    assert diagnosis.compiler()["override"].startswith("* vsa:sparsity=")
    monkeypatch.setenv("COMPILED_SPARSE_BACKEND", "fastest")
    assert "set to something unknown" in diagnosis.compiler()["override"]
    monkeypatch.delenv("COMPILED_SPARSE_BACKEND")
    assert diagnosis.compiler()["override"] == "none"


def test_values_of_the_environment_are_shown_only_where_they_are_ours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPILED_SPARSE_CPU_KERNEL", "portable")
    monkeypatch.setenv("TORCH_LOGS", "a secret")
    monkeypatch.setenv("UNRELATED", "a secret")
    found = report(capsys)
    assert found["environment"]["COMPILED_SPARSE_CPU_KERNEL"] == "portable"
    assert found["environment"]["TORCH_LOGS"] == "(set)"
    assert "secret" not in json.dumps(found)
    assert found["cpu_kernel"]["why"] == "COMPILED_SPARSE_CPU_KERNEL asks for it"


def test_the_home_directory_is_not_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COMPILED_SPARSE_CPU_KERNEL", "portable")  # compiles nothing into it
    monkeypatch.setenv("COMPILED_SPARSE_TUNING", str(tmp_path / "tiles.json"))
    found = report(capsys)
    assert found["environment"]["COMPILED_SPARSE_TUNING"] == "~/tiles.json"
    assert str(tmp_path) not in json.dumps(found["environment"])
    assert machine.without_home(["x", {"a": f"{tmp_path}/b"}, 3]) == ["x", {"a": "~/b"}, 3]


def test_the_doctor_knows_the_variables_of_the_environment_page() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", ENVIRONMENT_PAGE.read_text("utf-8"), re.MULTILINE)
    assert tuple(rows) == machine.VARIABLES


def test_packages_are_listed_with_the_extras_that_bring_them() -> None:
    extras = machine.extras()
    assert "extra demo, plots" in extras["matplotlib"]
    assert "pytest" not in extras
    assert "torch" not in extras


def test_a_package_that_is_not_there_is_called_so() -> None:
    assert machine._version("no-such-package-anywhere") == "not installed"
