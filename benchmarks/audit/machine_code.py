"""What a compiled kernel asks of a chip, read from its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MATRIX = (
    *("HGMMA", "IGMMA", "QGMMA"),
    *("HMMA", "IMMA", "QMMA", "DMMA"),
    *("UTCHMMA", "UTCIMMA", "UTCQMMA"),
)


@dataclass(frozen=True)
class Usage:
    """Resources and instructions of one kernel.

    Args:
        registers: Per thread.
        spilled: Bytes of stack per thread on NVIDIA chips where the code uses it, spilled vector
            registers on AMD.
        shared: Bytes of shared memory per program.
        matrix: Matrix instructions in the code.
        bulk_loads: Tensor loads by the bulk copy engine (UTMALDG).
        async_copies: Copies to shared memory that no register holds (LDGSTS).
        matrix_kind: Names of the matrix instructions.
    """

    registers: int
    spilled: int
    shared: int
    matrix: int
    bulk_loads: int
    async_copies: int
    matrix_kind: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def usage(compiled: Any) -> Usage:
    """Read the machine code of what `triton.compile` returned."""
    shared = int(compiled.metadata.shared)
    if "cubin" in compiled.asm:
        return _nvidia(compiled.asm["cubin"], shared)
    return _amd(compiled.asm["amdgcn"], shared)


def _nvidia(cubin: bytes, shared: int) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    counts = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\w+)", code, re.M))
    stack = _number(r"STACK:(\d+)", resources) + _number(r"LOCAL:(\d+)", resources)
    kinds = [kind for kind in _MATRIX if counts[kind]]
    return Usage(
        registers=_number(r"REG:(\d+)", resources),
        spilled=stack if counts["STL"] + counts["LDL"] else 0,
        shared=shared,
        matrix=sum(counts[kind] for kind in kinds),
        bulk_loads=counts["UTMALDG"],
        async_copies=counts["LDGSTS"],
        matrix_kind=" ".join(kinds),
    )


def _amd(assembly: str, shared: int) -> Usage:
    matrix = re.findall(r"^\s+(v_mfma\w*)", assembly, re.M)
    return Usage(
        registers=_number(r"\.vgpr_count:\s+(\d+)", assembly),
        spilled=_number(r"\.vgpr_spill_count:\s+(\d+)", assembly),
        shared=shared,
        matrix=len(matrix),
        bulk_loads=0,
        async_copies=0,
        matrix_kind="MFMA" if matrix else "",
    )


def _tool(name: str, *arguments: str) -> str:
    command = [str(_TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern} in the tool's answer"
    return int(found[1])
