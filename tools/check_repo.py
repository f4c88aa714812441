"""Checks on the tree that no general tool knows about.

``examples``: every file in ``examples/`` has a ``main()`` and runs it as a script.
``devices``: no test or example hard-codes a ``"cuda"`` device.
``imports``: modules of the package import only from their own layer or below.

    python tools/check_repo.py [examples] [devices] [imports]

Without a name all checks run. Exits with 1 if any of them found something.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "compiled_sparse"


@dataclass(frozen=True)
class Finding:
    """One broken rule: where, what is wrong, and what to do next."""

    path: Path
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.message}"


def parsed_files(folder: str) -> Iterator[tuple[Path, ast.Module]]:
    """Yields every Python file under a folder of the repository, with its syntax tree."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def check_examples() -> Iterator[Finding]:
    """Finds examples that cannot be imported without running, or run without importing."""
    for path, tree in parsed_files("examples"):
        if path.name.startswith("_"):
            continue
        if not any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            yield Finding(
                path, 1, "no main(). Next: put the example's work into `def main() -> None:`"
            )
        elif not any(_is_script_guard(node) for node in tree.body):
            yield Finding(path, 1, 'main() never runs. Next: end with `if __name__ == "__main__":`')


def _is_script_guard(node: ast.stmt) -> bool:
    """Tells whether a statement is ``if __name__ == "__main__":`` around a call of ``main``."""
    if not (isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"):
        return False
    names = (call.func for call in ast.walk(node) if isinstance(call, ast.Call))
    return any(isinstance(name, ast.Name) and name.id == "main" for name in names)


DEVICE_LITERAL = re.compile(r"cuda(:\d+)?")
DEVICE_WAIVER = "# device:"


def check_devices() -> Iterator[Finding]:
    """Finds tests and examples that name a GPU although none may be there.

    Left alone are a choice (``"cuda" if torch.cuda.is_available() else "cpu"``), a comparison
    (``device.type == "cuda"``), Triton's ``GPUTarget("cuda", 90, 32)``, which names a compiler
    target and needs no GPU, and a line that gives its reason after ``# device:``.
    """
    for folder in ("tests", "examples"):
        for path, tree in parsed_files(folder):
            lines = path.read_text(encoding="utf-8").splitlines()
            finder = _DeviceFinder()
            finder.visit(tree)
            for line, code in finder.found:
                if DEVICE_WAIVER not in lines[line - 1]:
                    yield Finding(
                        path,
                        line,
                        f"hard-coded device {code}. Next: take the device from a fixture, a choice "
                        f"on is_available(), or say why with `{DEVICE_WAIVER} ...` on the line",
                    )


class _DeviceFinder(ast.NodeVisitor):
    """Collects (line, code) of device literals and ``.cuda()`` calls outside the allowed places."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str]] = []

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and DEVICE_LITERAL.fullmatch(node.value):
            self.found.append((node.lineno, repr(node.value)))

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func).rpartition(".")[2]
        if name == "GPUTarget":
            return
        if name == "cuda" and isinstance(node.func, ast.Attribute):
            self.found.append((node.lineno, ".cuda()"))
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        """A comparison asks which device it is; it does not choose one."""

    def visit_IfExp(self, node: ast.IfExp) -> None:
        if "is_available" not in ast.unparse(node.test):
            self.generic_visit(node)


_ABOVE_OPS = ("mechanisms", "passes", "selector", "attach", "backend", "cli")
_NOT_FOR_LEAVES = ("ops", "kernels", "reference", *_ABOVE_OPS)

# Module or folder of the package -> what it must not import. "Layout of the tree" in
# CONTRIBUTING.md is the same table in words.
BANNED_IMPORTS: dict[str, tuple[str, ...]] = {
    "chips": _NOT_FOR_LEAVES,
    "config": _NOT_FOR_LEAVES,
    "environment": _NOT_FOR_LEAVES,
    "errors": _NOT_FOR_LEAVES,
    "force": _NOT_FOR_LEAVES,
    "geometry": _NOT_FOR_LEAVES,
    "guard": _NOT_FOR_LEAVES,
    "layout": _NOT_FOR_LEAVES,
    "metadata": _NOT_FOR_LEAVES,
    "pattern": _NOT_FOR_LEAVES,
    "policy": _NOT_FOR_LEAVES,
    "presets": _NOT_FOR_LEAVES,
    "quality": _NOT_FOR_LEAVES,
    "synthetic": _NOT_FOR_LEAVES,
    "windows": _NOT_FOR_LEAVES,
    "registry": _NOT_FOR_LEAVES,
    "reference": ("ops", "kernels", *_ABOVE_OPS),
    "kernels": ("ops", "reference", *_ABOVE_OPS),
    "ops": _ABOVE_OPS,
    "mechanisms": ("passes", "selector", "attach", "backend", "cli"),
    "sharding": _NOT_FOR_LEAVES,
    "distributed": ("passes", "selector", "attach", "backend", "calibration", "cli"),
    "block_lists": ("plots", "passes", "selector", "attach", "backend", "cli"),
    "plots": ("passes", "selector", "attach", "backend", "cli"),
    "report_page": ("passes", "selector", "attach", "backend", "cli"),
    "passes": ("backend", "cli"),
    "selector": ("backend", "cli"),
    "strict": ("backend", "cli"),
    "attach": ("backend", "cli"),
    "backend": ("calibration", "cli"),
    "calibration": ("cli",),
}


def check_imports() -> Iterator[Finding]:
    """Finds imports that point upwards in the package, wherever in a file they stand."""
    for path, tree in parsed_files(PACKAGE):
        parts = path.relative_to(ROOT).with_suffix("").parts
        banned = BANNED_IMPORTS.get(parts[1], ())
        for node in ast.walk(tree):
            for name in _imported_modules(node, parts):
                target = name.split(".")
                if target[0] == PACKAGE and len(target) > 1 and target[1] in banned:
                    yield Finding(
                        path,
                        getattr(node, "lineno", 1),
                        f"{parts[1]} must not import {target[1]} (CONTRIBUTING.md, Layout of the "
                        "tree). Next: take the value as an argument, or move what is shared down",
                    )


def _imported_modules(node: ast.AST, parts: tuple[str, ...]) -> Iterator[str]:
    """Yields the full dotted names that an import statement in the file ``parts`` may load."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = ".".join(parts[: -node.level]) if node.level else ""
        module = ".".join(filter(None, (base, node.module)))
        yield from (f"{module}.{alias.name}" for alias in node.names)


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "examples": check_examples,
    "devices": check_devices,
    "imports": check_imports,
}


def main() -> int:
    """Runs the named checks and prints what they find; returns the exit status."""
    parser = argparse.ArgumentParser(description="Checks the rules of this repository.")
    parser.add_argument("checks", nargs="*", metavar="check", help=", ".join(CHECKS))
    names = parser.parse_args().checks or list(CHECKS)
    if unknown := sorted(set(names) - set(CHECKS)):
        parser.error(f"unknown check {', '.join(unknown)}; known are {', '.join(CHECKS)}")
    findings = [finding for name in names for finding in CHECKS[name]()]
    for finding in findings:
        print(finding)
    print(f"{', '.join(names)}: {len(findings) or 'nothing'} found")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
