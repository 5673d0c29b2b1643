"""The seconds of a step of each method on each problem of the evidence of high accuracy.

Processor time of one thread. The methods of a problem take turns, so that whatever slows the machine down slows all of
them. What counts is the median of the turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from tqdm import tqdm

from benchmarks.evidence.accuracy_methods import METHODS, Training, methods_on
from benchmarks.evidence.accuracy_problems import TASKS
from benchmarks.evidence.records import Records

RECORDS = Records("accuracy-seconds", ("problem", "method"))
TURN = 1.0  # seconds of a turn, at least
FIRST, TURNS = 2, 5  # those in which histories fill and first calls are slow, and those that count
ENDLESS = 10**9


def of(problem: str, method: str) -> float:
    """Seconds of what the method counts, as last measured."""
    records = RECORDS.read()
    (record,) = (each for each in records if (each["problem"], each["method"]) == (problem, method))
    return float(record["seconds"])


def missing(problems: Sequence[str]) -> list[str]:
    """Those of the problems where a method has no seconds yet."""
    there = {(record["problem"], record["method"]) for record in RECORDS.read()}
    return [problem for problem in problems if any((problem, method) not in there for method in methods_on(problem))]


def measure(problems: Sequence[str]) -> None:
    for problem in tqdm(problems, desc=RECORDS.path.stem):
        trainings = {
            method: next(iter(METHODS[method].values()))(TASKS[problem].make(0), ENDLESS)
            for method in methods_on(problem)
        }
        turns = [{name: turn(training) for name, training in trainings.items()} for _ in range(FIRST + TURNS)]
        for method in trainings:
            found = [each[method] for each in turns[FIRST:]]
            RECORDS.add({
                "problem": problem,
                "method": method,
                "seconds": statistics.median(found),
                "fastest": min(found),
                "slowest": max(found),
            })  # fmt: skip


def turn(training: Training) -> float:
    """Train for whole cycles until the turn is over; return the seconds of what the method counts."""
    before, began = training.count, time.process_time()
    while time.process_time() - began < TURN:
        for _ in range(training.cycle):
            training.step()
    return (time.process_time() - began) / (training.count - before)
