"""The contest's eight workloads: six on which the study reports, two new ones, none that settings were chosen on.

They have step budgets of their own, so that a run takes seconds.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from sklearn.datasets import make_friedman1
from torch import Tensor, nn

from benchmarks.study import data, nets
from benchmarks.study.data import Data
from benchmarks.study.tasks import TASKS, Task
from benchmarks.transformer_nets import GPT


@dataclass(frozen=True)
class Workload:
    """A task with a step budget.

    Attributes:
        title: as in tables.
        about: net and data.
        task: whose epochs are the budget.
        rows: of its validation set that are evaluated, the first ones.
    """

    title: str
    about: str
    task: Task
    rows: int

    @property
    def deterministic(self) -> bool:
        """Whether every step sees all rows."""
        return self.task.batch is None

    @property
    def budget(self) -> int:
        """Steps, in which the trials end and by which targets are made."""
        return self.task.steps

    def batches(self, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """So many batches, in as many epochs as they take."""
        return itertools.islice(replace(self.task, epochs=sys.maxsize).batches(seed), steps)

    def validation_loss(self, net: nn.Module) -> float:
        """The loss that all of the contest is about, of the net in evaluation mode."""
        sets = self.task.load()
        net.eval()
        with torch.set_grad_enabled(self.task.differentiates):
            loss = self.task.loss_fn(net(sets.validation_x[: self.rows]), sets.validation_y[: self.rows]).item()
        net.train()
        return loss


@functools.cache
def friedman() -> Data:
    """Friedman's first function of ten inputs, five of which it depends on, without noise; 1000 points, and 1000."""
    points, values = make_friedman1(2000, noise=0.0, random_state=0)
    x, y = torch.from_numpy(points).float(), torch.from_numpy(values).float()[:, None]
    y = (y - y.mean()) / y.std()
    return Data(x[:1000], y[:1000], x[1000:], y[1000:])


def _small_net() -> nn.Module:
    """One that is small enough for dense matrices."""
    return nets.perceptron(10, 16, 16, 1, activation=nn.Tanh)


WORKLOADS: dict[str, Workload] = {
    "conv_bn": Workload(
        "Conv net, batch norm", "Fashion-MNIST 6,000, batch 32", replace(TASKS["conv_bn"], batch=32, epochs=1), 500
    ),
    "lenet": Workload("LeNet", "Fashion-MNIST 8,000, batch 32", replace(TASKS["lenet_32"], epochs=2), 500),
    "mlp": Workload(
        "Perceptron", "784-256-256-10, Fashion-MNIST 20,000, batch 128", replace(TASKS["mlp"], epochs=4), 2000
    ),
    "lstm": Workload("LSTM", "characters, batch 32", replace(TASKS["lstm"], epochs=5), 128),
    "gpt": Workload(
        "GPT",
        "characters, d 32, 2 layers, batch 16",
        Task("", "reported", lambda: GPT(32, 2, 2), data.text, nets.cross_entropy, batch=16, epochs=4),
        128,
    ),
    "teacher": Workload(
        "Regression", "32-96-96-4, badly scaled inputs, batch 64", replace(TASKS["teacher"], epochs=24), 1000
    ),
    "burgers": Workload(
        "PINN", "Burgers, 2-32-32-32-1, 1,024 points, full batch", replace(TASKS["burgers"], epochs=500), 1024
    ),
    "friedman": Workload(
        "Full-batch regression",
        "10-16-16-1, tanh, Friedman's function at 1,000 points",
        Task("", "reported", _small_net, friedman, F.mse_loss, batch=None, epochs=2000),
        1000,
    ),
}
