"""The study's tasks, in two halves: settings are chosen on one, and reported on the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.study import data, nets
from benchmarks.study.data import Data
from benchmarks.transformer_nets import GPT

CHUNK = 1024  # rows in a call where losses of a whole set are computed


@dataclass(frozen=True)
class Evaluation:
    """Losses of the whole sets in evaluation mode, and the validation set's error if the task has one."""

    train: float
    validation: float
    error: float | None


@dataclass(frozen=True)
class Task:
    """A net, data and a loss.

    Attributes:
        about: what it is, for tables.
        half: "chosen" or "reported".
        build: makes the net.
        load: the data.
        loss_fn: maps outputs and targets to the loss, a mean over rows.
        batch: rows in a batch; None: all of them, in the same order in every step.
        epochs: passes over the training set.
        error: maps net and data to an error of the validation set; None: there is none.
        differentiates: whether the net calls `torch.autograd.grad` itself.
    """

    about: str
    half: str
    build: Callable[[], nn.Module]
    load: Callable[[], Data]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    batch: int | None
    epochs: int
    error: Callable[[nn.Module, Data], float] | None = None
    differentiates: bool = False

    @property
    def steps(self) -> int:
        rows = len(self.load().x)
        return self.epochs * (rows // (self.batch or rows))

    def make(self, seed: int) -> nn.Module:
        """The net with the initial weights that belong to the seed."""
        torch.manual_seed(seed)
        return self.build()

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All batches of a run; an incomplete last batch of an epoch is left out."""
        x, y = self.load().x, self.load().y
        order = torch.Generator().manual_seed(seed)
        for _ in range(self.epochs):
            if self.batch is None:
                yield x, y
                continue
            kept = len(x) // self.batch * self.batch
            for rows in torch.randperm(len(x), generator=order)[:kept].split(self.batch):
                yield x[rows], y[rows]

    def evaluate(self, net: nn.Module) -> Evaluation:
        sets = self.load()
        net.eval()
        train = self._mean_loss(net, sets.x, sets.y)
        validation = self._mean_loss(net, sets.validation_x, sets.validation_y)
        with torch.no_grad():
            error = self.error(net, sets) if self.error else None
        net.train()
        return Evaluation(train, validation, error)

    def _mean_loss(self, net: nn.Module, x: Tensor, y: Tensor) -> float:
        total = 0.0
        with torch.set_grad_enabled(self.differentiates):
            for inputs, targets in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
                total += self.loss_fn(net(inputs), targets).item() * len(inputs)
        return total / len(x)


def misclassified(net: nn.Module, sets: Data) -> float:
    """The share of the validation set."""
    wrong = 0
    for x, y in zip(sets.validation_x.split(CHUNK), sets.validation_y.split(CHUNK), strict=True):
        wrong += int((net(x).argmax(-1) != y.flatten()).sum())
    return wrong / sets.validation_y.numel()


def distance_from(solution: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, Data], float]:
    """The distance of a PINN's u from the equation's solution at the points of the validation set, relative, in L2."""

    def error(net: nn.Module, sets: Data) -> float:
        assert isinstance(net, nets.Pinn)
        inside = sets.validation_x[:, :2]
        exact = solution(inside)
        return float((net.u(inside)[:, 0] - exact).norm() / exact.norm())

    return error


def _classify(
    about: str, half: str, build: Callable[[], nn.Module], load: Callable[[], Data], batch: int, epochs: int
) -> Task:
    return Task(about, half, build, load, nets.cross_entropy, batch, epochs, misclassified)


def _fit(
    about: str, half: str, build: Callable[[], nn.Module], load: Callable[[], Data], batch: int | None, epochs: int
) -> Task:
    return Task(about, half, build, load, F.mse_loss, batch, epochs)


def _solve(
    about: str,
    half: str,
    build: Callable[[], nn.Module],
    load: Callable[[], Data],
    batch: int | None,
    epochs: int,
    solution: Callable[[Tensor], Tensor],
) -> Task:
    return Task(about, half, build, load, F.mse_loss, batch, epochs, distance_from(solution), differentiates=True)


def _fashion(number: int, flat: bool = False) -> Callable[[], Data]:
    return functools.partial(data.fashion, number, flat)


TASKS: dict[str, Task] = {
    "digits_conv": _classify("conv + BN, digits, batch 128", "chosen", nets.digits_conv, data.digits, 128, 18),
    "autoencoder": _fit(
        "autoencoder 784-256-64-16, Fashion-MNIST 8,000, batch 128",
        "chosen",
        lambda: nets.perceptron(784, 256, 64, 16, 64, 256, 784),
        lambda: data.reconstruction(data.fashion(8000)),
        128,
        8,
    ),
    "gpt": _classify(
        "character GPT, d 64, 2 layers, text, batch 32", "chosen", lambda: GPT(64, 2, 2), data.text, 32, 4
    ),
    "vit": _classify("ViT, d 64, 2 layers, Fashion-MNIST 6,000, batch 64", "chosen", nets.vit, _fashion(6000), 64, 4),
    "regression": _fit(
        "regression 8-64-64-1, tanh, batch 128",
        "chosen",
        lambda: nets.perceptron(8, 64, 64, 1, activation=nn.Tanh),
        data.regression,
        128,
        25,
    ),
    "gru": _classify("GRU over rows, Fashion-MNIST 6,000, batch 64", "chosen", nets.RowGRU, _fashion(6000), 64, 5),
    "poisson": _solve(
        "PINN, Poisson 2-48-48-48-1, 4,096 points, batch 512",
        "chosen",
        lambda: nets.Pinn((2, 48, 48, 48, 1), "poisson"),
        data.poisson,
        512,
        75,
        data.poisson_solution,
    ),
    "full_batch": _fit(
        "autoencoder 64-48-24-8, digits, full batch",
        "chosen",
        lambda: nets.perceptron(64, 48, 24, 8, 24, 48, 64, activation=nn.Tanh),
        lambda: data.reconstruction(data.digits()),
        None,
        600,
    ),
    "conv_bn": _classify("conv + BN, Fashion-MNIST 6,000, batch 64", "reported", nets.conv_bn, _fashion(6000), 64, 4),
    "resnet": _classify(
        "ResNet, 16 to 64 channels, Fashion-MNIST 6,000, batch 64", "reported", nets.resnet, _fashion(6000), 64, 4
    ),
    "mlp": _classify(
        "MLP 784-256-256-10, Fashion-MNIST 20,000, batch 128",
        "reported",
        lambda: nets.perceptron(784, 256, 256, 10),
        _fashion(20_000, flat=True),
        128,
        3,
    ),
    "mlp_2048": _classify(
        "MLP 784-128-128-10, Fashion-MNIST 40,960, batch 2,048",
        "reported",
        lambda: nets.perceptron(784, 128, 128, 10),
        _fashion(40_960, flat=True),
        2048,
        15,
    ),
    "lenet_32": _classify(
        "LeNet without norms, Fashion-MNIST 8,000, batch 32", "reported", nets.lenet, _fashion(8000), 32, 4
    ),
    "lstm": _classify("character LSTM, text, batch 32", "reported", nets.CharacterLSTM, data.text, 32, 5),
    "gpt_deep": _classify(
        "character GPT, d 128, 4 layers, text, batch 32", "reported", lambda: GPT(128, 4, 4), data.text, 32, 2
    ),
    "teacher": _fit(
        "regression 32-96-96-4, badly scaled inputs, batch 64",
        "reported",
        lambda: nets.perceptron(32, 96, 96, 4),
        data.teacher,
        64,
        12,
    ),
    "burgers": _solve(
        "PINN, Burgers 2-32-32-32-1, 1,024 points, full batch",
        "reported",
        lambda: nets.Pinn((2, 32, 32, 32, 1), "burgers"),
        data.burgers,
        None,
        800,
        data.burgers_solution,
    ),
}
