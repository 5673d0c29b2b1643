"""A batch in four parts against the whole at once: the time of a step, and the memory that it takes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from benchmarks.compare import compare
from benchmarks.nets import CASES
from benchmarks.parts import METHODS
from benchmarks.report import Report
from benchmarks.steps import repeated

PARTS = 4
ROUNDS = {"mlp": 5}
UNITS = 20  # steps: a solve in the metric, four looks at λ without


@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_parts(name: str, report: Report, set_threads: Callable[[int], None]) -> None:
    set_threads(1)
    case, rows = CASES[name], []
    for method, make in METHODS.items():
        steps = {f"{parts}": repeated(make(case, parts), UNITS) for parts in (1, PARTS)}
        for step in steps.values():
            step()
        timing = compare(steps, "1", ROUNDS.get(name, 2), units=UNITS)
        memory = [_peak(name, method, parts) for parts in (0, 1, PARTS)]
        rows.append(
            {
                "": method,
                "whole, ms": timing["1"].columns()["ms"],
                f"{PARTS} parts, ms": timing[f"{PARTS}"].columns()["ms"],
                **timing[f"{PARTS}"].ratio.columns("ratio"),
                "whole, MiB": memory[1] - memory[0],
                f"{PARTS} parts, MiB": memory[2] - memory[0],
            }
        )
    note = (
        f"{case.batch} samples, at once or in {PARTS} parts of equal size, one thread; the mean of {UNITS} steps. MiB: "
        "the peak of a process that takes three steps, less that of one that takes none."
    )
    report.add(f"a batch in parts, {case.name}", note, rows)


def _peak(name: str, method: str, parts: int) -> float:
    command = [sys.executable, "-m", "benchmarks.parts", name, method, str(parts)]
    return float(subprocess.check_output(command, text=True))
