"""The fast tests can fail: each mistake of helpers/python_mutants/ is noticed by the test that it names."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.python_mutants import MUTANTS, PythonMutant

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
Run = subprocess.CompletedProcess[str]


def package_copied(folder: Path, mutant: PythonMutant | None) -> Path:
    """Write the package to `folder`, with its libraries and with the mistake."""
    package = folder / "curveball_fused"
    shutil.copytree(ROOT / "curveball_fused", package, ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is not None:
        text = (package / mutant.file).read_text(encoding="utf-8")
        assert text.count(mutant.old) == 1, f"{mutant.name}: its text occurs {text.count(mutant.old)} times"
        (package / mutant.file).write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    return folder


def run(folder: Path, mutants: list[PythonMutant]) -> Run:
    """Run the mutants' checks against the package in `folder`."""
    files = sorted({f"tests/{mutant.check.split('::')[0]}" for mutant in mutants})
    chosen = " or ".join(f"({mutant.check.split('::')[-1].split('/')[-1]} and ({mutant.only}))" for mutant in mutants)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-o", f"pythonpath={folder} ."]
    command += ["-m", "not slow", "-k", chosen, *files]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_without_a_mistake_the_checks_pass(tmp_path: Path) -> None:
    result = run(package_copied(tmp_path, None), MUTANTS)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_mistake_is_noticed(mutant: PythonMutant, tmp_path: Path) -> None:
    result = run(package_copied(tmp_path, mutant), [mutant])
    assert result.returncode == 1, result.stdout + result.stderr  # a test has failed; an error in importing gives 2
