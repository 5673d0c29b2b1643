"""The Triton kernels compiled for every architecture that is supported, without a GPU: gates on the machine code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
TOOL = Path(__file__).parents[3] / "tools" / "triton_cross_compile.py"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_machine_code(architecture: int, tmp_path: Path) -> None:
    """In a process of its own, since here the interpreter may stand in for the compiler; prints its table."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    check = [sys.executable, "-c", "import triton_cross_compile as t; print(t.sass.missing_tools())"]
    environment["PYTHONPATH"] = os.pathsep.join([str(TOOL.parent), environment.get("PYTHONPATH", "")])
    missing = subprocess.run(check, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    if missing:
        pytest.skip(missing)
    run = subprocess.run(
        [sys.executable, str(TOOL), str(architecture)], env=environment, capture_output=True, text=True
    )
    print(run.stdout)
    assert run.returncode == 0, run.stderr
