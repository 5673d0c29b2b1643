"""The tests of the emulated kernels can fail: each mistake of helpers/mutants.py is noticed by the check it names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.emulated import BUILD, ROOT, build, one_process_at_a_time
from tests.helpers.mutants import MUTANTS, Mutant

pytestmark = pytest.mark.slow
COPIES = ROOT / "build" / "mutants"


def write_copy(mutant: Mutant) -> None:
    """csrc/ with the mistake. Files that are right already stay, so that they are not compiled again."""
    for original in (ROOT / "csrc").rglob("*.*"):
        path = original.relative_to(ROOT / "csrc")
        text = original.read_text()
        if str(path) == mutant.file:
            assert text.count(mutant.old) == 1, f"{mutant.name}: its text occurs {text.count(mutant.old)} times"
            text = text.replace(mutant.old, mutant.new)
        copy = COPIES / mutant.name / "csrc" / path
        if not copy.exists() or copy.read_text() != text:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)


def run(directory: Path, checks: list[str]) -> subprocess.CompletedProcess[str]:
    folders = [ROOT / "tests/backends/emulated", ROOT / "tests/backends"]
    tests = [str(folder / check) for check in checks for folder in folders if (folder / check.split("::")[0]).exists()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"CURVEBALL_EMULATOR": str(directory)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built() -> None:
    """All mutants are compiled, by the first process that needs them."""
    with one_process_at_a_time(COPIES):
        for directory in COPIES.glob("*/"):
            if directory.name not in [mutant.name for mutant in MUTANTS]:
                shutil.rmtree(directory)
        for mutant in MUTANTS:
            write_copy(mutant)
        build("mutants", MUTANTS=";".join(f"{mutant.name}/{mutant.unit}" for mutant in MUTANTS))


def test_without_a_mistake_the_checks_pass() -> None:
    result = run(BUILD, sorted({mutant.check for mutant in MUTANTS}))
    assert result.returncode == 0, result.stdout


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_mistake_is_noticed(mutant: Mutant) -> None:
    result = run(COPIES / mutant.name, [mutant.check])
    # 1: a test has failed. Negative: the process was killed, by an address outside memory or one that is not aligned.
    assert result.returncode == 1 or result.returncode < 0, result.stdout + result.stderr
