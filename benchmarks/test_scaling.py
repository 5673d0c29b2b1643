"""How the time of a step grows with batch, width and depth: a table, and the picture scaling.png.

The arithmetic is proportional to the batch, to the depth and to the square of the width; that a step's time is too, for
CurveBall as for SGD, is what the exponents show: the slopes of straight lines through the logarithms.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor, nn

from benchmarks.compare import Spread, Timing, compare
from benchmarks.nets import Case
from benchmarks.optimizers import KRONECKER, STEPS_OF_A_TURN, WARM_UP, installed
from benchmarks.report import Report, bar
from benchmarks.steps import PLAIN, repeated

ROUNDS = 3
SLOPE_BAR = 1.1  # not faster than linearly; below 1 where something that does not grow still counts
COLORS = {  # told apart by color-blind readers too
    "SGD": "#0072b2",
    "AdamW": "#56b4e9",
    "Muon": "#009e73",
    "SOAP": "#cc79a7",
    "CurveBall": "#d55e00",
    KRONECKER: "#e69f00",
}


@dataclass(frozen=True)
class Size:
    """A perceptron of `depth` square layers and a classifier of ten."""

    batch: int = 128
    width: int = 512
    depth: int = 4

    @property
    def parameters(self) -> int:
        return self.depth * (self.width + 1) * self.width + 10 * (self.width + 1)

    def build(self) -> nn.Module:
        layers = [layer for _ in range(self.depth) for layer in (nn.Linear(self.width, self.width), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(self.width, 10))

    def data(self, batch: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, self.width), torch.randint(10, (batch,))


@dataclass(frozen=True)
class Axis:
    """What is varied, and the measure of size that the arithmetic is proportional to."""

    sizes: list[Size]
    measure: str

    def measures(self) -> list[int]:
        return [getattr(size, self.measure) for size in self.sizes]


AXES = {
    "batch": Axis([replace(Size(), batch=n) for n in (64, 128, 256, 512)], "batch"),
    "width": Axis([replace(Size(), width=n) for n in (256, 512, 768, 1024)], "parameters"),
    "depth": Axis([replace(Size(), depth=n) for n in (2, 4, 8, 16)], "depth"),
}
Timings = list[dict[str, Timing]]  # by size, by method


@pytest.fixture
def without_subnormals() -> Iterator[None]:
    """Take subnormal numbers for zero: a net that learns its one batch has more of them from step to step."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("without_subnormals")
def test_scaling(report: Report, set_threads: Callable[[int], None]) -> None:
    set_threads(1)
    measured = {name: [_measure(size) for size in axis.sizes] for name, axis in AXES.items()}
    rows = [
        {
            "": f"{name} {getattr(size, name)}",
            "parameters": size.parameters,
            **{f"{method}, ms": 1e3 * statistics.median(timing.rounds) for method, timing in timings.items()},
            **timings["CurveBall"].ratio.columns("ratio"),
        }
        for name, axis in AXES.items()
        for size, timings in zip(axis.sizes, measured[name], strict=True)
    ]
    base = Size()
    note = (
        f"One step of a perceptron of square layers; batch {base.batch}, width {base.width}, depth {base.depth} "
        f"but for what is named; 1 thread, {ROUNDS} rounds of as many steps as have the average cost. Ratio: of "
        "CurveBall over SGD. Subnormal numbers count as zero."
    )
    report.add("scaling", note, rows)
    slopes = {
        name: {method: _slope(axis, measured[name], method) for method in measured[name][0]}
        for name, axis in AXES.items()
    }
    rows = [
        {"": f"{name}, over {AXES[name].measure}"}
        | {method: round(slope, 2) for method, slope in by_method.items()}
        | {"bar": bar(Spread.of([by_method["CurveBall"]]), SLOPE_BAR)}
        for name, by_method in slopes.items()
    ]
    note = "Exponents of the time: slopes of straight lines through the logarithms of the table above."
    report.add("scaling, exponents", note, rows)
    _picture(measured, slopes).savefig(report.folder / "scaling.png", dpi=100)


def _measure(size: Size) -> dict[str, Timing]:
    steps = installed(Case("", size.build, size.data, size.batch))
    del steps[PLAIN]
    calls = {method: repeated(step, STEPS_OF_A_TURN[method]) for method, step in steps.items()}
    for method, step in steps.items():
        repeated(step, WARM_UP[method])()
    return compare(calls, "SGD", ROUNDS, units=STEPS_OF_A_TURN)


def _slope(axis: Axis, timings: Timings, method: str) -> float:
    times = [statistics.median(by_method[method].rounds) for by_method in timings]
    return statistics.linear_regression(_logs(axis.measures()), _logs(times)).slope


def _logs(values: Sequence[float]) -> list[float]:
    return [math.log(value) for value in values]


def _picture(measured: Mapping[str, Timings], slopes: Mapping[str, Mapping[str, float]]) -> Figure:
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    figure.suptitle("Time of a step, 1 thread; dotted: proportional to the size", fontsize=13)
    panels = figure.subplots(1, len(AXES), sharey=True)
    for axes, (name, axis) in zip(panels, AXES.items(), strict=True):
        sizes = axis.measures()
        for method in measured[name][0]:
            color = COLORS[method]
            times = [1e3 * statistics.median(timings[method].rounds) for timings in measured[name]]
            axes.plot(sizes, times, "o-", color=color, label=f"{method}, exponent {slopes[name][method]:.2f}")
            linear = [times[-1] * size / sizes[-1] for size in sizes]
            axes.plot(sizes, linear, ":", color=color, alpha=0.6)
        title = axis.measure if axis.measure == name else f"{axis.measure}, by {name}"
        axes.set(xlabel=title, xscale="log", yscale="log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.legend(fontsize=8, loc="upper left")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("milliseconds per step")
    panels[0].set_ylim(top=20 * panels[0].get_ylim()[1])  # room for the legends; the axes are shared
    return figure
