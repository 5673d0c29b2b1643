"""The picture of the method's own table: paths over the contours of the Rosenbrock function, and iterations as bars."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.evidence import published
from benchmarks.evidence.problems import PROBLEMS, Problem, Rosenbrock
from benchmarks.evidence.records import Record
from benchmarks.evidence.solvers import SYSTEMS

# The palette of Okabe and Ito, which the color-blind can tell apart.
_COLORS = dict(zip(SYSTEMS, ("#D55E00", "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7"), strict=True))
_LONG_PATHS = "SGD + momentum", "Adam"  # too many points to mark each
_SEED = 1  # that of those drawn which starts farthest away
_U, _V = (-0.6, 1.3), (-0.6, 1.3)


def draw() -> Figure:
    records = published.RECORDS.read()
    functions = [problem for problem in PROBLEMS if isinstance(problem, Rosenbrock)]
    names = [problem.name for problem in functions]
    layout = [names, ["bars"] * len(names)]
    figure, axes = plt.subplot_mosaic(layout, figsize=(9, 7), height_ratios=(1, 1.1), layout="constrained")
    for problem in functions:
        _paths(axes[problem.name], records, problem)
    axes[names[0]].set_ylabel("v")
    _bars(axes["bars"], records)
    handles = [Line2D([], [], color=color, linewidth=4, label=system) for system, color in _COLORS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(SYSTEMS), frameon=False, columnspacing=1.2)
    return figure


def _paths(axes: Axes, records: Sequence[Record], problem: Rosenbrock) -> None:
    """Draw each system's path from one seed, over the contours of the function's mean over the noise."""
    u, v = np.meshgrid(np.linspace(*_U, 200), np.linspace(*_V, 200))
    mean_square = 1.0 if problem.noise is None else problem.noise**2 / 3  # of ε
    values = mean_square * 100 * (v - u**2) ** 2 + (1 - u) ** 2
    axes.contour(u, v, values, levels=np.logspace(-1.5, 3, 12), colors="0.75", linewidths=0.6)
    for system in reversed(SYSTEMS):  # CurveBall on top
        run = next(each for each in published.reported_runs(records, problem, system) if each["seed"] == _SEED)
        marker, width = ("", 1.2) if system in _LONG_PATHS else ("o", 1.6)
        path = np.array(run["path"])
        axes.plot(*path.T, color=_COLORS[system], marker=marker, markersize=3, linewidth=width)
    axes.plot(1, 1, "k*", markersize=11)
    axes.set(title=problem.title, xlim=_U, ylim=_V, xlabel="u", aspect="equal")


def _bars(axes: Axes, records: Sequence[Record]) -> None:
    """Draw the mean of the runs that converged, with its standard deviation, and how many did unless all have."""
    width = 0.8 / len(SYSTEMS)
    for place, problem in enumerate(PROBLEMS):
        for number, system in enumerate(SYSTEMS):
            runs = published.reported_runs(records, problem, system)
            x = place + (number - (len(SYSTEMS) - 1) / 2) * width
            _bar(axes, x, width, _COLORS[system], runs, problem)
    axes.set_yscale("log")
    axes.set(ylim=(1, 30000), ylabel="iterations until the loss is below 1e-4")
    axes.set_xticks(range(len(PROBLEMS)), [problem.title for problem in PROBLEMS])
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)


def _bar(axes: Axes, x: float, width: float, color: str, runs: Sequence[Record], problem: Problem) -> None:
    found = [run["iterations"] for run in runs if run["converged"]]
    if not found:
        axes.bar(x, problem.limit, width * 0.9, fill=False, edgecolor=color, linestyle="--")
        top = float(problem.limit)
    else:
        mean = statistics.mean(found)
        deviation = statistics.stdev(found) if len(found) > 1 else 0.0
        axes.bar(x, mean, width * 0.9, color=color)
        axes.errorbar(x, mean, [[min(deviation, 0.9 * mean)], [deviation]], color="0.2", linewidth=1, capsize=2)
        top = mean + deviation
    if len(found) < len(runs):
        text = f"{len(found)} of\n{len(runs)}"
        axes.annotate(text, (x, top), (0, 3), textcoords="offset points", ha="center", fontsize=8)
