"""What importing the package needs and does, each in an interpreter of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import compiled_sparse as cs

OPTIONAL = ("triton", "diffusers", "rich", "matplotlib", "shtab", "transformers")

BLOCK = """
import sys
sys.modules.update(dict.fromkeys({names!r}))  # None: looks not installed
"""

ATTEND = """
import torch
import compiled_sparse as cs
q = torch.randn(1, 2, 105, 8, requires_grad=True)
config = cs.STA(window_thw=(1, 3, 3), tile_thw=(2, 3, 2))
out = cs.attention(q, q, q, config, grid_thw=(5, 7, 3))
expected = cs.reference.attention(q, q, q, config, grid_thw=(5, 7, 3))
torch.testing.assert_close(out, expected)
out.sum().backward()
assert q.grad.isfinite().all()
"""


def run(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:compiled_sparse", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_imports_and_works_without_any_optional_dependency() -> None:
    code = BLOCK.format(names=(*OPTIONAL, "numpy")) + ATTEND + "print(str(cs.explain(lambda: q)))"
    printed = run(code, COMPILED_SPARSE_CPU_KERNEL="portable")
    assert printed == "0 of 0 attention calls sparse"


def test_importing_loads_no_extra_prints_nothing_and_initialises_no_device() -> None:
    code = f"""
    import sys
    import torch
    before = set(sys.modules)
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    import compiled_sparse
    loaded = set(sys.modules) - before
    roots = {{name.split(".")[0] for name in loaded}}
    assert not roots & {{*{OPTIONAL!r}, "numpy"}}, roots
    assert not any(name.startswith("torch._inductor.compile_fx") for name in loaded)
    assert not torch.cuda.is_initialized()
    assert torch.get_num_threads() == threads
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    """
    assert run(textwrap.dedent(code)) == ""


def test_the_operator_works_without_a_compiler() -> None:
    code = f"{ATTEND}\nfrom compiled_sparse.ops import cpu; print(cpu.describe()['kernel'])"
    printed = run(code, COMPILED_SPARSE_CPU_KERNEL="portable", CXX="/nonexistent/c++")
    assert printed == "portable"


def test_dynamo_lists_the_backend_without_importing_the_package() -> None:
    code = """
    import sys
    import torch
    assert "compiled_sparse" in torch._dynamo.list_backends()
    assert "compiled_sparse" not in sys.modules
    from torch._dynamo import lookup_backend
    print(lookup_backend("compiled_sparse").__module__)
    """
    assert run(textwrap.dedent(code)) == "compiled_sparse.backend"


def test_every_public_name_exists_and_is_documented() -> None:
    for name in cs.__all__:
        assert getattr(cs, name).__doc__, name
