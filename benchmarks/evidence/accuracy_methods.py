"""The methods of the evidence of high accuracy. Adam and SOAP have grids of settings; the others are not tuned."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence.accuracy_problems import TASKS, Problem, loss
from benchmarks.evidence.levenberg_marquardt import LevenbergMarquardt
from curveball_fused import CurveBall

RATES = 1e-2, 3e-3, 1e-3
SCHEDULES = "constant", "cosine"


class Training(ABC):
    """A problem's net under one method.

    Attributes:
        problem: what is trained.
        count: how much of what time is measured by, steps or evaluations, there has been.
        cycle: steps that have all kinds of steps in them, for measuring.
    """

    cycle = 1

    def __init__(self, problem: Problem) -> None:
        self.problem, self.count = problem, 0

    @abstractmethod
    def step(self) -> None: ...

    def residuals(self) -> Tensor:
        return self.problem.residuals(self.problem.net)

    def backward(self) -> Tensor:
        """Compute the gradient; return the loss."""
        self.problem.net.zero_grad()
        value = loss(self.residuals())
        value.backward()
        return value


Start = Callable[[Problem, int], Training]  # of a problem, and the count at which the run will end


class FirstOrder(Training):
    """A step of Adam or SOAP, at a constant rate or at one that falls to zero by half a cosine."""

    cycle = 10  # SOAP refreshes its bases once in so many

    def __init__(
        self, problem: Problem, end: int, make: Callable[..., torch.optim.Optimizer], lr: float, schedule: str
    ) -> None:
        super().__init__(problem)
        self.optimizer = make(problem.net.parameters(), lr=lr)
        self._end, self._lr, self._falls = end, lr, schedule == "cosine"

    def step(self) -> None:
        if self._falls:
            self.optimizer.param_groups[0]["lr"] = self._lr * (0.5 + 0.5 * math.cos(math.pi * self.count / self._end))
        self.backward()
        self.optimizer.step()
        self.count += 1


class LBFGS(Training):
    """Twenty iterations of torch's L-BFGS with the strong Wolfe conditions. It counts evaluations."""

    def __init__(self, problem: Problem, end: int) -> None:
        super().__init__(problem)
        self.optimizer = torch.optim.LBFGS(
            problem.net.parameters(),
            history_size=100,
            line_search_fn="strong_wolfe",
            tolerance_grad=0.0,
            tolerance_change=0.0,
        )

    def step(self) -> None:
        self.optimizer.step(self._evaluate)

    def _evaluate(self) -> Tensor:
        self.count += 1
        return self.backward()


class DenseLevenbergMarquardt(Training):
    """A step has one Jacobian."""

    def __init__(self, problem: Problem, end: int) -> None:
        super().__init__(problem)
        jacobian = problem.jacobian
        assert jacobian is not None, "it is left out where the Jacobian is too large"
        self.method = LevenbergMarquardt(
            list(problem.net.parameters()), lambda: self.residuals().flatten(), lambda: jacobian(problem.net)
        )

    def step(self) -> None:
        self.method.step()
        self.count += 1


class SecondOrder(Training):
    """A step of CurveBall with these options."""

    def __init__(self, problem: Problem, end: int, **options: Any) -> None:
        super().__init__(problem)
        self.optimizer = CurveBall(problem.net.parameters(), **options)
        self.cycle = self.optimizer.defaults["solve_interval"]

    def step(self) -> None:
        self.optimizer.step(self.residuals, loss)
        self.count += 1


def _soap(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """SOAP, from a package of its own, which is needed only where it runs."""
    optimizer: torch.optim.Optimizer = import_module("pytorch_optimizer").SOAP(params, lr=lr, weight_decay=0.0)
    return optimizer


def _grid(make: Callable[..., torch.optim.Optimizer]) -> dict[str, Start]:
    return {
        f"lr {lr:g}, {schedule}": partial(FirstOrder, make=make, lr=lr, schedule=schedule)
        for lr, schedule in itertools.product(RATES, SCHEDULES)
    }


ADAM, DENSE = "Adam", "Levenberg-Marquardt, dense"
PUBLISHED, KRONECKER = "CurveBall, as published", "CurveBall, Kronecker metric"
OFTEN = "CurveBall, Kronecker metric, solve_interval=5"
DEFAULTS = "defaults"
METHODS: dict[str, dict[str, Start]] = {  # by name and setting
    KRONECKER: {DEFAULTS: partial(SecondOrder, preconditioner="kronecker")},
    OFTEN: {DEFAULTS: partial(SecondOrder, preconditioner="kronecker", solve_interval=5)},
    PUBLISHED: {DEFAULTS: SecondOrder},
    ADAM: _grid(partial(torch.optim.Adam, fused=True)),
    "SOAP": _grid(_soap),
    "L-BFGS": {DEFAULTS: LBFGS},
    DENSE: {DEFAULTS: DenseLevenbergMarquardt},
}


def methods_on(problem: str) -> list[str]:
    """The names of those that run on it: the dense one does not where the Jacobian is too large."""
    fits = TASKS[problem].make(0).jacobian is not None
    return [method for method in METHODS if fits or method != DENSE]
