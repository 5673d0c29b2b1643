"""What the study calls a method: an optimizer with all its options."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from curveball_fused import CurveBall

if TYPE_CHECKING:
    from benchmarks.study.tasks import Task


class Training(ABC):
    """A net in training."""

    @abstractmethod
    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Take a step; return the batch's loss before it."""

    def finish(self, seed: int) -> None:  # noqa: B027
        """Make the net ready to be evaluated, after the last step."""


@dataclass(frozen=True)
class Method:
    """An optimizer with its options.

    Attributes:
        name: under which results are kept.
        start: called with task, net and the options.
        options: what the results record.
        packages: distributions beside torch whose versions the results record.
    """

    name: str
    start: Callable[..., Training]
    options: Mapping[str, Any]
    packages: tuple[str, ...] = ()


def scheduler(optimizer: torch.optim.Optimizer, schedule: str, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The factor on the rate: 1, or half a cosine from 1 to 0 over all steps."""
    factors: dict[str, Callable[[int], float]] = {
        "constant": lambda _: 1.0,
        "cosine": lambda t: 0.5 + 0.5 * math.cos(math.pi * t / steps),
    }
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors[schedule])


class SecondOrder(Training):
    """A step of CurveBall.

    Args:
        task: what is trained.
        net: likewise.
        schedule: "constant" or "cosine".
        options: the optimizer's.
    """

    def __init__(self, task: Task, net: nn.Module, schedule: str = "constant", **options: Any) -> None:
        self.task, self.net = task, net
        self.optimizer = CurveBall(net.parameters(), **options)
        self.scheduler = scheduler(self.optimizer, schedule, task.steps)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        loss, _ = self.optimizer.step(lambda: self.net(x), lambda outputs: self.task.loss_fn(outputs, y))
        self.scheduler.step()
        return loss


KRONECKER = {"preconditioner": "kronecker"}
_SETTINGS: dict[str, dict[str, Any]] = {
    "CurveBall": {},
    "Kronecker": KRONECKER,
    "Kronecker, cosine": KRONECKER | {"schedule": "cosine"},
    "Kronecker, residual, solve in every step": KRONECKER | {"direction": "residual", "solve_interval": 1},
    "Kronecker, solve every 5th": KRONECKER | {"solve_interval": 5},
    "Kronecker, solve every 20th": KRONECKER | {"solve_interval": 20},
    "Kronecker, λ 30": KRONECKER | {"lambd": 30.0},
    "Kronecker, λ 300": KRONECKER | {"lambd": 300.0},
    "Kronecker, average 0.8": KRONECKER | {"average": 0.8},
    "Kronecker, average 0.95": KRONECKER | {"average": 0.95},
}
CURVEBALL = {name: Method(name, SecondOrder, options, ("curveball_fused",)) for name, options in _SETTINGS.items()}
