"""The method's own table: iterations until convergence of CurveBall and of other systems, on four small problems.

    python -m benchmarks.evidence.published
    python -m benchmarks.evidence.published --only linear --seeds 10

SGD and Adam run at every setting of their grids first, with seeds of their own; at the best one they run with the
reported seeds. It takes minutes on one core, and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence

import torch

from benchmarks.evidence.markdown import table
from benchmarks.evidence.problems import PROBLEMS, Problem
from benchmarks.evidence.records import Record, Records
from benchmarks.evidence.solvers import SYSTEMS, Run, Setting

RECORDS = Records("published", ("problem", "system", "setting", "seed"))
SEEDS = range(100)
CHOOSING_SEEDS = range(1000, 1010)
DRAWN_SEEDS = range(3)  # whose paths are kept, for the figure
POINTS = 200  # of a path, at most

_RATES = 1e-1, 5e-2, 1e-2, 5e-3, 1e-3, 5e-4, 1e-4, 5e-5
GRIDS: dict[str, list[Setting]] = {
    "SGD + momentum": [
        {"lr": lr, "momentum": momentum} for lr, momentum in itertools.product(_RATES, (0.9, 0.95, 0.99))
    ],
    "Adam": [
        {"lr": lr, "beta1": beta1, "beta2": beta2}
        for lr, beta1, beta2 in itertools.product(_RATES, (0.9, 0.99), (0.99, 0.999))
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[problem.name for problem in PROBLEMS], help="one problem (default: all)")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many are reported (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are too small for more
    chosen = [problem for problem in PROBLEMS if arguments.only in (None, problem.name)]
    make(RECORDS, chosen, range(arguments.seeds))


def make(records: Records, problems: Sequence[Problem], seeds: Sequence[int]) -> None:
    """Make the runs of the grids, then the reported ones, as far as they are missing."""
    _make(records, (run for problem in problems for run in _grid_runs(problem)), CHOOSING_SEEDS)
    done = records.read()
    reported = (
        {"problem": problem.name, "system": system, "setting": setting_of(done, problem, system), "seed": seed}
        for problem in problems
        for system in SYSTEMS
        for seed in seeds
    )
    _make(records, reported, seeds)


def setting_of(records: Sequence[Record], problem: Problem, system: str) -> Setting:
    """Return a system's setting on a problem: that of its grid with the fewest iterations on the choosing seeds.

    A run that has not converged counts as the limit. Among equals, the lowest loss at the end decides.
    """
    if system not in GRIDS:
        return problem.curveball if system == "CurveBall" else {}

    def cost(setting: Setting) -> tuple[float, float]:
        runs = _select(records, problem, system, setting, CHOOSING_SEEDS)
        iterations = [problem.limit if run["iterations"] is None else run["iterations"] for run in runs]
        return statistics.mean(iterations), statistics.mean(_loss(run) for run in runs)

    return min(GRIDS[system], key=cost)


def reported_runs(records: Sequence[Record], problem: Problem, system: str) -> list[Record]:
    """Return the runs that the table is of."""
    return _select(records, problem, system, setting_of(records, problem, system), SEEDS)


def tables() -> dict[str, str]:
    """Return the tables of docs/evidence.md, by the name of their place."""
    records = RECORDS.read()
    return {
        "published": _iterations_table(records),
        "published-settings": _settings_table(records),
        "published-failures": _failures_table(records),
    }


def _grid_runs(problem: Problem) -> Iterator[Record]:
    for system, settings in GRIDS.items():
        for setting, seed in itertools.product(settings, CHOOSING_SEEDS):
            yield {"problem": problem.name, "system": system, "setting": setting, "seed": seed}


def _make(records: Records, runs: Iterator[Record], seeds: Sequence[int]) -> None:
    problems = {problem.name: problem for problem in PROBLEMS}

    @functools.lru_cache(maxsize=1)  # all seeds of a setting run at once, and follow each other
    def solved(problem: str, system: str, setting: tuple[tuple[str, float], ...]) -> dict[int, Run]:
        return dict(zip(seeds, SYSTEMS[system](problems[problem], seeds, dict(setting)), strict=True))

    for run in records.missing(runs):
        result = solved(run["problem"], run["system"], tuple(run["setting"].items()))[run["seed"]]
        record = run | {"iterations": result.iterations, "converged": result.iterations is not None}
        record["loss"] = float(f"{result.loss:.6g}")
        if result.evaluations is not None:
            record["evaluations"] = result.evaluations
        if result.stuck:
            record["stuck"] = True
        if run["seed"] in DRAWN_SEEDS and len(result.path[0]) == 2:
            record["path"] = _thinned(result.path)
        records.add(record)


def _thinned(path: list[list[float]]) -> list[list[float]]:
    """Return the path without its end, where it is no longer finite, and no more than POINTS of its points."""
    finite = [[round(x, 5) for x in point] for point in path if all(map(math.isfinite, point))]
    return finite[:: math.ceil(len(finite) / (POINTS - 1))] + finite[-1:]


def _select(
    records: Sequence[Record], problem: Problem, system: str, setting: Setting, seeds: Sequence[int]
) -> list[Record]:
    wanted = problem.name, system, setting
    found = [run for run in records if (run["problem"], run["system"], run["setting"]) == wanted]
    return [run for run in found if run["seed"] in seeds]


def _iterations_table(records: Sequence[Record]) -> str:
    rows = []
    for system in SYSTEMS:
        runs = [reported_runs(records, problem, system) for problem in PROBLEMS]
        rows.append([system, *(spread(each, "iterations") for each in runs)])
        if "evaluations" in runs[0][0]:
            rows.append([f"{system}, evaluations", *(spread(each, "evaluations") for each in runs)])
    return table(["iterations", *(problem.title for problem in PROBLEMS)], rows)


def _settings_table(records: Sequence[Record]) -> str:
    rows = []
    for system in ("CurveBall", *GRIDS):
        settings = [setting_of(records, problem, system) for problem in PROBLEMS]
        rows.append([system, *(", ".join(f"{name} {value:g}" for name, value in each.items()) for each in settings)])
    return table(["setting", *(problem.title for problem in PROBLEMS)], rows)


def _failures_table(records: Sequence[Record]) -> str:
    rows = []
    for problem, system in itertools.product(PROBLEMS, SYSTEMS):
        failed = [run for run in reported_runs(records, problem, system) if not run["converged"]]
        if failed:
            finite = [loss for loss in map(_loss, failed) if loss < math.inf]
            stuck = sum("stuck" in run for run in failed)
            loss = f"{statistics.median(finite):.2g}" if finite else ""
            counts = len(failed), len(failed) - len(finite), stuck
            rows.append([f"{problem.title}: {system}", *map(str, counts), loss])
    columns = "not converged", f"of {len(SEEDS)}", "diverged", "stuck", "last finite loss, median"
    return table(columns, rows)


def _loss(run: Record) -> float:
    """Return the last loss; the raw data have None where it was not finite."""
    return math.inf if run["loss"] is None else float(run["loss"])


def spread(runs: Sequence[Record], name: str) -> str:
    """Return mean ± standard deviation of the runs that converged, and how many did unless all have."""
    values = [run[name] for run in runs if run["converged"]]
    share = "" if len(values) == len(runs) else f"({len(values)} of {len(runs)})"
    if len(values) < 2:
        return f"{values[0]} {share}" if values else f"never {share}"
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    digits = 1 if mean < 100 else 0
    return f"{mean:.{digits}f} ± {deviation:.{digits}f} {share}".rstrip()


if __name__ == "__main__":
    main()
