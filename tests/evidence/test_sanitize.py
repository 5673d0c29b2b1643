"""The sanitizers of tools/sanitize.py find mistakes that are planted, and nothing where there is none."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "sanitize.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sanitize", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("g++") is None, reason="needs GCC on Linux")
@pytest.mark.parametrize("kind", ["address", "thread"])
def test_planted_mistakes_are_found(kind: str, tool: ModuleType, tmp_path: Path) -> None:
    """In a library of these alone, which is quickly compiled; the tool itself looks for them in the whole one."""
    library = tmp_path / "library.so"
    tool.build(tool.SANITIZERS[kind], [], library)
    assert tool.finds_planted(tool.SANITIZERS[kind], library)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("g++") is None, reason="needs GCC on Linux")
def test_without_a_sanitizer_they_are_not_found(tool: ModuleType, tmp_path: Path) -> None:
    blind = tool.Sanitizer(flags=(), library="libasan.so", options={}, finds={"overflow": "overflow"}, threads=1)
    tool.build(blind, [], tmp_path / "library.so")
    assert not tool.finds_planted(blind, tmp_path / "library.so")
