"""The study's table, from the results that are there: `python -m benchmarks.study.report`.

For every task: the best baseline by final training loss, and for each CurveBall setting the share of the run's steps
after which its smoothed loss is at the best baseline's smoothed loss at the end (Schedule-Free's: at the loss of its
averaged weights). With `--times FILE`, a JSON object {task: {method: seconds of a step}}, also the seconds until then,
and their ratio to those of the baseline's whole run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

from benchmarks.study import results
from benchmarks.study.methods import CURVEBALL
from benchmarks.study.results import Result, mean
from benchmarks.study.tasks import TASKS

Times = dict[str, dict[str, float]]
Runs = dict[str, dict[int, Result]]  # by method and seed
ADAM_AND_SGD = "Adam", "SGD"
COLUMNS = (
    "task", "method", "seeds", "share of steps", "final train", "final validation", "validation error", "seconds",
    "seconds / baseline's",
)  # fmt: skip


def runs_of(task: str, folder: Path) -> Runs:
    runs: Runs = defaultdict(dict)
    for result in results.read(task, folder):
        runs[result.method][result.seed] = result
    return runs


def best(runs: Runs, families: tuple[str, ...] = ()) -> str | None:
    """The baseline with the lowest final training loss; of these families, or of all."""
    losses = {
        method: mean(result.final_train for result in seeds.values())
        for method, seeds in runs.items()
        if method not in CURVEBALL and (not families or method.startswith(families))
    }
    finite = {method: loss for method, loss in losses.items() if loss is not None}
    return min(finite, key=finite.__getitem__) if finite else None


def shares(runs: Runs, method: str, baseline: str) -> list[float | None]:
    """For each seed that both have: the share of steps after which the method is where the baseline ends."""
    return [
        result.share_until(runs[baseline][seed].target())
        for seed, result in sorted(runs[method].items())
        if seed in runs[baseline]
    ]


def rows(task: str, runs: Runs, baseline: str, times: dict[str, float]) -> list[list[str]]:
    """The baseline's row, and one for each CurveBall setting that has run."""
    table = []
    whole = times.get(baseline, 0.0) * TASKS[task].steps
    for method in (baseline, *(method for method in CURVEBALL if method in runs)):
        own = runs[method].values()
        reached: list[float | None] = [1.0] if method == baseline else shares(runs, method, baseline)
        share = mean(reached)
        seconds = share * TASKS[task].steps * times[method] if share is not None and method in times else None
        missed = sum(share is None for share in reached)
        never = f"never in {missed} of {len(reached)}" if missed else ""
        finals = [
            mean(result.final_train for result in own),
            mean(result.final_validation for result in own),
            mean(result.final_error for result in own),
        ]
        table.append([
            task, method, str(len(own)), never or _text(share), *map(_text, finals), _text(seconds),
            _text(seconds / whole if seconds is not None and whole else None),
        ])  # fmt: skip
    return table


def summary(half: str, folder: Path, families: tuple[str, ...], times: Times) -> list[list[str]]:
    """For each CurveBall setting: on how many tasks of a half it reached the baseline, and the median share."""
    table = []
    for method in CURVEBALL:
        found: list[float | None] = []
        ratios: list[float] = []
        for task in (name for name, task in TASKS.items() if task.half == half):
            runs = runs_of(task, folder)
            baseline = best(runs, families)
            if baseline is None or method not in runs:
                continue
            found.append(mean(shares(runs, method, baseline)))
            own, others = (times.get(task, {}).get(name) for name in (method, baseline))
            if found[-1] is not None and own and others:
                ratios.append(found[-1] * own / others)
        if found:
            reached = sorted(share for share in found if share is not None)
            median = statistics.median([share if share is not None else float("inf") for share in found])
            middle = f"{median:.2f}" if median < float("inf") else "never"
            spread = f"{reached[0]:.2f} to {reached[-1]:.2f}" if reached else ""
            table.append([
                method, f"{len(reached)} of {len(found)}", middle, spread,
                _text(statistics.median(ratios) if ratios else None),
            ])  # fmt: skip
    return table


def markdown(columns: tuple[str, ...], table: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in table]) + "\n"


def document(folder: Path, times: Times) -> str:
    """Both halves against the best Adam or SGD and against the best of all baselines."""
    parts = [
        "# Study\n\nWritten by `python -m benchmarks.study.report`; losses by step, one file a task beside this.\n"
    ]
    for half in ("chosen", "reported"):
        for title, families in (("Adam or SGD", ADAM_AND_SGD), ("of all baselines", ())):
            table = []
            for task in (name for name, task in TASKS.items() if task.half == half):
                runs = runs_of(task, folder)
                baseline = best(runs, families)
                if baseline is not None:
                    table += rows(task, runs, baseline, times.get(task, {}))
            parts.append(f"## Tasks {half} on, beside the best {title}\n\n" + markdown(COLUMNS, table))
            if short := summary(half, folder, families, times):
                columns = "method", "reached it on", "median share of steps", "range", "median of seconds' ratio"
                parts.append(markdown(columns, short))
    about = [[name, task.about, str(task.steps), str(len(results.read(name, folder)))] for name, task in TASKS.items()]
    parts.append("## Tasks\n\n" + markdown(("task", "", "steps", "runs"), about))
    return "\n".join(parts)


def _text(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value >= 10 else f"{value:.4f}" if value < 0.1 else f"{value:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=Path, help="JSON: task -> method -> seconds of a step")
    parser.add_argument("--folder", type=Path, default=results.FOLDER, help="of the results")
    options = parser.parse_args()
    times: Times = json.loads(options.times.read_text(encoding="utf-8")) if options.times else {}
    text = document(options.folder, times)
    (options.folder / "study.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
