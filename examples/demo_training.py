"""The demo's net, its optimizers, and one training run with its measurements."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from demo_data import Data
from torch import Tensor, nn
from torch.optim import Optimizer

from curveball_fused import CurveBall

MEASUREMENTS = 20  # of loss and error, spread evenly over a run
MEASURED_IMAGES = 5_000  # of the training set, for its loss: all of a small one
STATS = ("rho", "beta", "lambd")

# CurveBall with no number given; the baselines at usual rates, in torch's fastest implementation.
OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "CurveBall, Kronecker metric": lambda params: CurveBall(params, preconditioner="kronecker"),
    "CurveBall, as published": CurveBall,
    "SGD (lr 0.1, momentum 0.9)": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
    "Adam (lr 0.001)": lambda params: torch.optim.Adam(params, lr=1e-3, fused=True),
}


@dataclass
class Run:
    """What one run showed: a value per measurement, and for CurveBall a value of each of STATS per step."""

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # spent in steps so far, without measuring
    train_loss: list[float] = field(default_factory=list)
    test_error: list[float] = field(default_factory=list)  # in percent
    stats: dict[str, list[float]] = field(default_factory=dict)


def net(seed: int) -> nn.Module:
    """Return a small convolutional net with batch norm for one-channel images of any size, and 10 classes."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs, pool in (
        (1, 16, nn.MaxPool2d(2)),
        (16, 32, nn.MaxPool2d(2)),
        (32, 64, nn.AdaptiveAvgPool2d(1)),
    ):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU(), pool]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10))


def train(name: str, data: Data, seed: int, epochs: int, batch_size: int, on_step: Callable[[], object]) -> Run:
    """Train a net with OPTIMIZERS[name]; the seed fixes its first weights and the order of the batches.

    The clock runs during steps alone (forward, backward, update): not while data are gathered, the net is
    measured or `stats()` is called, whose tensors are read when the run is over. An incomplete last batch of
    an epoch is left out, as is usual with batch norm.
    """
    model = net(seed)
    optimizer = OPTIMIZERS[name](model.parameters())
    order = torch.Generator().manual_seed(seed)
    steps = steps_per_epoch(data, batch_size) * epochs
    measured_at = set(np.linspace(0, steps, MEASUREMENTS + 1).round().astype(int).tolist())
    run, stats, step, seconds = Run(), [], 0, 0.0
    _measure(run, model, data, step, seconds)
    for _ in range(epochs):
        shuffled = torch.randperm(len(data.train_images), generator=order)
        for batch in shuffled[: len(shuffled) // batch_size * batch_size].split(batch_size):
            images, classes = data.train_images[batch], data.train_classes[batch]
            start = time.perf_counter()
            _step(optimizer, model, images, classes)
            seconds += time.perf_counter() - start
            step += 1
            if isinstance(optimizer, CurveBall):
                stats.append(optimizer.stats())
            if step in measured_at:
                _measure(run, model, data, step, seconds)
            on_step()
    if stats:
        run.stats = {key: torch.stack([s[key] for s in stats]).tolist() for key in STATS}
    return run


def warm_up(data: Data, batch_size: int) -> None:
    """Take two steps of each optimizer with a net that is thrown away: no run pays for what is set up once."""
    for make in OPTIMIZERS.values():
        model = net(seed=0)
        optimizer = make(model.parameters())
        for _ in range(2):
            _step(optimizer, model, data.train_images[:batch_size], data.train_classes[:batch_size])


def steps_per_epoch(data: Data, batch_size: int) -> int:
    return len(data.train_images) // batch_size


def _step(optimizer: Optimizer, model: nn.Module, images: Tensor, classes: Tensor) -> None:
    if isinstance(optimizer, CurveBall):
        optimizer.step(lambda: model(images), lambda outputs: F.cross_entropy(outputs, classes))
    else:
        optimizer.zero_grad()
        F.cross_entropy(model(images), classes).backward()
        optimizer.step()


@torch.no_grad()
def _measure(run: Run, model: nn.Module, data: Data, step: int, seconds: float) -> None:
    """Measure the net as it would be used, batch norm with its running statistics: the same way for all."""
    model.eval()
    loss = error = 0.0
    train_images, train_classes = data.train_images[:MEASURED_IMAGES], data.train_classes[:MEASURED_IMAGES]
    for images, classes in zip(train_images.split(100), train_classes.split(100), strict=True):
        loss += F.cross_entropy(model(images), classes, reduction="sum").item()
    for images, classes in zip(data.test_images.split(100), data.test_classes.split(100), strict=True):
        error += (model(images).argmax(1) != classes).sum().item()
    model.train()
    run.steps.append(step)
    run.seconds.append(seconds)
    run.train_loss.append(loss / len(train_images))
    run.test_error.append(100 * error / len(data.test_images))
