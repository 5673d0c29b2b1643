"""A step in the Kronecker metric against one of AdamW, on one thread: the mean step, the median and the slowest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from benchmarks.compare import Spread, compare
from benchmarks.nets import CASES as NETS
from benchmarks.nets import Case
from benchmarks.report import Report, bar
from benchmarks.steps import adamw
from curveball_fused import CurveBall

LARGE = 10**6  # parameters: from here on the bar is that of large nets
BAR_OF_LARGE, BAR_OF_SMALL = 1.3, 1.6  # median step over AdamW's
SLOWEST_BAR = 3.0  # slowest step of a turn over the median
TURN = 100  # steps: λ is adapted once in so many, each basis refreshed five times
WARM_UP = 12  # among the first ten are more solves than later


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))


CASES = NETS | {
    "tiny": Case("MLP 8-64-64-4", tiny, lambda batch: (torch.randn(batch, 8), torch.arange(batch) % 4), 128),
    "mlp_large_batch": Case("MLP 784-256-256-10", NETS["mlp"].build, NETS["mlp"].data, 2048),
    "vit_large_batch": Case(NETS["vit"].name, NETS["vit"].build, NETS["vit"].data, 64),
}
ROUNDS = {"tiny": 7, "mlp": 5, "mlp_large_batch": 3, "resnet18": 1, "vit_large_batch": 1}


def kronecker(case: Case) -> Callable[[], Tensor]:
    model, x, y = case.make()
    optimizer = CurveBall(model.parameters(), preconditioner="kronecker")
    return lambda: optimizer.step(lambda: model(x), lambda out: F.cross_entropy(out, y))[0]


class Timed:
    """A turn of steps, each timed."""

    def __init__(self, step: Callable[[], Tensor]) -> None:
        self.step = step
        self.turns: list[list[float]] = []

    def __call__(self) -> None:
        seconds = []
        for _ in range(TURN):
            began = time.perf_counter()
            self.step()
            seconds.append(time.perf_counter() - began)
        self.turns.append(seconds)

    def medians(self) -> list[float]:
        return [statistics.median(turn) for turn in self.turns]


@pytest.mark.parametrize("name", CASES)
def test_metric_step(
    name: str, report: Report, benchmark: BenchmarkFixture, set_threads: Callable[[int], None]
) -> None:
    set_threads(1)
    case = CASES[name]
    steps = {"AdamW": adamw(case), "Kronecker": kronecker(case)}
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    turns = {method: Timed(step) for method, step in steps.items()}
    timings = compare(turns, "AdamW", ROUNDS.get(name, 2), units=TURN)
    parameters = sum(p.numel() for p in case.make()[0].parameters())
    pairs = zip(turns["Kronecker"].medians(), turns["AdamW"].medians(), strict=True)
    median = Spread.of([ours / theirs for ours, theirs in pairs])
    slowest = Spread.of([max(turn) / statistics.median(turn) for turn in turns["Kronecker"].turns])
    rows = [
        {"": f"{method}, mean step", **timing.ratio.columns("over AdamW's"), "bar": None}
        for method, timing in timings.items()
    ]
    rows += [
        {"": "Kronecker, median step", **median.columns("over AdamW's"), "bar": bar(median, _bar(parameters))},
        {"": "its slowest step over it", **slowest.columns("over AdamW's"), "bar": bar(slowest, SLOWEST_BAR)},
    ]
    milliseconds = 1e3 * statistics.median(turns["AdamW"].medians())
    note = (
        f"{parameters:,} parameters, batch {case.batch}, one thread; AdamW takes {milliseconds:.3g} ms. AdamW: fused; "
        f"zero_grad, forward, backward, step. Kronecker: defaults. In turns of {TURN} steps after {WARM_UP}, "
        f"{ROUNDS.get(name, 2)} rounds. The median step does not solve."
    )
    report.add(f"step in the Kronecker metric, {case.name}, batch {case.batch}", note, rows)
    benchmark.extra_info["comparison"] = rows
    benchmark.pedantic(steps["Kronecker"], rounds=TURN)
    assert all(step().isfinite() for step in steps.values())


def _bar(parameters: int) -> float:
    return BAR_OF_LARGE if parameters >= LARGE else BAR_OF_SMALL
