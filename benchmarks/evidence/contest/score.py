"""Times to target, performance profiles and scores, from the raw data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping

from benchmarks.evidence.contest.times import Times, share_of_budget
from benchmarks.evidence.records import Record, Records

RECORDS = Records("contest", ("workload", "contestant", "seed"))
SEEDS = 0, 1, 2
PLANNED = 1.45  # budgets that a contestant plans its steps for
LIMIT = 1.5  # budgets after which it has not reached the target; the rest is for clocks that differ
LARGEST_RATIO = 4.0  # up to which profiles are drawn and integrated


def steps_to_target(run: Record) -> int | None:
    """The steps of the first evaluation at the target."""
    return next((steps for steps, loss in run["losses"] if loss is not None and loss <= run["target"]), None)


def time_to_target(run: Record, times: Times) -> float:
    """As a multiple of the budget; infinite beyond the limit."""
    steps = steps_to_target(run)
    if steps is None:
        return math.inf
    time = share_of_budget(times, run["workload"], run["contestant"], steps)
    return time if time <= LIMIT else math.inf


def median_times(runs: Iterable[Record], times: Times) -> dict[str, dict[str, float]]:
    """By workload and contestant, the median over the seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        of_workload = found.setdefault(run["workload"], {})
        of_workload.setdefault(run["contestant"], []).append(time_to_target(run, times))
    return {
        workload: {name: statistics.median(each) for name, each in of_workload.items()}
        for workload, of_workload in found.items()
    }


def ratios(medians: Mapping[str, Mapping[str, float]], contestant: str) -> list[float]:
    """For each workload: the time over the fastest contestant's; infinite where it has not reached the target."""
    return [_ratio(own.get(contestant, math.inf), min(own.values())) for own in medians.values()]


def profile(found: list[float], tau: float) -> float:
    """The share of the workloads whose ratio is at most tau."""
    return sum(ratio <= tau for ratio in found) / len(found)


def score(found: list[float]) -> float:
    """The profile's integral from 1 to the largest ratio, over that interval's length."""
    return statistics.fmean(max(0.0, LARGEST_RATIO - ratio) / (LARGEST_RATIO - 1) for ratio in found)


def _ratio(time: float, fastest: float) -> float:
    return time / fastest if math.isfinite(time) else math.inf
