"""The tables of docs/evidence-accuracy.md, from the raw data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.evidence import accuracy, accuracy_seconds
from benchmarks.evidence.accuracy_methods import ADAM, METHODS
from benchmarks.evidence.accuracy_problems import TASKS
from benchmarks.evidence.markdown import table
from benchmarks.evidence.records import Record

DIVERGED = "diverged"


class Curve:
    """The error of a run by seconds.

    Attributes:
        seconds: at which there is an error.
        errors: infinite where the run has diverged.
    """

    def __init__(self, run: Record, seconds_per_count: float) -> None:
        self.seconds = [count * seconds_per_count for count in run["counts"]]
        self.errors = [math.inf if error is None else float(error) for error in run["errors"]]

    @property
    def final(self) -> float:
        return self.errors[-1]

    def error_after(self, seconds: float) -> float:
        """The error then; between two that are known on a line of logarithms."""
        after = next((i for i, there in enumerate(self.seconds) if there >= seconds), len(self.seconds) - 1)
        if after == 0 or self.seconds[after] <= seconds or math.isinf(self.errors[after]):
            return self.errors[after]
        x = np.log(self.seconds[after - 1 : after + 1])
        return float(np.exp(np.interp(math.log(seconds), x, np.log(self.errors[after - 1 : after + 1]))))

    def seconds_until(self, error: float) -> float | None:
        """When the error is first as low as this, by the same lines; None if never."""
        first = next((i for i, there in enumerate(self.errors) if there <= error), None)
        if first is None or first == 0 or math.isinf(self.errors[first - 1]):
            return None if first is None else self.seconds[first]
        pair = slice(first - 1, first + 1)
        falling = -np.log(self.errors[pair])
        return float(np.exp(np.interp(-math.log(error), falling, np.log(self.seconds[pair]))))


def curves(records: Sequence[Record], seconds: Sequence[Record], problem: str, method: str) -> list[Curve]:
    """Of the seeds of the method's chosen setting."""
    setting = accuracy.chosen(records, problem, method)
    wanted = problem, method, setting
    runs = [run for run in records if (run["problem"], run["method"], run["setting"]) == wanted]
    costs = {(each["problem"], each["method"]): float(each["seconds"]) for each in seconds}
    return [Curve(run, costs[problem, method]) for run in runs]


def tables() -> dict[str, str]:
    """All tables in Markdown, by the names of their markers."""
    return tables_of(accuracy.RECORDS.read(), accuracy_seconds.RECORDS.read())


def tables_of(records: Sequence[Record], seconds: Sequence[Record]) -> dict[str, str]:
    found = {(problem, method): curves(records, seconds, problem, method) for problem in TASKS for method in METHODS}
    return {
        "accuracy-end": _table(found, lambda problem, each: _spread([curve.final for curve in each])),
        "accuracy-third": _table(found, lambda problem, each: _spread(_after_third(problem, each))),
        "accuracy-until": _table(found, lambda problem, each: _until(found[problem, ADAM], each)),
        "accuracy-settings": _settings(records),
        "accuracy-costs": _costs(seconds),
    }


Curves = dict[tuple[str, str], list[Curve]]


def _table(found: Curves, cell: Callable[[str, list[Curve]], str]) -> str:
    """A row for each method; a cell is empty where it has not run."""
    rows = [
        [method, *(cell(problem, found[problem, method]) if found[problem, method] else "" for problem in TASKS)]
        for method in METHODS
    ]
    return table(["", *(task.title for task in TASKS.values())], rows)


def _after_third(problem: str, each: Sequence[Curve]) -> list[float]:
    return [curve.error_after(TASKS[problem].seconds / 3) for curve in each]


def _until(adam: Sequence[Curve], each: Sequence[Curve]) -> str:
    """The median of the seconds until Adam's median final error, and how many got there unless all have."""
    if not adam:
        return ""
    target = statistics.median(curve.final for curve in adam)
    found = [curve.seconds_until(target) for curve in each]
    there = [seconds for seconds in found if seconds is not None]
    share = "" if len(there) == len(found) else f" ({len(there)} of {len(found)})"
    return f"{statistics.median(there):.2g}{share}" if there else f"never{share}"


def _settings(records: Sequence[Record]) -> str:
    rows = [
        [method, *(accuracy.chosen(records, problem, method) or "" for problem in TASKS)]
        for method, settings in METHODS.items()
        if len(settings) > 1
    ]
    return table(["", *(task.title for task in TASKS.values())], rows)


def _costs(seconds: Sequence[Record]) -> str:
    """Milliseconds of a step, or of an evaluation of L-BFGS, and how many there are."""
    costs = {(each["problem"], each["method"]): float(each["seconds"]) for each in seconds}
    rows = [
        [
            method,
            *(
                f"{1e3 * cost:.3g} ms ({task.seconds / cost:.0f})" if (cost := costs.get((problem, method))) else ""
                for problem, task in TASKS.items()
            ),
        ]
        for method in METHODS
    ]
    return table(["", *(f"{task.title}, {task.seconds:g} s" for task in TASKS.values())], rows)


def _spread(errors: Sequence[float]) -> str:
    """The median, and the range if there are several."""
    median, *ends = (_error(value) for value in (statistics.median(errors), min(errors), max(errors)))
    return f"{median} ({'-'.join(ends)})" if len(errors) > 1 else median


def _error(value: float) -> str:
    return DIVERGED if math.isinf(value) else f"{value:.2g}"
