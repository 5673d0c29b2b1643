"""What the cheaper and steadier steps cost and are worth, on real data: `python -m benchmarks.economy --data-dir DIR`.

Time of a step over fused momentum SGD's, taken in turn, and the training loss after equal epochs and at equal seconds:
the mean over the last epoch, and over the steps, up to an epoch, that fit in the time of SGD's whole run.

Figures go to build/benchmarks/; with CURVEBALL_RESULTS=benchmarks/results they replace those that are kept there.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import nets
from benchmarks.compare import compare
from benchmarks.report import Report, results_folder
from curveball_fused import CurveBall

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from demo_data import FASHION_DIR, fashion_mnist

Step = Callable[[Tensor, Tensor], Tensor]  # inputs and classes to the loss before the step
ROUNDS = 7
SGD = "SGD 0.1"


@dataclass
class Task:
    """A net and data; `epochs` and `seeds` keep a table within minutes."""

    build: Callable[[], nn.Module]
    data: Callable[[Path], tuple[Tensor, Tensor]]
    epochs: int
    seeds: int

    def start(self, data: tuple[Tensor, Tensor], batch: int, seed: int) -> tuple[nn.Module, Iterator[Any]]:
        """The net and all batches of a run; an incomplete last batch of an epoch is left out."""
        torch.manual_seed(seed)
        net, order, (x, y) = self.build(), torch.Generator().manual_seed(seed), data
        kept = len(x) // batch * batch

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for _ in range(self.epochs):
                for rows in torch.randperm(len(x), generator=order)[:kept].split(batch):
                    yield x[rows], y[rows].flatten()

        return net, batches()


@dataclass
class Runs:
    """Losses of every step of each seed, and the largest momentum."""

    losses: list[Tensor] = field(default_factory=list)
    rho: float | None = None

    def mean(self, last: int, width: int) -> str:
        """Mean and deviation over the seeds of the mean loss of `width` steps up to step `last`."""
        values = [losses[max(0, last - width) : last].mean().item() for losses in self.losses]
        if not all(map(math.isfinite, values)):
            return "diverged"
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def torch_optimizer(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[nn.Module], Step]:
    def start(net: nn.Module) -> Step:
        optimizer = make(net.parameters(), fused=True, **options)

        def step(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    return start


def curveball(part: int = 1, **options: Any) -> Callable[[nn.Module], Step]:
    """CurveBall, with the curvature of the first `1 / part` of each batch."""

    def start(net: nn.Module) -> Step:
        optimizer = CurveBall(net.parameters(), **options)

        def step(x: Tensor, y: Tensor) -> Tensor:
            few = x[: len(x) // part], y[: len(y) // part]
            curvature_batch = (lambda: net(few[0]), lambda out: F.cross_entropy(out, few[1])) if part > 1 else None
            loss, _ = optimizer.step(
                lambda: net(x), lambda out: F.cross_entropy(out, y), curvature_batch=curvature_batch
            )
            return loss

        step.largest_rho = lambda: optimizer.history()["rho"].max().item()  # type: ignore[attr-defined]
        return step

    return start


METHODS: dict[str, Callable[[nn.Module], Step]] = {
    SGD: torch_optimizer(torch.optim.SGD, lr=0.1, momentum=0.9),
    "SGD 0.03": torch_optimizer(torch.optim.SGD, lr=0.03, momentum=0.9),
    "Adam 0.001": torch_optimizer(torch.optim.Adam, lr=1e-3),
    "CurveBall": curveball(),
    "average=0.8": curveball(average=0.8),
    "gradient, average=0.8, solve_interval=2": curveball(direction="gradient", average=0.8, solve_interval=2),
    "gradient, average=0.8, solve_interval=4": curveball(direction="gradient", average=0.8, solve_interval=4),
    "gradient, average=0.8, solve_interval=8": curveball(direction="gradient", average=0.8, solve_interval=8),
    "gradient, solve_interval=4": curveball(direction="gradient", solve_interval=4),
    "average=0.8, curvature of 1/4": curveball(4, average=0.8),
    "average=0.8, curvature of 1/8": curveball(8, average=0.8),
    "gradient, average=0.8, curvature of 1/8, solve_interval=4": curveball(
        8, direction="gradient", average=0.8, solve_interval=4
    ),
    "curvature of 1/4": curveball(4),
}


def basic_bn() -> nn.Module:
    """`nets.basic_bn` for one channel."""
    net = nets.basic_bn()
    assert isinstance(net, nn.Sequential)
    net[0] = nn.Conv2d(1, 32, 5, padding=2)
    return net


def images(directory: Path, number: int = 60_000) -> tuple[Tensor, Tensor]:
    data = fashion_mnist(directory)
    return data.train_images[:number], data.train_classes[:number]


def pixels(directory: Path) -> tuple[Tensor, Tensor]:
    x, y = images(directory)
    return x.flatten(1), y


def source_text(_: Path) -> tuple[Tensor, Tensor]:
    """1 MB of Python's own library, 2048 pieces of it; printable ASCII and the line break."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    raw = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))[:1_000_000]
    codes = torch.tensor([0 if c == 10 else c - 31 for c in raw if c == 10 or 32 <= c < 127])
    pieces = (len(codes) - 1) // nets.CONTEXT
    x, y = (codes[i : i + pieces * nets.CONTEXT].view(pieces, nets.CONTEXT) for i in (0, 1))
    rows = torch.randperm(pieces, generator=torch.Generator().manual_seed(0))[:2048]
    return x[rows], y[rows]


TASKS = {
    "mlp": Task(nets.mlp, pixels, epochs=3, seeds=3),
    "basic_bn": Task(basic_bn, lambda directory: images(directory, 10_000), epochs=3, seeds=2),
    "gpt": Task(nets.GPT, source_text, epochs=3, seeds=2),
}


def measure(name: str, batch: int, methods: dict[str, Callable[[nn.Module], Step]], directory: Path) -> list[Any]:
    """The table's rows."""
    task = TASKS[name]
    data = task.data(directory)
    runs = {method: Runs() for method in methods}
    for method, start in methods.items():
        for seed in range(task.seeds):
            net, batches = task.start(data, batch, seed)
            step = start(net)
            runs[method].losses.append(torch.stack([step(x, y) for x, y in batches]))
            if hasattr(step, "largest_rho"):
                runs[method].rho = max(step.largest_rho(), runs[method].rho or 0.0)

    calls: dict[str, Callable[[], object]] = {}
    turn = 20  # steps, so that every kind of step has its share, updates of λ included
    for method, start in methods.items():
        net, batches = task.start(data, batch, 0)
        step, (x, y) = start(net), next(batches)
        calls[method] = lambda step=step, x=x, y=y: [step(x, y) for _ in range(turn)]
        step(x, y)
    times = compare(calls, SGD, rounds=ROUNDS, units=turn)

    epoch = len(data[0]) // batch
    rows = []
    for method, own in runs.items():
        ratio = times[method].ratio
        affordable = min(epoch * task.epochs, round(epoch * task.epochs / ratio.median))
        rows.append(
            {"": method}
            | ratio.columns("time / SGD")
            | {"loss, equal epochs": own.mean(epoch * task.epochs, epoch)}
            | {"loss, equal seconds": own.mean(affordable, epoch // 4), "ρ max": own.rho}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=FASHION_DIR)
    parser.add_argument("--only", nargs="*", default=["mlp:128", "mlp:512", "mlp:2048"], help="net:batch")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(results_folder(), "economy", "python -m benchmarks.economy")
    methods = {SGD: METHODS[SGD]} | {name: METHODS[name] for name in given.methods}
    for case in given.only:
        name, batch = case.split(":")
        task = TASKS[name]
        rows = measure(name, int(batch), methods, given.data_dir)
        report.add(
            f"Economy: {name}, batch {batch}",
            f"Time of a step over SGD's (median, 20th and 80th percentile of {ROUNDS} rounds in turn); mean training "
            f"loss (± deviation over {task.seeds} seeds) of the last of {task.epochs} epochs, and of a quarter of an "
            f"epoch's steps up to the time that SGD takes for {task.epochs} epochs.",
            rows,
        )
        print(report.measured[-1].markdown(), flush=True)


if __name__ == "__main__":
    main()
