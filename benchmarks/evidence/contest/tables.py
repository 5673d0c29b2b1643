"""The tables of docs/evidence-contest.md, from the raw data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from benchmarks.evidence.contest import times, trials
from benchmarks.evidence.contest.contestants import CONTESTANTS
from benchmarks.evidence.contest.score import RECORDS, median_times, profile, ratios, score
from benchmarks.evidence.contest.workloads import WORKLOADS
from benchmarks.evidence.markdown import table
from benchmarks.evidence.records import Record

TAUS = 1, 2, 4
FACTORS = 1, 1.1, 1.5  # on the targets
NOT_ENTERED = "–"


def ranking() -> dict[str, list[float]]:
    """Each contestant's ratios to the fastest, the best score first."""
    medians = median_times(RECORDS.read(), times.read())
    found = {name: ratios(medians, name) for name in CONTESTANTS}
    return dict(sorted(found.items(), key=lambda entry: -score(entry[1])))


def tables() -> dict[str, str]:
    """All tables in Markdown, by the names of their markers."""
    runs = RECORDS.read()
    return {
        "contest-scores": _scores(),
        "contest-times": _times(runs),
        "contest-steps": _steps(),
        "contest-targets": _targets(),
        "contest-one-setting": _one_setting(),
        "contest-errors": _errors(runs),
    }


def _scores() -> str:
    rows = [
        [
            name,
            f"{score(found):.2f}",
            f"{sum(map(math.isfinite, found))} of {len(found)}",
            *(f"{profile(found, tau):.0%}" for tau in TAUS),
            CONTESTANTS[name].setting,
        ]
        for name, found in ranking().items()
    ]
    return table(["", "score", "targets reached", *(f"ρ({tau})" for tau in TAUS), "setting"], rows)


def _times(runs: Sequence[Record]) -> str:
    """Medians over the seeds as multiples of the budget; where it is missed, how close the median run came."""
    medians = median_times(runs, times.read())
    rows = []
    for name in ranking():
        row = [name]
        for workload in WORKLOADS:
            own = of(runs, workload, name)
            time = medians[workload].get(name, math.inf)
            row.append(NOT_ENTERED if not own else f"{time:.2f}" if math.isfinite(time) else _missed(own))
        rows.append(row)
    return table(["", *(workload.title for workload in WORKLOADS.values())], rows)


def of(runs: Sequence[Record], workload: str, contestant: str) -> list[Record]:
    """The runs of a contestant on a workload."""
    return [run for run in runs if (run["workload"], run["contestant"]) == (workload, contestant)]


def lowest_over_target(runs: Sequence[Record]) -> float:
    """The median run's lowest loss over the target."""
    lowest = [min((loss for _, loss in run["losses"] if loss is not None), default=math.inf) for run in runs]
    return float(statistics.median(lowest) / runs[0]["target"])


def _missed(runs: Sequence[Record]) -> str:
    ratio = lowest_over_target(runs)
    return f"not ({ratio:.2f})" if ratio < 10 else "not (> 10)"


def _steps() -> str:
    """What a step costs, over AdamW's."""
    measured = times.read()
    rows = [
        [
            name,
            *(
                f"{times.relative_cost(measured, workload, name):.2f}" if (workload, name) in measured else NOT_ENTERED
                for workload in WORKLOADS
            ),
        ]
        for name in CONTESTANTS
    ]
    return table(["", *(workload.title for workload in WORKLOADS.values())], rows)


def _targets() -> str:
    made = trials.RECORDS.read()
    rows = []
    for name, workload in WORKLOADS.items():
        medians = trials.medians(made, name)
        budget = times.seconds(times.read(), name, "AdamW", workload.budget)
        rows.append([
            workload.title, workload.about, str(workload.budget), f"{budget:.1f}", f"{min(medians.values()):.3g}",
            *(f"{loss:.3g}" for loss in medians.values()),
        ])  # fmt: skip
    return table(["", "", "steps", "seconds of AdamW", "target", *trials.RANGES], rows)


def _one_setting() -> str:
    """How many targets the trials of one setting reach at the end of the budget, at most."""
    made = trials.RECORDS.read()
    targets = {workload: trials.target(made, workload) for workload in WORKLOADS}
    rows = []
    for optimizer in trials.RANGES:
        row = [optimizer]
        for factor in FACTORS:
            reached = [
                run["trial"]
                for run in made
                if run["optimizer"] == optimizer and run["seed"] == trials.TRIAL_SEED
                if trials.final_loss(run) <= factor * targets[run["workload"]]
            ]
            row.append(str(max(reached.count(trial) for trial in range(trials.TRIALS))))
        rows.append(row)
    return table(["", *(f"at most {factor:g} x the target" for factor in FACTORS)], rows)


def _errors(runs: Sequence[Record]) -> str:
    """Runs that ended in an error, or in a loss that is not finite."""
    rows = []
    for name in CONTESTANTS:
        for key, workload in WORKLOADS.items():
            own = of(runs, key, name)
            ends = [run.get("error") or _not_finite(run) for run in own]
            if any(ends):
                first = next(end for end in ends if end)
                rows.append(
                    [f"{name}: {workload.title}", f"{sum(map(bool, ends))} of {len(own)}", first.split(" (")[0]]
                )
    return table(["", "runs", "how the first one ended"], rows)


def _not_finite(run: Record) -> str:
    return "a loss that is not finite" if any(loss is None for _, loss in run["losses"]) else ""
