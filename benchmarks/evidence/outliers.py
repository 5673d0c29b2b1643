"""What a bad batch does to a training, with and without clipping: `python -m benchmarks.evidence.outliers`.

A small net on scikit-learn's digits. Of every fifty batches one has a loss a hundred times as large: by a factor on the
loss (right classes), or by that factor and classes that are drawn at random (wrong classes). Kept is the loss on all
training images at the end, without any factor.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.evidence.markdown import table
from benchmarks.evidence.records import Records
from curveball_fused import CurveBall

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from demo_data import Data, digits

RECORDS = Records("outliers", ("method", "outliers", "seed"))
STEPS, BATCH, SEEDS, EVERY, FACTOR = 1000, 64, 3, 50, 100.0
Step = Callable[[Tensor, Tensor, float], None]


def adam(net: nn.Module, clip: float | None) -> Step:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def step(x: Tensor, y: Tensor, factor: float) -> None:
        optimizer.zero_grad()
        (factor * F.cross_entropy(net(x), y)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()

    return step


def curveball(net: nn.Module, bound: float = float("inf"), **options: Any) -> Step:
    optimizer = CurveBall(net.parameters(), **options)

    def step(x: Tensor, y: Tensor, factor: float) -> None:
        def loss_fn(outputs: Tensor) -> Tensor:
            loss = factor * F.cross_entropy(outputs, y)
            return loss if bound == float("inf") else loss / (loss.detach() / bound).clamp(min=1)

        optimizer.step(lambda: net(x), loss_fn)

    return step


METHODS: dict[str, Callable[[nn.Module], Step]] = {
    "Adam (lr 0.001)": lambda net: adam(net, None),
    "Adam, clipped to a norm of 1": lambda net: adam(net, 1.0),
    "CurveBall, as published": lambda net: curveball(net),
    "CurveBall, as published, loss bounded by 3": lambda net: curveball(net, 3.0),
    "CurveBall, Kronecker metric": lambda net: curveball(net, preconditioner="kronecker"),
    "CurveBall, Kronecker metric, loss bounded by 3": lambda net: curveball(net, 3.0, preconditioner="kronecker"),
}
OUTLIERS = ("none", "right classes", "wrong classes")


def batches(data: Data, seed: int, outliers: str) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Inputs, classes, and the factor on the loss."""
    drawn = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(STEPS):
        if len(order) < BATCH:
            order = torch.randperm(len(data.train_classes), generator=drawn)
        rows, order = order[:BATCH], order[BATCH:]
        x, y = data.train_images[rows].flatten(1), data.train_classes[rows]
        other = torch.randint(0, 10, y.shape, generator=drawn)
        bad = outliers != "none" and step % EVERY == EVERY // 2  # so that the last step is none
        yield x, other if bad and outliers == "wrong classes" else y, FACTOR if bad else 1.0


def final_loss(method: str, data: Data, seed: int, outliers: str) -> float:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    step = METHODS[method](net)
    for batch in batches(data, seed, outliers):
        step(*batch)
    with torch.no_grad():
        return float(F.cross_entropy(net(data.train_images.flatten(1)), data.train_classes))


def tables() -> dict[str, str]:
    """Return the table of docs/habits.md: mean ± standard deviation over the seeds."""
    losses = {(run["method"], run["outliers"], run["seed"]): run["loss"] for run in RECORDS.read()}
    rows = []
    for method in METHODS:
        each = [[losses[method, outliers, seed] for seed in range(SEEDS)] for outliers in OUTLIERS]
        rows.append([method, *(f"{statistics.mean(found):.2g} ± {statistics.stdev(found):.1g}" for found in each)])
    return {"outliers": table(["", *OUTLIERS], rows)}


def main() -> None:
    torch.set_num_threads(1)
    data = digits()
    keys = itertools.product(METHODS, OUTLIERS, range(SEEDS))
    for run in RECORDS.missing(dict(zip(("method", "outliers", "seed"), key, strict=True)) for key in keys):
        RECORDS.add(run | {"loss": final_loss(run["method"], data, run["seed"], run["outliers"])})


if __name__ == "__main__":
    main()
