"""The picture of the evidence of high accuracy, from the raw data."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.evidence import accuracy, accuracy_seconds
from benchmarks.evidence.accuracy_methods import METHODS
from benchmarks.evidence.accuracy_problems import TASKS
from benchmarks.evidence.accuracy_tables import curves
from benchmarks.evidence.records import Record

# Of Okabe and Ito, who chose colors that people with any color vision tell apart.
PALETTE = "#0072B2", "#56B4E9", "#E69F00", "#CC79A7", "#D55E00", "#009E73", "#000000"
COLORS = dict(zip(METHODS, PALETTE, strict=True))
DECADES = 2.0  # of the time that are drawn


def draw() -> Figure:
    """Draw the error by seconds, a panel for each problem."""
    records, seconds = accuracy.RECORDS.read(), accuracy_seconds.RECORDS.read()
    figure = Figure(figsize=(9, 10), layout="constrained")
    for ax, problem in zip(figure.subplots(3, 2).flat, TASKS, strict=True):
        _draw_problem(ax, records, seconds, problem)
    handles = [Line2D([], [], color=color, linewidth=3, label=method) for method, color in COLORS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=10)
    return figure


def _draw_problem(ax: Axes, records: Sequence[Record], seconds: Sequence[Record], problem: str) -> None:
    """Each seed as a line; that of the middle final error is the strong one."""
    task = TASKS[problem]
    for method, color in COLORS.items():
        found = sorted(curves(records, seconds, problem, method), key=lambda curve: curve.final)
        for i, curve in enumerate(found):
            middle = i == len(found) // 2
            ax.plot(
                curve.seconds, curve.errors, color=color, linewidth=2 if middle else 0.8, alpha=1 if middle else 0.4
            )
    ax.set(xscale="log", yscale="log", xlabel="seconds", ylabel=task.error)
    ax.set_xlim(task.seconds / 10**DECADES, task.seconds)
    ax.set_title(task.title, fontsize=11)
    ax.grid(color="0.9")
