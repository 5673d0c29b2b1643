"""Measure what the contestants' steps cost, on an idle machine: `python -m benchmarks.evidence.contest.times`.

Processor time of one thread. All contestants of a workload take turns, so that whatever slows the machine down slows
all of them. It takes about six minutes; what was measured last counts.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from tqdm import tqdm

from benchmarks.evidence.contest.contestants import ADAMW, CONTESTANTS
from benchmarks.evidence.contest.workloads import WORKLOADS, Workload
from benchmarks.evidence.records import Record, Records

RECORDS = Records("contest-times", ("workload", "contestant"))
TURN = 20  # steps, of which the Kronecker metric solves once, but several times in the first turn
TURNS = 15  # at most
SECONDS = 40  # of a workload, about

Times = dict[tuple[str, str], Record]  # by workload and contestant


class Clock:
    """A contestant in training, and the seconds of a step in each turn."""

    def __init__(self, workload: Workload, name: str) -> None:
        self.workload = workload
        self.training = CONTESTANTS[name].start(workload, workload.task.make(0), workload.budget)
        self.batches = workload.batches(0, sys.maxsize)
        self.seconds: list[float] = []
        self.failed = False

    def turn(self) -> None:
        """Take a turn; one that raises an error is the last."""
        taken, seconds = 0, 0.0
        while taken < TURN and not self.failed:
            x, y = next(self.batches)
            began = time.process_time()
            try:
                taken += self.training.step(x, y)
            except (RuntimeError, ValueError):
                self.failed = True
            seconds += time.process_time() - began
        if taken:
            self.seconds.append(seconds / taken)


def measure(workload: Workload) -> dict[str, Clock]:
    names = [name for name, each in CONTESTANTS.items() if each.installed and each.enters(workload)]
    clocks = {name: Clock(workload, name) for name in names}
    began = time.process_time()
    for _ in range(TURNS):
        for clock in clocks.values():
            clock.turn()
        if time.process_time() - began > SECONDS:
            break
    return clocks


def seconds(times: Times, workload: str, contestant: str, steps: int) -> float:
    """What so many steps take."""
    own = times[workload, contestant]
    early = min(steps, TURN)
    return float(early * own["first_turn_seconds_per_step"] + (steps - early) * own["later_median_seconds_per_step"])


def share_of_budget(times: Times, workload: str, contestant: str, steps: int) -> float:
    """What so many steps take, over AdamW's step budget."""
    whole = seconds(times, workload, ADAMW, WORKLOADS[workload].budget)
    return seconds(times, workload, contestant, steps) / whole


def relative_cost(times: Times, workload: str, contestant: str) -> float:
    """What a later step costs, over AdamW's."""
    own, adamw = (times[workload, name]["later_median_seconds_per_step"] for name in (contestant, ADAMW))
    return float(own / adamw)


def steps_within(times: Times, workload: str, contestant: str, share: float) -> int:
    """How many steps fit into a share of AdamW's step budget."""
    own = times[workload, contestant]
    whole = share * seconds(times, workload, ADAMW, WORKLOADS[workload].budget)
    later = whole - TURN * own["first_turn_seconds_per_step"]
    return max(TURN, TURN + int(later / own["later_median_seconds_per_step"]))


def read() -> Times:
    return {(record["workload"], record["contestant"]): record for record in RECORDS.read()}


def main() -> None:
    torch.set_num_threads(1)
    for name, workload in tqdm(WORKLOADS.items()):
        for contestant, clock in measure(workload).items():
            RECORDS.add({
                "workload": name,
                "contestant": contestant,
                "first_turn_seconds_per_step": _rounded(clock.seconds[0]),
                "later_median_seconds_per_step": _rounded(statistics.median(clock.seconds[1:] or clock.seconds)),
                "turns": len(clock.seconds),
            })  # fmt: skip


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
