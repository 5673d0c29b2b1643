"""Peak memory of CurveBall against that of momentum SGD, and of all optimizers, each run in a process of its own."""

from __future__ import annotations

import pytest

from benchmarks.compare import Spread
from benchmarks.memory_worker import peaks
from benchmarks.nets import CASES
from benchmarks.optimizers import installed
from benchmarks.report import Report, bar
from benchmarks.steps import FORWARD, PLAIN

BATCH, STEP_COUNT = 64, 2  # in the second step all state is there
BARS = {"resnet18": 1.15, "basic_bn": 1.15, "gpt": 1.25, "vit": 1.25}
STEPS_OF = {"SOAP": 11}  # whose bases are renewed in the tenth
RUNS = {"SGD": 3, "CurveBall": 3, FORWARD: 1, PLAIN: 1}


@pytest.mark.parametrize("name", BARS)
def test_memory(name: str, report: Report) -> None:
    found: dict[str, list[float]] = {method: [] for method in RUNS}
    own: dict[str, list[float]] = {method: [] for method in RUNS}
    for i in range(max(RUNS.values())):
        for method, runs in RUNS.items():
            if i < runs:
                imports, peak = peaks(name, method, BATCH, STEP_COUNT)
                found[method].append(peak)
                own[method].append(peak - imports)
    sgd, own_of_sgd = Spread.of(found["SGD"]).median, Spread.of(own["SGD"]).median
    rows = []
    for method, values in found.items():
        ratio, net = _over(values, sgd), _over(own[method], own_of_sgd)
        row = {"": method, "runs": len(values)} | Spread.of(values).columns("MiB", 4) | ratio.columns("ratio")
        row["ratio less imports"] = net.median
        rows.append(row | {"bar": bar(ratio, BARS[name]) if method == "CurveBall" else None})
    note = (
        f"Peak resident memory of a process that makes {STEP_COUNT} steps, batch {BATCH}. The bar holds for whole "
        "processes; the ratio less imports leaves out what a process has that has made a step of a tiny net."
    )
    report.add(f"memory, {CASES[name].name}", note, rows)


def _over(values: list[float], baseline: float) -> Spread:
    return Spread.of([value / baseline for value in values])


@pytest.mark.parametrize("name", CASES)
def test_memory_of_optimizers(name: str, report: Report) -> None:
    case, rows = CASES[name], []
    for method in installed(case):
        imports, peak = peaks(name, method, case.batch, STEPS_OF.get(method, STEP_COUNT))
        rows.append({"": method, "MiB": round(peak - imports, 1)})
    note = (
        f"Peak resident memory of a process that makes {STEP_COUNT} steps ({STEPS_OF['SOAP']} of SOAP), batch "
        f"{case.batch}, less what it had when a step of a tiny net had imported everything."
    )
    report.add(f"memory of optimizers, {case.name}", note, rows)
