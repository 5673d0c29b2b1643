"""Timing of alternatives against each other on a machine that others use too.

Absolute times there mean little, so alternatives take turns (A B C, A B C, ...), and each round yields ratios
between neighbors in time. Medians and the 20th and 80th percentiles over the rounds say how far to trust them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median and 20th and 80th percentiles of one quantity over the rounds."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        quintiles = statistics.quantiles(values, n=5, method="inclusive")
        return cls(statistics.median(values), quintiles[0], quintiles[3])

    def columns(self, name: str, digits: int = 3) -> dict[str, float]:
        """As three columns of a table."""
        named = {name: self.median, f"{name} p20": self.p20, f"{name} p80": self.p80}
        return {key: float(f"{value:.{digits}g}") for key, value in named.items()}


@dataclass(frozen=True)
class Timing:
    """Seconds per unit of work of one alternative in each round, and their ratio to the baseline's."""

    rounds: list[float]
    ratio: Spread

    def columns(self) -> dict[str, float]:
        """As columns of a table."""
        return Spread.of([1e3 * seconds for seconds in self.rounds]).columns("ms") | self.ratio.columns("ratio")

    def over(self, other: Timing) -> Spread:
        """Ratio to another alternative that was timed in the same rounds."""
        return Spread.of([a / b for a, b in zip(self.rounds, other.rounds, strict=True)])


def compare(
    calls: Mapping[str, Callable[[], object]],
    baseline: str,
    rounds: int,
    turns: int = 1,
    units: int | Mapping[str, int] = 1,
) -> dict[str, Timing]:
    """Times `calls` in turn; they should have run before, so that nothing is slow for being the first.

    Args:
        calls: alternatives by name.
        baseline: the name that ratios refer to.
        rounds: how many values the percentiles are taken over.
        turns: calls of each alternative in a round, whose times are added.
        units: of work that a call does, if need be by name.

    Returns:
        A timing for each name, in the order of `calls`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    units_of = units if isinstance(units, Mapping) else dict.fromkeys(calls, units)
    for _ in range(rounds):
        spent = dict.fromkeys(calls, 0.0)
        for _ in range(turns):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                spent[name] += time.perf_counter() - start
        for name, total in spent.items():
            seconds[name].append(total / (turns * units_of[name]))
    return {
        name: Timing(own, Spread.of([a / b for a, b in zip(own, seconds[baseline], strict=True)]))
        for name, own in seconds.items()
    }
