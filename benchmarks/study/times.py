"""Measure what a step of each method costs on each task: `python -m benchmarks.study.times`, on an idle machine.

Processor time of one thread. All methods of a task take turns, ten steps each, so that whatever slows the machine down
slows all of them. The first ten steps are kept apart, as CurveBall solves more often there; what is kept of the others
is the mean of each round of a hundred, which has all kinds of steps in it, and of these the median and the quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.report import environment
from benchmarks.study import results
from benchmarks.study.methods import Method, Training
from benchmarks.study.run import METHODS, commit
from benchmarks.study.tasks import TASKS

FILE = results.FOLDER / "times.json"
TURN = 10  # steps, as many as are early
ROUND = 100  # steps: λ is adapted once in so many
DEFAULT = (
    "Kronecker",
    "Adam 0.003 constant",
    "SGD 0.03 constant",
    "SOAP 0.003 constant",
    "Muon 0.003 constant",
    "Prodigy 1 constant",
    "Schedule-Free AdamW 0.01",
)


class Clock:
    """One method in training on one task, and how long its steps took."""

    def __init__(self, name: str, method: Method) -> None:
        self.task = TASKS[name]
        self.training: Training = method.start(self.task, self.task.make(0), **method.options)
        self.batches = self._batches()
        self.seconds: list[float] = []

    def turn(self) -> None:
        for x, y in islice(self.batches, TURN):
            began = time.process_time()
            self.training.step(x, y)
            self.seconds.append(time.process_time() - began)

    def measured(self) -> dict[str, float]:
        early, later = self.seconds[:TURN], self.seconds[TURN:]
        rounds = [statistics.mean(later[i : i + ROUND]) for i in range(0, len(later), ROUND)]
        low, middle, high = statistics.quantiles(rounds, n=4, method="inclusive")
        return {
            "early": statistics.mean(early),
            "later": middle,
            "lower_quartile": low,
            "upper_quartile": high,
            "median_step": statistics.median(later),
            "slowest_step": statistics.median(max(later[i : i + ROUND]) for i in range(0, len(later), ROUND)),
        }

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self.task.batches(0)


def measure(name: str, methods: list[str], rounds: int) -> dict[str, dict[str, float]]:
    clocks = {method: Clock(name, METHODS[method]) for method in methods}
    for _ in range(1 + rounds * ROUND // TURN):
        for clock in clocks.values():
            clock.turn()
    return {method: clock.measured() for method, clock in clocks.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=list(TASKS), choices=list(TASKS), metavar="TASK")
    parser.add_argument("--method", nargs="+", default=list(DEFAULT), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=3, help="of a hundred steps (default: 3)")
    parser.add_argument("--file", type=Path, default=FILE, help="where other tasks' times stay (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(options.file.read_text(encoding="utf-8")) if options.file.exists() else {"tasks": {}}
    known |= {"machine": environment()["cpu"], "torch": torch.__version__, "commit": commit()}
    for name in options.task:
        times = measure(name, options.method, options.rounds)
        known["tasks"][name] = known["tasks"].get(name, {}) | times
        options.file.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for method, found in times.items():
            print(f"{name}, {method}: {1e3 * found['later']:.2f} ms, early {1e3 * found['early']:.2f} ms", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
