"""Compiles the C++ kernels on first use and keeps the library in a cache folder."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from compiled_sparse.errors import CompiledSparseError

CACHE_DIR_VARIABLE: Final = "COMPILED_SPARSE_CACHE_DIR"

_SOURCE_DIR: Final = Path(__file__).parent / "csrc"
_MAIN_SOURCE: Final = _SOURCE_DIR / "block_sparse.cpp"
_FUNCTIONS: Final = (
    *("block_sparse_forward", "block_sparse_backward"),
    *("chunk_sparse_forward", "chunk_sparse_backward", "select_per_query"),
)
_COMPILERS: Final = ("c++", "g++", "clang++")
# No -ffast-math: masked and empty rows rely on infinities and NaN.
_FLAGS: Final = (
    "-std=c++17",
    "-O3",
    "-fopenmp",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-fPIC",
    "-shared",
)
# Some compilers for ARM know only -mcpu.
_CPU_FLAGS: Final = ("-march=native", "-mcpu=native")
_TIMEOUT_SECONDS: Final = 300
_REPORTED_LINES: Final = 12

_lock = threading.Lock()


class NativeBuildError(CompiledSparseError, RuntimeError):
    """The C++ kernels cannot be compiled or loaded on this machine."""


@dataclass(frozen=True)
class NativeLibrary:
    """The loaded kernels and where they came from.

    Attributes:
        handle: The library; its functions are declared and ready to call.
        path: The file it was loaded from.
        compiler: First line of the compiler's `--version`.
        flags: The flags it was compiled with.
        vector_bits: Width of the SIMD vectors in use.
    """

    handle: ctypes.CDLL
    path: Path
    compiler: str
    flags: tuple[str, ...]
    vector_bits: int


@dataclass(frozen=True)
class _Toolchain:
    command: tuple[str, ...]
    flags: tuple[str, ...]
    macros: str  # All the compiler predefines: its version and the features of this CPU.


def native_library() -> NativeLibrary:
    """Return the kernels, compiled on the first call on a machine and loaded once a process.

    Raises:
        NativeBuildError: if there is no working compiler or the cache folder cannot be written.
    """
    with _lock:
        return _load()


def cache_dir() -> Path:
    """Return the folder that compiled kernels are kept in."""
    if chosen := os.environ.get(CACHE_DIR_VARIABLE):
        return Path(chosen).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "compiled_sparse"


@functools.cache
def _load() -> NativeLibrary:
    toolchain = _find_toolchain()
    path = cache_dir() / f"block_sparse-{_key(toolchain)}.so"
    if not path.exists():
        _compile(toolchain, path)
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeBuildError(
            "the compiled CPU kernels cannot be loaded",
            got=str(error),
            expected=f"a library that loads at {path}",
            next_step=f"delete that file, or set {CACHE_DIR_VARIABLE} to a folder on a file "
            "system that allows execution",
        ) from error
    _declare(handle)
    return NativeLibrary(
        handle,
        path,
        _run([*toolchain.command, "--version"]).stdout.partition("\n")[0],
        toolchain.flags,
        8 * handle.block_sparse_vector_bytes(),
    )


def _declare(handle: ctypes.CDLL) -> None:
    for name in _FUNCTIONS:
        function = getattr(handle, name)
        function.argtypes = [ctypes.c_void_p]
        function.restype = ctypes.c_int32
    handle.block_sparse_vector_bytes.argtypes = []
    handle.block_sparse_vector_bytes.restype = ctypes.c_int32


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a compiler; failing to start counts as exit status 127."""
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def _find_toolchain() -> _Toolchain:
    """Return the first compiler and CPU flag that work together on an empty source."""
    chosen = os.environ.get("CXX")
    candidates = [tuple(shlex.split(chosen))] if chosen else [(name,) for name in _COMPILERS]
    failures: list[str] = []
    for command in candidates:
        if shutil.which(command[0]) is None:
            failures.append(f"{command[0]}: not found")
            continue
        for cpu_flag in _CPU_FLAGS:
            flags = (*_FLAGS, cpu_flag)
            probe = _run([*command, *flags, "-dM", "-E", "-x", "c++", os.devnull])
            if probe.returncode == 0:
                return _Toolchain(command, flags, probe.stdout)
            failures.append(f"{shlex.join(command)} {cpu_flag}: {_last_lines(probe)}")
    raise NativeBuildError(
        "no working C++ compiler for the CPU kernels",
        got="; ".join(failures),
        expected="GCC or Clang with C++17 and OpenMP, as $CXX or as one of "
        + ", ".join(_COMPILERS),
        next_step="install one (Debian: apt install g++) or point CXX at one",
    )


def _key(toolchain: _Toolchain) -> str:
    digest = hashlib.sha256()
    for source in sorted(_SOURCE_DIR.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    digest.update("\0".join((*toolchain.command, *toolchain.flags, toolchain.macros)).encode())
    return digest.hexdigest()[:20]


def _compile(toolchain: _Toolchain, path: Path) -> None:
    """Compile to `path`; the rename makes it appear whole, whoever else is compiling."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            command = [*toolchain.command, *toolchain.flags, str(_MAIN_SOURCE), "-o", str(built)]
            result = _run(command)
            if result.returncode != 0:
                raise NativeBuildError(
                    "the CPU kernels do not compile",
                    got=f"{shlex.join(command)} ended with status {result.returncode}: "
                    + _last_lines(result),
                    expected="GCC or Clang with C++17, OpenMP and vector extensions",
                    next_step="point CXX at another compiler",
                )
            built.replace(path)
    except OSError as error:
        raise NativeBuildError(
            "the folder for compiled CPU kernels cannot be written",
            got=str(error),
            expected=f"a writable folder {path.parent}",
            next_step=f"set {CACHE_DIR_VARIABLE} to a writable folder",
        ) from error


def _last_lines(result: subprocess.CompletedProcess[str]) -> str:
    lines = (result.stderr or result.stdout).strip().splitlines()
    return "\n".join(lines[-_REPORTED_LINES:]) or f"exit status {result.returncode}"
