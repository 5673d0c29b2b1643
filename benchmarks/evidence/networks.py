"""Train the networks of the method's experiments by CurveBall, SGD, Adam and AdamW.

    python -m benchmarks.evidence.networks
    python -m benchmarks.evidence.networks --only mlp

SGD, Adam and AdamW run at every rate of their grids with one seed; at the best they run with two others, as CurveBall
does with nothing to choose. Nets with dropout run with one seed, at the rates of those without. Losses by step do not
depend on how busy the machine is; seconds are measured by `benchmarks.evidence.network_times`. It takes most of an hour
on one core, and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.evidence.network_tasks import NETWORKS, Network, error
from benchmarks.evidence.records import Record, Records
from curveball_fused import CurveBall

RECORDS = Records("networks", ("network", "method", "setting", "seed"))
CHOOSING_SEED = 0
SEEDS = 1, 2
PARTS = 10  # of a run, of each of which the mean loss is kept

Setting = dict[str, float]
KRONECKER, ADAPTING, FIXED = (
    "CurveBall, Kronecker metric",
    "CurveBall, as published",
    "CurveBall, as published, fixed λ",
)
METHODS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    KRONECKER: lambda params: CurveBall(params, preconditioner="kronecker"),
    ADAPTING: lambda params, lambd: CurveBall(params, lambd=lambd),
    FIXED: lambda params, lambd: CurveBall(params, lambd=lambd, auto_lambda=False),
    "SGD": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9, fused=True),
    "Adam": lambda params, lr: torch.optim.Adam(params, lr=lr, fused=True),
    "AdamW": lambda params, lr: torch.optim.AdamW(params, lr=lr, fused=True),
}
CURVEBALLS = KRONECKER, ADAPTING, FIXED
GRIDS: dict[str, tuple[float, ...]] = {
    "SGD": (0.1, 0.03, 0.01, 0.003),
    "Adam": (1e-2, 3e-3, 1e-3, 3e-4),
    "AdamW": (1e-2, 3e-3, 1e-3, 3e-4),
}


class Training:
    """A net of a network under one method."""

    def __init__(self, network: Network, method: str, setting: Setting, seed: int) -> None:
        self.loss_fn = network.task.loss_fn
        self.net: nn.Module = network.task.make(seed)
        self.optimizer = METHODS[method](self.net.parameters(), **setting)

    def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Take a step; return the batch's loss and the share of it that was misclassified, both before the step."""
        if isinstance(self.optimizer, CurveBall):
            loss, outputs = self.optimizer.step(lambda: self.net(x), lambda outputs: self.loss_fn(outputs, y))
        else:
            self.optimizer.zero_grad()
            outputs = self.net(x)
            loss = self.loss_fn(outputs, y)
            loss.backward()
            self.optimizer.step()
        return loss.detach(), (outputs.argmax(-1) != y).float().mean()


def train(network: Network, method: str, setting: Setting, seed: int) -> dict[str, Any]:
    """Train until the last step, or until the loss is not finite; there are no final errors then."""
    task = network.task
    training = Training(network, method, setting, seed)
    seen: list[tuple[float, float]] = []
    for x, y in task.batches(seed):
        loss, wrong = training.step(x, y)
        seen.append((loss.item(), wrong.item()))
        if not math.isfinite(seen[-1][0]):
            break
    whole = len(seen) == task.steps and math.isfinite(seen[-1][0])
    sets = task.load()
    finals = {"train_error": (sets.x, sets.y), "validation_error": (sets.validation_x, sets.validation_y)}
    return {
        "steps": task.steps,
        "losses": parts([loss for loss, _ in seen], task.steps),
        "errors": parts([wrong for _, wrong in seen], task.steps),
    } | {name: round(error(training.net, *images), 5) if whole else None for name, images in finals.items()}


def parts(values: list[float], steps: int) -> list[float]:
    """Return the mean of each tenth of all steps, five digits of it; nan where values are missing."""
    padded = np.array(values + [math.nan] * (steps - len(values)))
    return [float(f"{part.mean():.4e}") for part in np.array_split(padded, PARTS)]


def setting_of(records: Sequence[Record], network: str, method: str) -> Setting:
    """Return a method's setting: that of its grid with the lowest loss in the last tenth; CurveBall's own otherwise."""
    if method in GRIDS:
        runs = select(records, NETWORKS[network].like or network, method, [CHOOSING_SEED])
        chosen: Setting = min(runs, key=final_loss)["setting"]
        return chosen
    return {} if method == KRONECKER else {"lambd": NETWORKS[network].lambd}


def final_loss(run: Record) -> float:
    """Return the mean training loss of the last tenth; the raw data have None where it was not finite."""
    return math.inf if run["losses"][-1] is None else float(run["losses"][-1])


def seeds_of(network: str) -> Sequence[int]:
    """Return the seeds that are reported: one where the rates are those of another network."""
    return SEEDS if NETWORKS[network].like is None else SEEDS[:1]


def select(records: Sequence[Record], network: str, method: str, seeds: Sequence[int]) -> list[Record]:
    return [run for run in records if (run["network"], run["method"]) == (network, method) and run["seed"] in seeds]


def grid_runs(network: str) -> Iterator[Record]:
    """Give the keys of the runs that choose."""
    for method, rates in GRIDS.items():
        for lr in rates:
            yield {"network": network, "method": method, "setting": {"lr": lr}, "seed": CHOOSING_SEED}


def reported_runs(records: Sequence[Record], network: str) -> Iterator[Record]:
    """Give the keys of the runs that are reported, once those that choose are there."""
    for seed in seeds_of(network):
        for method in METHODS:
            setting = setting_of(records, network, method)
            yield {"network": network, "method": method, "setting": setting, "seed": seed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), metavar="NETWORK")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.only:
        _make(grid_runs(NETWORKS[name].like or name))
        _make(reported_runs(RECORDS.read(), name))
    return 0


def _make(runs: Iterator[Record]) -> None:
    for run in RECORDS.missing(runs):
        RECORDS.add(run | train(NETWORKS[run["network"]], run["method"], run["setting"], run["seed"]))


if __name__ == "__main__":
    sys.exit(main())
