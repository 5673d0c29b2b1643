"""Measure what a step of each method costs on each network: `python -m benchmarks.evidence.network_times`.

On an idle machine, in three minutes. Processor time of one thread: all methods of a network take turns, so that what
slows the machine slows all of them. The first turn is kept apart, as CurveBall solves more often there. A network with
dropout costs what it costs without.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.evidence.network_tasks import NETWORKS, WITHOUT_DROPOUT
from benchmarks.evidence.networks import METHODS, RECORDS, Training, setting_of
from benchmarks.evidence.records import Record, Records

TIMES = Records("network_times", ("network",))
TURN = 20  # steps: the Kronecker metric solves once in so many
TURNS = 4


def seconds(records: Sequence[Record], network: str, method: str, steps: float) -> float:
    """Return how long the first `steps` steps take, a fraction of one counted likewise."""
    found = next(times for times in records if times["network"] == network)["seconds"][method]
    early = min(steps, TURN)
    return float(early * found["early"] + (steps - early) * found["later"])


def measure(network: str, settings: dict[str, dict[str, float]], turns: int = TURNS) -> dict[str, Any]:
    """Return the seconds of a step in the first turn, and of a step in the median of the later turns, by method."""
    task = NETWORKS[network].task
    trainings = {method: Training(NETWORKS[network], method, setting, 0) for method, setting in settings.items()}
    taken: dict[str, list[float]] = {method: [] for method in trainings}
    batches = itertools.cycle(itertools.islice(task.batches(0), TURN))
    for _ in range(turns):
        turn = list(itertools.islice(batches, TURN))
        for method, training in trainings.items():
            taken[method].append(_turn(training, turn))
    return {
        "turn": TURN,
        "seconds": {
            method: {"early": _rounded(early), "later": _rounded(statistics.median(later))}
            for method, (early, *later) in taken.items()
        },
    }


def _turn(training: Training, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    began = time.process_time()
    for x, y in batches:
        training.step(x, y)
    return (time.process_time() - began) / len(batches)


def _rounded(value: float) -> float:
    return float(f"{value:.4e}")


def main() -> int:
    torch.set_num_threads(1)
    records = RECORDS.read()
    measure("mlp", {method: setting_of(records, "mlp", method) for method in METHODS})  # what is slow but once
    for run in TIMES.missing({"network": name} for name in WITHOUT_DROPOUT):
        name = run["network"]
        TIMES.add(run | measure(name, {method: setting_of(records, name, method) for method in METHODS}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
