"""The study's table, from the results that are there: `python -m benchmarks.study.report`.

For every task: the best baseline by final training loss, and for each CurveBall setting the share of the run's steps
after which its smoothed loss is at the best baseline's smoothed loss at the end (Schedule-Free's: at the loss of its
averaged weights). Where `benchmarks.study.times` has measured steps, also the seconds until then, over those of the
baseline's whole run, and over those of the whole search that found the baseline.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.study import results
from benchmarks.study.methods import CURVEBALL
from benchmarks.study.results import Result, mean
from benchmarks.study.tasks import TASKS

EARLY = 10  # of CurveBall's steps, among which more solve
Times = dict[str, dict[str, float]]  # of a task: by method, as in times.json
Runs = dict[str, dict[int, Result]]  # by method and seed
ADAM_AND_SGD = "Adam", "SGD"
FAMILIES = *ADAM_AND_SGD, "SOAP", "Muon", "Prodigy", "Schedule-Free"
DEFAULTS = "Kronecker"
COLUMNS = (
    "task", "method", "seeds", "share of steps", "final train", "final validation", "validation error", "seconds",
    "over the baseline's", "over the search's",
)  # fmt: skip
SUMMARY_COLUMNS = (
    "method", "reached it on", "median share of steps", "geometric mean", "range", "median of seconds", "sooner on",
)  # fmt: skip


def runs_of(task: str, folder: Path) -> Runs:
    runs: Runs = defaultdict(dict)
    for result in results.read(task, folder):
        runs[result.method][result.seed] = result
    return runs


def best(runs: Runs, families: tuple[str, ...] = ()) -> str | None:
    """The baseline with the lowest final training loss with seed 0; of these families, or of all."""
    losses = {
        method: seeds[0].final_train
        for method, seeds in runs.items()
        if 0 in seeds and method not in CURVEBALL and (not families or method.startswith(families))
    }
    finite = {method: loss for method, loss in losses.items() if loss is not None}
    return min(finite, key=finite.__getitem__) if finite else None


def steps_of(runs: Runs) -> int:
    return next((result.steps for seeds in runs.values() for result in seeds.values()), 0)


def shares(runs: Runs, method: str, baseline: str) -> list[float | None]:
    """For each seed that both have: the share of steps after which the method is where the baseline ends."""
    return [
        result.share_until(runs[baseline][seed].target())
        for seed, result in sorted(runs[method].items())
        if seed in runs[baseline]
    ]


def seconds(times: Times, method: str, steps: float) -> float | None:
    """How long a method's first steps take; None where it was not timed. Its rate and schedule don't matter."""
    family = (found for name, found in times.items() if name == method or name.split()[0] == method.split()[0])
    found = times.get(method) or (next(family, None) if method not in CURVEBALL else None)
    if found is None:
        return None
    # Only CurveBall's early steps are others; those of first-order methods are slow for being the first.
    early = min(steps, EARLY) if method in CURVEBALL else 0.0
    return early * found["early"] + (steps - early) * found["later"]


def searched(runs: Runs, families: tuple[str, ...], times: Times) -> float | None:
    """Seconds of one run with each setting that the best baseline was chosen from."""
    tried = [method for method in runs if method not in CURVEBALL and (not families or method.startswith(families))]
    taken = [seconds(times, method, steps_of(runs)) for method in tried if 0 in runs[method]]
    return sum(t for t in taken if t is not None) if None not in taken else None


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def rows(task: str, runs: Runs, families: tuple[str, ...], times: Times) -> list[list[str]]:
    """The baseline's row, and one for each CurveBall setting that has run; none without a baseline."""
    baseline = best(runs, families)
    if baseline is None:
        return []
    table = []
    steps = steps_of(runs)
    whole, search = seconds(times, baseline, steps), searched(runs, families, times)
    for method in (baseline, *(method for method in CURVEBALL if method in runs)):
        own = runs[method].values()
        reached: list[float | None] = [1.0] if method == baseline else shares(runs, method, baseline)
        share = mean(reached)
        taken = seconds(times, method, share * steps) if share is not None else None
        missed = sum(share is None for share in reached)
        never = f"never in {missed} of {len(reached)}" if missed else ""
        finals = [
            mean(result.final_train for result in own),
            mean(result.final_validation for result in own),
            mean(result.final_error for result in own),
        ]
        table.append([
            task, method, str(len(own)), never or _text(share), *map(_text, finals), _text(taken),
            _text(ratio(taken, whole)), _text(ratio(taken, search)),
        ])  # fmt: skip
    return table


def summary(
    halves: tuple[str, ...], folder: Path, families: tuple[str, ...], times: dict[str, Times]
) -> list[list[str]]:
    """For each CurveBall setting: on how many tasks it reached the baseline, in what share, in what time."""
    table = []
    for method in CURVEBALL:
        found: list[float | None] = []
        ratios: list[float] = []
        for task in (name for name, task in TASKS.items() if task.half in halves):
            runs = runs_of(task, folder)
            baseline = best(runs, families)
            if baseline is None or method not in runs:
                continue
            found.append(mean(shares(runs, method, baseline)))
            own, steps = times.get(task, {}), steps_of(runs)
            if (whole := seconds(own, baseline, steps)) and seconds(own, method, steps):
                taken = None if found[-1] is None else seconds(own, method, found[-1] * steps)
                ratios.append(taken / whole if taken is not None else math.inf)
        if found:
            reached = sorted(share for share in found if share is not None)
            middle = statistics.median([share if share is not None else math.inf for share in found])
            sooner = f"{sum(r <= 1 for r in ratios)} of {len(ratios)}" if ratios else ""
            table.append([
                method, f"{len(reached)} of {len(found)}", _text(middle) if middle < math.inf else "never",
                _text(statistics.geometric_mean(reached)) if len(reached) == len(found) else "",
                f"{reached[0]:.2f} to {reached[-1]:.2f}" if reached else "",
                _text(statistics.median(ratios)) if ratios else "", sooner,
            ])  # fmt: skip
    return table


def finals(folder: Path) -> list[list[str]]:
    """For each task: the defaults' final training loss, and the best of each family of baselines with seed 0."""
    table, lower, tasks = [], dict.fromkeys(FAMILIES, 0), dict.fromkeys(FAMILIES, 0)
    for task in TASKS:
        runs = runs_of(task, folder)
        own = mean(result.final_train for result in runs[DEFAULTS].values()) if DEFAULTS in runs else None
        row = [task, _text(own)]
        for family in FAMILIES:
            found = best(runs, (family,))
            loss = runs[found][0].final_train if found else None
            settings = sum(method.startswith(family) and method not in CURVEBALL for method in runs)
            row.append(f"{_text(loss)} ({settings})" if loss is not None else "")
            if own is not None and loss is not None:
                lower[family] += own < loss
                tasks[family] += 1
        table.append(row)
    return [*table, ["lower than", "", *(f"{lower[family]} of {tasks[family]}" for family in FAMILIES)]]


def markdown(columns: tuple[str, ...], table: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in table]) + "\n"


def document(folder: Path, measured: dict[str, Any]) -> str:
    """Both halves against the best Adam or SGD and against the best of all baselines."""
    times: dict[str, Times] = measured.get("tasks", {})
    parts = [
        "# Study\n\nWritten by `python -m benchmarks.study.report`; beside this lie losses by step, one file a task, "
        "and times.json. Baselines ran with seed 0 at every setting of their grids.\n"
    ]
    if times:
        parts.append(f"Times: {measured['machine']}, torch {measured['torch']}, commit {measured['commit']}.\n")
    for half in ("chosen", "reported"):
        for title, families in (("Adam or SGD", ADAM_AND_SGD), ("of all baselines", ())):
            table = []
            for task in (name for name, task in TASKS.items() if task.half == half):
                table += rows(task, runs_of(task, folder), families, times.get(task, {}))
            parts.append(f"## Tasks {half} on, beside the best {title}\n\n" + markdown(COLUMNS, table))
            if short := summary((half,), folder, families, times):
                parts.append(markdown(SUMMARY_COLUMNS, short))
    whole = summary(("chosen", "reported"), folder, ADAM_AND_SGD, times)
    parts.append("## All tasks, beside the best Adam or SGD\n\n" + markdown(SUMMARY_COLUMNS, whole))
    parts.append(
        "## Final training losses\n\nOf the defaults, the mean of all seeds, and of each family at its best "
        "setting (of how many) with seed 0; in the last row on how many tasks the defaults' is lower.\n\n"
        + markdown(("task", DEFAULTS, *FAMILIES), finals(folder))
    )
    about = []
    for name, task in TASKS.items():
        runs = runs_of(name, folder)
        about.append([name, task.about, str(steps_of(runs)), str(sum(map(len, runs.values())))])
    parts.append("## Tasks\n\n" + markdown(("task", "", "steps", "runs"), about))
    return "\n".join(parts)


def _text(value: float | None) -> str:
    if value is None:
        return ""
    if value < 1e-3:
        return f"{value:.1e}"
    return f"{value:.2f}" if value >= 10 else f"{value:.4f}" if value < 0.1 else f"{value:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=results.FOLDER, help="of the results")
    options = parser.parse_args()
    file = options.folder / "times.json"
    text = document(options.folder, json.loads(file.read_text(encoding="utf-8")) if file.exists() else {})
    (options.folder / "study.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
