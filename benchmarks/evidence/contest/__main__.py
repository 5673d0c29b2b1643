"""A contest without tuning in miniature, after AlgoPerf's rules: `python -m benchmarks.evidence.contest`.

Trials of tuned optimizers make the targets, seconds of a step say how many steps a contestant has, and then all
contestants train towards the targets. It takes one to two hours on one core, and goes on where it was stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.evidence.contest import times, trials
from benchmarks.evidence.contest.contestants import CONTESTANTS
from benchmarks.evidence.contest.score import PLANNED, RECORDS, SEEDS
from benchmarks.evidence.contest.workloads import WORKLOADS
from benchmarks.evidence.records import Record

EVALUATIONS = 40  # of a run, evenly in its steps


def entries() -> Iterator[Record]:
    """All runs, by their keys."""
    for seed in SEEDS:
        for workload in WORKLOADS:
            for name, contestant in CONTESTANTS.items():
                if contestant.installed and contestant.enters(WORKLOADS[workload]):
                    yield {"workload": workload, "contestant": name, "seed": seed}


def train(workload: str, contestant: str, seed: int, steps: int, target: float) -> dict[str, Any]:
    """Train until the validation loss is at the target, is not finite, or no steps are left."""
    own = WORKLOADS[workload]
    training = CONTESTANTS[contestant].start(own, own.task.make(seed), steps)
    taken = 0
    losses: list[list[float]] = []
    for x, y in own.batches(seed, steps):
        before = taken
        try:
            taken += training.step(x, y)
        except (RuntimeError, ValueError) as error:  # such as of a matrix that has no Cholesky factor
            return {"losses": losses, "error": str(error).splitlines()[0][:120]}
        if taken * EVALUATIONS // steps > before * EVALUATIONS // steps:
            loss = training.validation_loss()
            losses.append([taken, float(f"{loss:.5g}")])
            if loss <= target or not math.isfinite(loss):
                break
        if taken >= steps:
            break
    return {"losses": losses}


def main() -> None:
    torch.set_num_threads(1)
    trials.make_trials()
    if not times.read():
        times.main()
    made, measured = trials.RECORDS.read(), times.read()
    targets = {workload: trials.target(made, workload) for workload in WORKLOADS}
    for run in RECORDS.missing(entries()):
        steps = times.steps_within(measured, run["workload"], run["contestant"], PLANNED)
        target = targets[run["workload"]]
        RECORDS.add(run | {"steps": steps, "target": target} | train(**run, steps=steps, target=target))


if __name__ == "__main__":
    main()
