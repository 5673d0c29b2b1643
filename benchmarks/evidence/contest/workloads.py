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
        task: whose epochs are the budget.
        rows: of its validation set that are evaluated, the first ones.
    """

    task: Task
    rows: int

    @property
    def about(self) -> str:
        return self.task.about

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


def _of_the_study(name: str, about: str, **changed: int) -> Task:
    return replace(TASKS[name], about=about, **changed)  # type: ignore[arg-type]


WORKLOADS: dict[str, Workload] = {
    "conv_bn": Workload(_of_the_study("conv_bn", "Conv net, batch norm", batch=32, epochs=1), 500),
    "lenet": Workload(_of_the_study("lenet_32", "LeNet", epochs=2), 500),
    "mlp": Workload(_of_the_study("mlp", "Perceptron", epochs=4), 2000),
    "lstm": Workload(_of_the_study("lstm", "LSTM", epochs=5), 128),
    "gpt": Workload(
        Task("GPT", "reported", lambda: GPT(32, 2, 2), data.text, nets.cross_entropy, batch=16, epochs=4), 128
    ),
    "teacher": Workload(_of_the_study("teacher", "Regression", epochs=24), 1000),
    "burgers": Workload(_of_the_study("burgers", "PINN, full batch", epochs=500), 1024),
    "friedman": Workload(
        Task(
            "Regression, full batch",
            "reported",
            lambda: nets.perceptron(10, 16, 16, 1, activation=nn.Tanh),
            friedman,
            F.mse_loss,
            batch=None,
            epochs=2000,
        ),
        1000,
    ),
}
