"""Results of the study's runs: one JSON line each in benchmarks/results/study/<task>.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "results" / "study"
SMOOTHED = 20  # a loss curve is smoothed by the mean of the last so many-th part of the run's steps


@dataclass(frozen=True)
class Result:
    """A run; losses have four digits.

    Attributes:
        task: its name.
        method: likewise.
        options: the method's.
        seed: of weights and batches.
        losses: of the batch of each step, before it; they end where the loss is not finite.
        final_train: loss of the training set in evaluation mode; None where the run diverged.
        final_validation: likewise of the validation set.
        final_error: the validation set's error, where the task has one.
        steps: of a whole run.
        versions: of the packages.
        commit: of this repository.
    """

    task: str
    method: str
    options: dict[str, Any]
    seed: int
    losses: list[float]
    final_train: float | None
    final_validation: float | None
    final_error: float | None
    steps: int
    versions: dict[str, str]
    commit: str

    def smoothed(self) -> list[float]:
        """The mean of the losses of each step and some before it."""
        width = max(1, self.steps // SMOOTHED)
        total, means = 0.0, []
        for i, loss in enumerate(self.losses):
            total += loss - (self.losses[i - width] if i >= width else 0.0)
            means.append(total / min(i + 1, width))
        return means

    def target(self) -> float | None:
        """The loss that others should reach: the smoothed one at the end; that of the average where weights are one."""
        return self.final_train if self.method.startswith("Schedule-Free") else self.smoothed()[-1]

    def share_until(self, loss: float | None) -> float | None:
        """The share of the steps after which the smoothed loss is at most `loss`; None: never."""
        if loss is None:
            return None
        reached = (i for i, mean in enumerate(self.smoothed(), 1) if mean <= loss)
        step = next(reached, None)
        return step / self.steps if step else None


def rounded(value: float | None) -> float | None:
    """Four digits; None where it is not finite."""
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None


def append(result: Result, folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{result.task}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result), ensure_ascii=False, separators=(",", ":")) + "\n")


def read(task: str, folder: Path = FOLDER) -> list[Result]:
    """The runs of a task; of those with the same method and seed the last."""
    path = folder / f"{task}.jsonl"
    if not path.exists():
        return []
    results = (Result(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines())
    return list({(result.method, result.seed): result for result in results}.values())


def mean(values: Iterable[float | None]) -> float | None:
    """The mean, or None if any value is missing."""
    known = list(values)
    return None if None in known or not known else sum(v for v in known if v is not None) / len(known)
