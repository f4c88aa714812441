"""Facts about the machine and the installation, for reports that are pasted into a bug."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

DISTRIBUTION = "compiled-sparse"
OWN_PREFIX = "COMPILED_SPARSE_"
VARIABLES = (
    "COMPILED_SPARSE_BACKEND",
    "COMPILED_SPARSE_CPU_KERNEL",
    "COMPILED_SPARSE_CACHE_DIR",
    "COMPILED_SPARSE_CHECK_LISTS",
    "COMPILED_SPARSE_GPU_BOXES",
    "COMPILED_SPARSE_HANDSHAKE_TIMEOUT",
    "COMPILED_SPARSE_TUNING",
    "TRITON_INTERPRET",
    "CXX",
    "TORCH_LOGS",
)
"""Environment variables that are read, those of docs/environment.md."""

_FOR_DEVELOPERS = ("docs", "test", "dev")
_REQUIREMENT = re.compile(r"""^([\w.-]+).*?(?:extra == ["']([\w-]+)["'].*)?$""")


def versions() -> dict[str, str]:
    """Return the versions of what is always needed."""
    packages = (DISTRIBUTION, "torch", "triton", "einops")
    return {"python": platform.python_version(), **{each: _version(each) for each in packages}}


def extras() -> dict[str, str]:
    """Return version and extras of the optional packages, by name."""
    wanted: dict[str, list[str]] = {}
    for requirement in metadata.requires(DISTRIBUTION) or ():
        found = _REQUIREMENT.match(requirement)
        assert found is not None
        name, extra = found.groups()
        if extra and extra not in _FOR_DEVELOPERS and name != DISTRIBUTION:
            wanted.setdefault(name, []).append(extra)
    return {name: f"{_version(name)} (extra {', '.join(names)})" for name, names in wanted.items()}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def system() -> dict[str, Any]:
    """Return operating system and processor."""
    return {
        "platform": platform.platform(),
        "processor": processor_name(),
        "vector_extensions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def processor_name() -> str:
    """Return the processor's name, as exactly as it is known."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def devices() -> dict[str, str]:
    """Return name, capability and memory of every GPU; this initialises them."""
    if not torch.cuda.is_available():
        return {"gpu": "none that this torch can use"}
    toolkit = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return {f"gpu {index}": _device(index, toolkit) for index in range(torch.cuda.device_count())}


def _device(index: int, toolkit: str) -> str:
    facts = torch.cuda.get_device_properties(index)
    memory = facts.total_memory / 2**30
    return f"{facts.name}, capability {facts.major}.{facts.minor}, {memory:.1f} GiB, {toolkit}"


def environment() -> dict[str, str]:
    """Return the environment variables that are set; values of this package's own alone."""
    present = [name for name in VARIABLES if name in os.environ]
    return {name: os.environ[name] if name.startswith(OWN_PREFIX) else "(set)" for name in present}


def without_home(value: Any) -> Any:
    """Return JSON values with the home directory written as `~`."""
    if isinstance(value, dict):
        return {name: without_home(each) for name, each in value.items()}
    if isinstance(value, list):
        return [without_home(each) for each in value]
    home = str(Path.home())
    is_root = home == Path(home).anchor
    return value.replace(home, "~") if isinstance(value, str) and not is_root else value
