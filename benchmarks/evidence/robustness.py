"""Train many small nets without choosing a number: `python -m benchmarks.evidence.robustness`.

Three experiments: fifty random nets; the first damping at 0.01 to 100 times its default; batches of 32 to 4096 rows.
The methods of a net take turns of some steps, so that whatever slows the machine down slows all of them.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence.random_problems import LOSSES, Problem, random_problem, targets, teacher
from benchmarks.evidence.records import Record, Records
from benchmarks.study import nets
from benchmarks.study.data import digits
from curveball_fused import CurveBall
from curveball_fused.settings import defaults_of

RECORDS = Records("robustness", ("experiment", "case"))
NETS = 50
STEPS = 300  # of a run, at least; a run is of whole epochs
TURN = 20  # steps, of which the Kronecker metric's defaults solve once
BATCH_EPOCHS = 8  # of the third experiment, for each batch size
BATCH_SIZES = 32, 64, 128, 256, 512, 1024, 2048, 4096
FACTORS = 0.01, 0.1, 1.0, 10.0, 100.0  # on the default λ

Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
KRONECKER, PUBLISHED = "CurveBall, Kronecker metric", "CurveBall, as published"
ADAM, SGD = "Adam (lr 0.001)", "SGD (lr 0.01, momentum 0.9)"
CURVEBALLS: dict[str, str | None] = {KRONECKER: "kronecker", PUBLISHED: None}
METHODS: dict[str, Make] = {
    KRONECKER: lambda params: CurveBall(params, preconditioner="kronecker"),
    PUBLISHED: CurveBall,
    ADAM: lambda params: torch.optim.Adam(params, lr=1e-3, fused=True),
    SGD: lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, fused=True),
}


@dataclass
class Training:
    """A net under one optimizer, and what came of it.

    Attributes:
        problem: whose net, data and loss these are.
        make: makes the optimizer.
        losses: of each step's batch, before the step.
        seconds: a step of each turn took on average, of the processor's time.
    """

    problem: Problem
    make: Make
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.net = self.problem.make()
        self.optimizer = self.make(self.net.parameters())

    def turn(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        torch.manual_seed(len(self.losses))  # the same dropout for all methods
        began = time.process_time()
        losses = [self._step(x, y) for x, y in batches]
        self.seconds.append((time.process_time() - began) / len(batches))
        self.losses += [loss.item() for loss in losses]

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        if isinstance(self.optimizer, CurveBall):
            loss: Tensor
            loss, _ = self.optimizer.step(lambda: self.net(x), lambda outputs: self.problem.loss_fn(outputs, y))
            return loss
        self.optimizer.zero_grad()
        loss = self.problem.loss_fn(self.net(x), y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def record(self) -> Record:
        """Mean loss of each epoch; steps that were skipped; seconds of a step in the first turn, and the later ones."""
        n = self.problem.steps_per_epoch
        epochs = [statistics.fmean(self.losses[i : i + n]) for i in range(0, len(self.losses), n)]
        stats = self.optimizer.stats() if isinstance(self.optimizer, CurveBall) else {}
        return {
            "losses": [rounded(loss) for loss in epochs],
            "skipped_steps": int(stats.get("skipped_steps", 0)),
            "first_turn_seconds_per_step": rounded(self.seconds[0]),
            "later_median_seconds_per_step": rounded(statistics.median(self.seconds[1:] or self.seconds)),
        }


def rounded(value: float) -> float:
    """Five digits."""
    return float(f"{value:.4e}")


def train(problem: Problem, methods: dict[str, Make], epochs: int) -> dict[str, Any]:
    """Train by all methods from the same weights, on the same batches, in turns."""
    trainings = {name: Training(problem, make) for name, make in methods.items()}
    batches = problem.batches(epochs)
    while turn := list(itertools.islice(batches, TURN)):
        for training in trainings.values():
            training.turn(turn)
    return {
        "about": problem.about,
        "batch": problem.batch,
        "steps_per_epoch": problem.steps_per_epoch,
        "initial_loss": rounded(initial_loss(problem)),
        "load_average": os.getloadavg()[0],
        "turn": TURN,
        "runs": {name: training.record() for name, training in trainings.items()},
    }


@torch.no_grad()
def initial_loss(problem: Problem) -> float:
    """The mean loss of the first epoch's batches, with the initial weights."""
    net = problem.make()
    return statistics.fmean(problem.loss_fn(net(x), y).item() for x, y in problem.batches(1))


def epochs_of(problem: Problem) -> int:
    return math.ceil(STEPS / problem.steps_per_epoch)


def dampings() -> dict[str, Make]:
    """Both CurveBalls at each factor on the default λ."""
    return {
        damping_name(method, factor): lambda params, p=preconditioner, factor=factor: CurveBall(  # type: ignore[misc]
            params, preconditioner=p, lambd=factor * defaults_of(p, None)["lambd"]
        )
        for method, preconditioner in CURVEBALLS.items()
        for factor in FACTORS
    }


def damping_name(method: str, factor: float) -> str:
    return f"{method}, λ x {factor:g}"


def digits_conv() -> Problem:
    """The net of the demo."""
    data = digits()
    about = "convolutions: 16-32, batch norm, digits, cross-entropy, batch 128"
    return Problem(about, 0, nets.digits_conv, data.x, data.y, nets.cross_entropy, 128)


DAMPED: dict[str, Callable[[], Problem]] = {
    **{f"net {seed}": lambda seed=seed: random_problem(seed) for seed in (0, 1, 2, 4, 5, 8)},  # type: ignore[misc]
    "digits conv": digits_conv,
}


def perceptron(loss: str, batch: int) -> Problem:
    """A perceptron on 8192 rows of a random teacher."""
    x, scores = teacher(64, 8192)
    about = f"perceptron: 64-128-128-10, a random teacher, {loss}, batch {batch}"
    return Problem(about, 0, lambda: nets.perceptron(64, 128, 128, 10), x, targets(scores, loss), LOSSES[loss], batch)


BATCHED = {f"{loss}, batch {batch}": (loss, batch) for loss in ("cross-entropy", "MSE") for batch in BATCH_SIZES}


def cases() -> Iterator[Record]:
    """All runs, by their keys."""
    yield from ({"experiment": "nets", "case": f"net {seed}"} for seed in range(NETS))
    yield from ({"experiment": "damping", "case": name} for name in DAMPED)
    yield from ({"experiment": "batch", "case": name} for name in BATCHED)


def run(experiment: str, case: str) -> dict[str, Any]:
    if experiment == "nets":
        problem = random_problem(int(case.split()[1]))
        return train(problem, METHODS, epochs_of(problem))
    if experiment == "damping":
        problem = DAMPED[case]()
        return train(problem, dampings(), epochs_of(problem))
    return train(perceptron(*BATCHED[case]), METHODS, BATCH_EPOCHS)


def main() -> int:
    torch.set_num_threads(1)
    train(perceptron("MSE", 4096), METHODS, epochs=10)  # what is slow in a process but once is no part of a net's time
    for case in RECORDS.missing(cases()):
        RECORDS.add(case | run(**case))
    return 0


if __name__ == "__main__":
    sys.exit(main())
