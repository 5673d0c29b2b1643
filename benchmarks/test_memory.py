"""Peak memory of CurveBall against that of momentum SGD, each run in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.compare import Spread
from benchmarks.nets import CASES
from benchmarks.report import Report, bar
from benchmarks.steps import FORWARD, PLAIN

BATCH, STEP_COUNT = 64, 2  # in the second step all state is there
BARS = {"resnet18": 1.15, "basic_bn": 1.15, "gpt": 1.25, "vit": 1.25}
RUNS = {"SGD": 3, "CurveBall": 3, FORWARD: 1, PLAIN: 1}


@pytest.mark.parametrize("name", BARS)
def test_memory(name: str, report: Report) -> None:
    imports = _peak(name, "SGD", 0)
    peaks: dict[str, list[float]] = {method: [] for method in RUNS}
    for i in range(max(RUNS.values())):
        for method, runs in RUNS.items():
            if i < runs:
                peaks[method].append(_peak(name, method, STEP_COUNT))
    sgd = Spread.of(peaks["SGD"]).median
    rows = []
    for method, values in peaks.items():
        ratio, net = _over(values, sgd), _over([v - imports for v in values], sgd - imports)
        row = {"": method, "runs": len(values)} | Spread.of(values).columns("MiB", 4) | ratio.columns("ratio")
        row["ratio less imports"] = net.median
        rows.append(row | {"bar": bar(ratio, BARS[name]) if method == "CurveBall" else None})
    note = (
        f"Peak resident memory of a process that makes {STEP_COUNT} steps, batch {BATCH}. The bar holds for whole "
        f"processes; the ratio less imports leaves out the {imports:.0f} MiB that Python and torch alone take."
    )
    report.add(f"memory, {CASES[name].name}", note, rows)


def _over(values: list[float], baseline: float) -> Spread:
    return Spread.of([value / baseline for value in values])


def _peak(name: str, method: str, steps: int) -> float:
    """MiB of one run."""
    command = [sys.executable, "-m", "benchmarks.memory_worker", name, method, str(BATCH), str(steps)]
    return float(subprocess.check_output(command, text=True))
