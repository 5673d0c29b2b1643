"""Minimize to where methods stall, full-batch and in float64, and compare the errors by seconds.

    python -m benchmarks.evidence.accuracy              # what is missing; goes on where it was stopped
    python -m benchmarks.evidence.accuracy --seconds    # measure the seconds of steps anew, on an idle machine

Loss and error are kept by step, and seconds are steps times the seconds of a step, which are measured apart: results do
not depend on how busy the machine is while they are made. The steps of a run are those that its time is enough for.
SOAP comes from the package pytorch_optimizer.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence

import torch

from benchmarks.evidence import accuracy_seconds
from benchmarks.evidence.accuracy_methods import METHODS, methods_on
from benchmarks.evidence.accuracy_problems import TASKS, loss
from benchmarks.evidence.records import Record, Records

RECORDS = Records("accuracy", ("problem", "method", "setting", "seed"))
CHOOSING_SEED = 0
SEEDS = 0, 1, 2
RATIO = 1.15  # from one count at which loss and error are kept to the next


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(TASKS), help="one problem (default: all)")
    parser.add_argument("--seconds", action="store_true", help="measure seconds alone, and anew")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    problems = [name for name in TASKS if arguments.only in (None, name)]
    if arguments.seconds:
        accuracy_seconds.measure(problems)
    else:
        accuracy_seconds.measure(accuracy_seconds.missing(problems))
        make(problems)


def make(problems: Sequence[str]) -> None:
    """Make the runs that choose settings, then the others, as far as they are missing."""
    for cases in (settings_cases(problems), reported_cases(problems)):
        for case in RECORDS.missing(cases):
            RECORDS.add(case | run(**case))


def settings_cases(problems: Sequence[str]) -> Iterator[Record]:
    """The runs of all settings."""
    for problem in problems:
        for method in methods_on(problem):
            yield from (
                {"problem": problem, "method": method, "setting": setting, "seed": CHOOSING_SEED}
                for setting in METHODS[method]
            )


def reported_cases(problems: Sequence[str]) -> Iterator[Record]:
    """The runs of the chosen settings, which need those of all settings."""
    records = RECORDS.read()
    for problem in problems:
        for method in methods_on(problem):
            setting = chosen(records, problem, method)
            yield from ({"problem": problem, "method": method, "setting": setting, "seed": seed} for seed in SEEDS)


def chosen(records: Sequence[Record], problem: str, method: str) -> str | None:
    """The setting with the least error at the end on the choosing seed; None before any has run."""
    runs = [run for run in records if (run["problem"], run["method"], run["seed"]) == (problem, method, CHOOSING_SEED)]
    return min(runs, key=final_error)["setting"] if runs else None


def final_error(run: Record) -> float:
    """The last error; infinite where a run has diverged."""
    error = run["errors"][-1]
    return math.inf if error is None else float(error)


def run(problem: str, method: str, setting: str, seed: int) -> Record:
    """Train for as many steps as the problem's time is enough for, or until a loss is not finite."""
    seconds = accuracy_seconds.of(problem, method)
    end = max(1, round(TASKS[problem].seconds / seconds))
    training = METHODS[method][setting](TASKS[problem].make(seed), end)
    counts: list[int] = []
    losses: list[float] = []
    errors: list[float] = []
    due = 1
    while training.count < end and all(map(math.isfinite, losses)):
        training.step()
        if training.count >= min(due, end):
            counts.append(training.count)
            losses.append(rounded(float(loss(training.residuals()).detach())))
            errors.append(rounded(training.problem.error(training.problem.net)))
            due = max(training.count + 1, math.ceil(RATIO * training.count))
    return {"counts": counts, "losses": losses, "errors": errors, "seconds_per_count": rounded(seconds)}


def rounded(value: float) -> float:
    """Five digits."""
    return float(f"{value:.4e}")


if __name__ == "__main__":
    main()
