"""A whole optimizer step against a step of momentum SGD, one thread."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from compare import Spread, Timing, compare
from nets import CASES
from pytest_benchmark.fixture import BenchmarkFixture
from report import Report, bar
from steps import PLAIN, STEPS

BAR = 3.3  # for the geometric mean
INTERVAL = 5  # CurveBall looks at λ once in so many steps, so only a multiple of it has the average cost


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: of SGD and CurveBall.
        plain_rounds: of SGD and the plain formulation, which takes longest.
        steps: in a row. A turn of few milliseconds would find its caches full of the other's data.
    """

    rounds: int
    plain_rounds: int
    steps: int


EFFORTS = {
    "mlp": Effort(15, 15, 25),
    "gpt": Effort(5, 3, 1),
    "basic_bn": Effort(5, 3, 1),
    "resnet18": Effort(3, 1, 1),
}
_measured: dict[str, dict[str, Timing]] = {}


@pytest.mark.parametrize("name", CASES)
def test_step(name: str, report: Report, benchmark: BenchmarkFixture, set_threads: Callable[[int], None]) -> None:
    set_threads(1)
    case, effort = CASES[name], EFFORTS[name]
    steps = {method: make(case, None) for method, make in STEPS.items()}
    for step in steps.values():
        step()

    def repeated(step: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(effort.steps):
                step()

        return run

    calls = {method: repeated(step) for method, step in steps.items()}
    turns = INTERVAL // math.gcd(INTERVAL, effort.steps)
    plain = calls.pop(PLAIN)
    timings = compare(calls, "SGD", effort.rounds, turns, effort.steps)
    with_plain = {"SGD": calls["SGD"], PLAIN: plain}
    timings[PLAIN] = compare(with_plain, "SGD", effort.plain_rounds, turns, effort.steps)[PLAIN]
    _measured[name] = timings
    rows = [{"": method} | timing.columns() for method, timing in timings.items()]
    note = (
        f"Batch {case.batch}, 1 thread, {effort.rounds} rounds of {turns * effort.steps} steps. SGD: momentum, "
        "fused; zero_grad, forward, backward, step. CurveBall: defaults, with its looks at λ; "
        'and with curvature="linearize". Plain: the same '
        f"method by double backward, beside SGD; rounds: {effort.plain_rounds}."
    )
    report.add(f"step, {case.name}", note, rows)
    benchmark.extra_info["comparison"] = rows
    benchmark.pedantic(calls["CurveBall"], rounds=turns)
    assert all(step().isfinite() for step in steps.values())


def test_overview(report: Report) -> None:
    """Ratios of all networks and their geometric mean, if this run measured them all."""
    if set(_measured) != set(CASES):
        pytest.skip("the overview needs all networks in one run")
    methods = [method for method in STEPS if method != "SGD"]
    rows = []
    for name, timings in _measured.items():
        columns = {"": CASES[name].name}
        columns |= {method: _ratio(timings[method]) for method in methods}
        rows.append(columns | {"bar": ""})
    means = {
        method: math.exp(sum(math.log(t[method].ratio.median) for t in _measured.values()) / len(_measured))
        for method in methods
    }
    mean = {"": "geometric mean"} | {method: f"{value:.2f}" for method, value in means.items()}
    rows.append(mean | {"bar": bar(Spread.of([means["CurveBall"]]), BAR)})
    note = "Time of a step over that of momentum SGD, median (p20-p80) over rounds; 1 thread. The bar is for the mean."
    report.add("step, overview", note, rows)


def _ratio(timing: Timing) -> str:
    return f"{timing.ratio.median:.2f} ({timing.ratio.p20:.2f}-{timing.ratio.p80:.2f})"
