"""What the study calls a method: an optimizer with all its options."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from curveball_fused import CurveBall
from curveball_fused.preconditioners import bases, blocks, preconditioner

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
        constants: those of `curveball_fused`, by module and name, that are others than its own in this process.
        one_sided_tables: whether the rows of embedding tables have no factor.
        damping_by_curvature: whether the first λ is that of the first batch's gradient r, r·Gr / r·r.
        options: the optimizer's.
    """

    def __init__(
        self,
        task: Task,
        net: nn.Module,
        schedule: str = "constant",
        constants: Mapping[str, Any] = MappingProxyType({}),
        one_sided_tables: bool = False,
        damping_by_curvature: bool = False,
        **options: Any,
    ) -> None:
        self.task, self.net = task, net
        for path, value in (_OWN | constants).items():
            module, name = path.rsplit(".", 1)
            setattr(import_module(f"curveball_fused.{module}"), name, value)
        if one_sided_tables:
            tables = {id(m.weight) for m in net.modules() if isinstance(m, nn.Embedding)}
            blocks._lengths = lambda p: _LENGTHS(p) | ({"left": 0} if id(p) in tables else {})
        if damping_by_curvature:
            options["lambd"] = _curvature(task, net)
        self.optimizer = CurveBall(net.parameters(), **options)
        self.scheduler = scheduler(self.optimizer, schedule, task.steps)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        loss, _ = self.optimizer.step(lambda: self.net(x), lambda outputs: self.task.loss_fn(outputs, y))
        self.scheduler.step()
        return loss


def _curvature(task: Task, net: nn.Module) -> float:
    """Return r·Gr / r·r of a net's first batch: a first step, where z = 0, has β = r·r / (r·Gr + λ r·r)."""
    net = copy.deepcopy(net)
    optimizer = CurveBall(net.parameters(), lambd=1.0)
    x, y = next(task.batches(0))
    optimizer.step(lambda: net(x), lambda outputs: task.loss_fn(outputs, y))
    return max(1 / float(optimizer.stats()["beta"]) - 1, 1e-6)


KRONECKER = {"preconditioner": "kronecker"}
_EVERY_STEP: dict[str, Any] = {"direction": "residual", "solve_interval": 1}
_EVERY_TENTH = KRONECKER | {"solve_interval": 10}  # as the default was until the last of the settings below
_EARLY = "preconditioners.bases.EARLY_REFRESHES", "step.EARLY_SOLVES"
_LENGTHS = blocks._lengths
_OWN: dict[str, Any] = {
    **dict.fromkeys(_EARLY, bases.EARLY_REFRESHES),
    "preconditioners.preconditioner.DECAY": preconditioner.DECAY,
    "preconditioners.preconditioner.EPSILON": preconditioner.EPSILON,
    "preconditioners.blocks.LARGEST_BASIS": blocks.LARGEST_BASIS,
    "preconditioners.blocks.LARGEST_SIDE": blocks.LARGEST_SIDE,
    "preconditioners.blocks._lengths": _LENGTHS,
    "preconditioners.bases.INTERVAL": bases.INTERVAL,
    "preconditioners.bases.GATHER_INTERVAL": bases.GATHER_INTERVAL,
}


def _with(solve_interval: int = 10, **values: Any) -> dict[str, Any]:
    """The Kronecker metric with other constants of these names."""
    return KRONECKER | {
        "solve_interval": solve_interval,
        "constants": {path: values[name] for path in _OWN if (name := path.rsplit(".")[-1]) in values},
    }


_SETTINGS: dict[str, dict[str, Any]] = {
    "CurveBall": {},
    "Kronecker": KRONECKER,
    "Kronecker, cosine": KRONECKER | {"schedule": "cosine"},
    "Kronecker, weight decay 0.01": KRONECKER | {"weight_decay": 0.01},  # of the weights in every step: too much
    "Kronecker, weight decay 0.0001": KRONECKER | {"weight_decay": 1e-4},  # AdamW's at a rate of 0.001 and 0.1
    "Kronecker, residual, solve in every step": KRONECKER | _EVERY_STEP,
}
# Then these.
_SETTINGS |= {
    f"Kronecker, λ {lambd}, average {average}": _EVERY_TENTH | {"lambd": float(lambd), "average": average}
    for lambd, average in ((100, 0.9), (30, 0.9), (30, 0.8), (30, 0.6), (30, 0.3), (30, 0), (10, 0.8), (10, 0.5))
}
_SETTINGS |= {
    "Kronecker, solve every 10th": _EVERY_TENTH,
    "Kronecker, ten early solves": _EVERY_TENTH | {"constants": dict.fromkeys(_EARLY, tuple(range(10)))},
    "Kronecker, early solves in steps 0, 2 and 6": _EVERY_TENTH | {"constants": dict.fromkeys(_EARLY, (0, 2, 6))},
    "Kronecker, gather every 4th": _with(GATHER_INTERVAL=4),
    "Kronecker, solve every 20th": KRONECKER | {"solve_interval": 20},
    "Kronecker, solve every 40th": KRONECKER | {"solve_interval": 40},
    "Kronecker, solve every 20th, refresh every 40th": _with(20, INTERVAL=40),
    "Kronecker, solve every 20th, λ's factor 0.98": KRONECKER | {"solve_interval": 20, "lambda_factor": 0.98},
}
# And these, beside the defaults that came out of all that.
_DIAGONAL = {"LARGEST_SIDE": 1}  # no side is as short
_SETTINGS |= {
    "Kronecker, ε 1e-10": _with(20, EPSILON=1e-10),
    "Kronecker, ε 1e-6": _with(20, EPSILON=1e-6),
    "Kronecker, λ's thresholds 0.25 and 0.75": KRONECKER | {"lambda_low": 0.25, "lambda_high": 0.75},
    "Kronecker, one-sided tables": KRONECKER | {"one_sided_tables": True},
    "Diagonal": _with(20, **_DIAGONAL),
    "Diagonal, λ 100": _with(20, **_DIAGONAL) | {"lambd": 100.0},
    "Diagonal, decay 0.999": _with(20, **_DIAGONAL, DECAY=0.999),
    "Diagonal, decay 0.999, λ 100, average 0.9, solve every 10th": _with(**_DIAGONAL, DECAY=0.999)
    | {"lambd": 100.0, "average": 0.9},
    "Diagonal, decay 0.999, residual, solve in every step": _with(**_DIAGONAL, DECAY=0.999) | _EVERY_STEP,
    "CurveBall, λ's factor 0.97": {"lambda_factor": 0.97},
    "CurveBall, λ from r·Gr / r·r": {"damping_by_curvature": True},
    "CurveBall, λ from r·Gr / r·r, factor 0.97": {"damping_by_curvature": True, "lambda_factor": 0.97},
    "CurveBall, λ from r·Gr / r·r, factor 0.97, gradient": {
        "damping_by_curvature": True,
        "lambda_factor": 0.97,
        "direction": "gradient",
    },
}
# And last, where every step has the same batch.
_SETTINGS["Kronecker, solve every 5th"] = KRONECKER | {"solve_interval": 5}
# Chosen from first, when these were the constants and β had no bound between solves.
_SCREENED: dict[str, dict[str, Any]] = {
    "Kronecker": _EVERY_TENTH,
    "Kronecker, λ 30": _EVERY_TENTH | {"lambd": 30.0},
    "Kronecker, λ's factor 0.95": _EVERY_TENTH | {"lambda_factor": 0.95},
    "Kronecker, solve every 20th": KRONECKER | {"solve_interval": 20},
    "Kronecker, average 0.8": _EVERY_TENTH | {"average": 0.8},
    "Kronecker, average 0.95": _EVERY_TENTH | {"average": 0.95},
    "Kronecker, ρ 0.9": _EVERY_TENTH | {"rho": 0.9},
    "Kronecker, decay 0.9": _with(DECAY=0.9),
    "Kronecker, bases of 128, decay 0.9": _with(LARGEST_BASIS=128, DECAY=0.9),
    "Kronecker, bases of 64, decay 0.9": _with(LARGEST_BASIS=64, DECAY=0.9),
    "Kronecker, bases of 128, decay 0.9, refresh every 20th": _with(LARGEST_BASIS=128, DECAY=0.9, INTERVAL=20),
}
_AT_FIRST = _with(DECAY=0.95, LARGEST_BASIS=1024, INTERVAL=10)["constants"]


def _screened(options: dict[str, Any]) -> dict[str, Any]:
    return options | {"constants": _AT_FIRST | options.get("constants", {})}


CURVEBALL = {
    name: Method(name, SecondOrder, options, ("curveball_fused",))
    for name, options in (
        _SETTINGS | {f"Screening: {name}": _screened(options) for name, options in _SCREENED.items()}
    ).items()
}
