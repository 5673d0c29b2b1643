"""A whole optimizer step against a step of momentum SGD, one thread and two."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from benchmarks.compare import Spread, Timing, compare
from benchmarks.multiply_adds import counts
from benchmarks.nets import CASES
from benchmarks.report import Report, bar, bar_from_below, cores, threads_text
from benchmarks.steps import FORWARD, INTERVAL, PLAIN, STEPS, repeated

MEAN_BAR, BAR = 2.4, 2.8  # over SGD: for the geometric mean, and for each network
PLAIN_BAR = 2.2  # plain PyTorch over CurveBall
THREADS = [count for count in (1, 2) if count <= cores()]


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: of SGD and CurveBall, the pair that the first bars judge.
        rounds_of_all: of all alternatives; the plain formulation takes longest.
        steps: in a row. A turn of few milliseconds would find its caches full of the other's data.
    """

    rounds: int
    rounds_of_all: int
    steps: int


EFFORTS = {
    "mlp": Effort(15, 9, 25),
    "gpt": Effort(5, 3, 1),
    "vit": Effort(5, 3, 1),
    "basic_bn": Effort(5, 3, 1),
    "resnet18": Effort(3, 1, 1),
}


@dataclass(frozen=True)
class Measured:
    """What the overview shows of one network: timings over SGD, and the plain formulation over CurveBall."""

    timings: dict[str, Timing]
    plain: Spread


_measured: dict[tuple[str, int], Measured] = {}


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("name", CASES)
def test_step(name: str, threads: int, report: Report, set_threads: Callable[[int], None]) -> None:
    set_threads(threads)
    case, effort, counted = CASES[name], EFFORTS[name], counts(name)
    assert counted.methods["CurveBall"] >= counted.floor - 1e-9, "an operator is not counted: see multiply_adds.py"
    steps = {method: make(case, None) for method, make in STEPS.items()}
    for step in steps.values():
        step()

    calls = {method: repeated(step, effort.steps) for method, step in steps.items()}
    pair = {method: calls[method] for method in ("SGD", "CurveBall")}
    turns = INTERVAL // math.gcd(INTERVAL, effort.steps)
    of_all = compare(calls, "SGD", effort.rounds_of_all, turns, effort.steps)
    timings = of_all | compare(pair, "SGD", effort.rounds, turns, effort.steps)
    _measured[name, threads] = Measured(timings, of_all[PLAIN].over(of_all["CurveBall"]))
    rows = [
        {"": method, **timing.columns(), "multiply-adds": round(counted.methods[method], 2)}
        for method, timing in timings.items()
    ]
    note = (
        f"Batch {case.batch}, {threads_text(threads)}. SGD: momentum, fused; zero_grad, forward, backward, step. "
        "CurveBall: defaults, with its updates of λ. Plain: the same method by double backward. SGD and CurveBall: "
        f"{effort.rounds} rounds of {turns * effort.steps} steps; the others, beside them: {effort.rounds_of_all}. "
        "Multiply-adds: over SGD's, counted."
    )
    report.add(f"step, {case.name}, {threads_text(threads)}", note, rows)
    assert all(step().isfinite() for step in steps.values())


@pytest.mark.parametrize("threads", THREADS)
def test_overview(threads: int, report: Report) -> None:
    """Ratios of all networks and their geometric mean, if this run measured them all."""
    if not all((name, threads) in _measured for name in CASES):
        pytest.skip("the overview needs all networks in one run")
    rows = []
    for name, case in CASES.items():
        measured = _measured[name, threads]
        ratios = {method: timing.ratio for method, timing in measured.timings.items()}
        rows.append(
            {
                "": case.name,
                "CurveBall": _text(ratios["CurveBall"]),
                "floor": f"{counts(name).floor:.2f}",
                "bar": bar(ratios["CurveBall"], BAR),
                FORWARD: _text(ratios[FORWARD]),
                PLAIN: _text(ratios[PLAIN]),
                "plain / CurveBall": _text(measured.plain),
                "in multiply-adds": f"{_plain_counted(name):.2f}",
                "bar ": bar_from_below(measured.plain, PLAIN_BAR),
            }
        )
    all_measured = [_measured[name, threads] for name in CASES]

    def mean(method: str) -> float:
        return _geometric_mean([m.timings[method].ratio.median for m in all_measured])

    rows.append(
        {
            "": "geometric mean",
            "CurveBall": f"{mean('CurveBall'):.2f}",
            "floor": f"{_geometric_mean([counts(name).floor for name in CASES]):.2f}",
            "bar": bar(Spread.of([mean("CurveBall")]), MEAN_BAR),
            FORWARD: f"{mean(FORWARD):.2f}",
            PLAIN: f"{mean(PLAIN):.2f}",
            "plain / CurveBall": f"{_geometric_mean([m.plain.median for m in all_measured]):.2f}",
            "in multiply-adds": f"{_geometric_mean([_plain_counted(name) for name in CASES]):.2f}",
            "bar ": None,
        }
    )
    note = (
        f"Time of a step over that of momentum SGD, median (p20-p80) over rounds; {threads_text(threads)}. Floor: the "
        "fewest multiply-adds of an exact step, with an update of λ every fifth time, over those of SGD. Plain / "
        "CurveBall: of times, and of the multiply-adds that both do."
    )
    report.add(f"step, overview, {threads_text(threads)}", note, rows)


def _text(ratio: Spread) -> str:
    return f"{ratio.median:.2f} ({ratio.p20:.2f}-{ratio.p80:.2f})"


def _plain_counted(name: str) -> float:
    methods = counts(name).methods
    return methods[PLAIN] / methods["CurveBall"]


def _geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
