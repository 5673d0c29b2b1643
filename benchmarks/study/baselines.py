"""First-order and Shampoo-like baselines, each with a small grid of rates.

Those that torch lacks come from packages of their own, found only where they are used: `pip install --no-deps
pytorch_optimizer schedulefree prodigyopt`, into the environment or into a folder on PYTHONPATH.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.study.methods import Method, Training, scheduler
from benchmarks.study.tasks import Task

SCHEDULES = "constant", "cosine"
BATCHES_FOR_NORMS = 50  # from which batch norm's statistics are computed anew where the weights are averages


class FirstOrder(Training):
    """A step of an optimizer that reads gradients.

    Args:
        task: what is trained.
        net: likewise.
        optimizer: of the net's parameters.
        schedule: "constant" or "cosine".
    """

    def __init__(self, task: Task, net: nn.Module, optimizer: torch.optim.Optimizer, schedule: str) -> None:
        self.task, self.net, self.optimizer = task, net, optimizer
        self.scheduler = scheduler(optimizer, schedule, task.steps)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.task.loss_fn(self.net(x), y)
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return loss.detach()


class ScheduleFree(FirstOrder):
    """Schedule-Free: it has other weights in training than those that are evaluated."""

    def __init__(self, task: Task, net: nn.Module, optimizer: Any) -> None:
        super().__init__(task, net, optimizer, "constant")
        optimizer.train()

    def finish(self, seed: int) -> None:
        self.optimizer.eval()  # type: ignore[attr-defined]
        with torch.set_grad_enabled(self.task.differentiates):
            for x, _ in itertools.islice(self.task.batches(seed), BATCHES_FOR_NORMS):
                self.net(x)


def _torch(make: Callable[..., torch.optim.Optimizer]) -> Callable[..., Training]:
    def start(task: Task, net: nn.Module, schedule: str, **options: Any) -> Training:
        return FirstOrder(task, net, make(net.parameters(), fused=True, **options), schedule)

    return start


def _soap(task: Task, net: nn.Module, schedule: str, **options: Any) -> Training:
    optimizer = import_module("pytorch_optimizer").SOAP(net.parameters(), **options)
    return FirstOrder(task, net, optimizer, schedule)


def _prodigy(task: Task, net: nn.Module, schedule: str, **options: Any) -> Training:
    return FirstOrder(task, net, import_module("prodigyopt").Prodigy(net.parameters(), **options), schedule)


def _schedule_free(task: Task, net: nn.Module, **options: Any) -> Training:
    return ScheduleFree(task, net, import_module("schedulefree").AdamWScheduleFree(net.parameters(), **options))


def _muon(task: Task, net: nn.Module, schedule: str, lr: float, **options: Any) -> Training:
    """Muon for hidden matrices and convolutions, AdamW for the others; one rate serves both, as Moonlight scales it."""
    hidden = hidden_weights(net)
    ours = {id(p) for p in hidden}
    groups: list[dict[str, Any]] = [{"params": [p for p in net.parameters() if id(p) not in ours], "use_muon": False}]
    if hidden:
        groups.append({"params": hidden, "use_muon": True})
    muon = import_module("pytorch_optimizer").Muon
    return FirstOrder(task, net, muon(groups, lr=lr, adamw_lr=lr, use_adjusted_lr=True, **options), schedule)


def hidden_weights(net: nn.Module) -> list[nn.Parameter]:
    """Weights of linear, convolutional and recurrent layers but the last, which makes the outputs."""
    weights = [
        weight
        for module in net.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.RNNBase))
        for weight in module.parameters(recurse=False)
        if weight.ndim >= 2
    ]
    return weights[:-1]


def _grid(
    name: str,
    start: Callable[..., Training],
    rates: tuple[float, ...],
    packages: tuple[str, ...] = (),
    schedules: tuple[str, ...] = SCHEDULES,
    **options: Any,
) -> Iterator[Method]:
    for lr, schedule in itertools.product(rates, schedules):
        yield Method(f"{name} {lr:g} {schedule}", start, options | {"lr": lr, "schedule": schedule}, packages)


FIRST = [
    *_grid("Adam", _torch(torch.optim.Adam), (3e-2, 1e-2, 3e-3, 1e-3)),
    *_grid("SGD", _torch(torch.optim.SGD), (0.1, 0.03), momentum=0.9),
]
OTHERS = [
    *_grid("SOAP", _soap, (1e-2, 3e-3, 1e-3), ("pytorch-optimizer",), weight_decay=0.0),
    *_grid("Muon", _muon, (1e-2, 3e-3, 1e-3), ("pytorch-optimizer",)),
    *_grid("Prodigy", _prodigy, (1.0,), ("prodigyopt",)),
    *(
        Method(f"Schedule-Free AdamW {lr:g}", _schedule_free, {"lr": lr}, ("schedulefree",))
        for lr in (3e-2, 1e-2, 3e-3)
    ),
]
