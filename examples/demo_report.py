"""What the demo shows in the end: a table in Markdown, and a picture."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from demo_training import Run
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Array = npt.NDArray[Any]
Runs = Mapping[str, Sequence[Run]]  # by optimizer, one run per seed

COLORS = ("#d55e00", "#0072b2", "#009e73")  # told apart by color-blind readers too
STATS_STYLE = {
    "rho": ("#cc79a7", r"momentum $\rho$"),
    "beta": ("#e69f00", r"step size $\beta$"),
    "lambd": ("#555555", r"damping $\lambda$"),
}


def table(runs: Runs, epochs: int) -> str:
    """Return train loss and test error after equal epochs and equal seconds: mean ± standard deviation over the seeds.

    The seconds are those of the shortest run, the longest time that every run has; a slower one is read at its
    last measurement within them.
    """
    limit = min(run.seconds[-1] for group in runs.values() for run in group)
    heads = [
        f"{what}, {at}" for at in (count(epochs, "epoch"), f"{limit:.2f} s") for what in ("train loss", "test error")
    ]
    lines = ["| | " + " | ".join([*heads, "time per step"]) + " |", "|---" * (len(heads) + 2) + "|"]
    for name, group in runs.items():
        cells = [name]
        for at in ([-1] * len(group), [bisect_right(run.seconds, limit) - 1 for run in group]):
            cells.append(_spread([run.train_loss[i] for run, i in zip(group, at, strict=True)], 4))
            cells.append(_spread([run.test_error[i] for run, i in zip(group, at, strict=True)], 2, " %"))
        cells.append(_spread([1000 * run.seconds[-1] / run.steps[-1] for run in group], 1, " ms"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(runs: Runs, title: str, path: Path) -> None:
    """Draw loss against iterations, loss against seconds, and how CurveBall set ρ, β and λ."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    figure.suptitle(title, fontsize=13)
    by_steps, by_seconds, own = figure.subplots(1, 3)
    by_seconds.sharey(by_steps)
    for (name, group), color in zip(runs.items(), COLORS, strict=True):
        losses = np.array([run.train_loss for run in group])
        seconds = np.array([run.seconds for run in group])
        _curves(by_steps, np.broadcast_to(group[0].steps, losses.shape), losses, color, name)
        _curves(by_seconds, seconds, losses, color, name)
    by_steps.set(xlabel="iterations", ylabel="training loss", yscale="log")
    by_seconds.set(xlabel="seconds of training")
    by_seconds.legend()

    group = next(group for group in runs.values() if group[0].stats)
    for key, (color, label) in STATS_STYLE.items():
        values = np.array([run.stats[key] for run in group])
        steps = np.broadcast_to(np.arange(1, values.shape[1] + 1), values.shape)
        _curves(own, steps, values, color, label, window=1 + values.shape[1] // 25)
    own.set(xlabel="iterations", ylabel="set by CurveBall itself")
    own.set_ylim(top=own.get_ylim()[1] * 1.12)  # room for the legend
    own.legend(loc="upper center", ncols=3, columnspacing=1.0, handlelength=1.2)
    for axes in (by_steps, by_seconds, own):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"


def _curves(axes: Axes, x: Array, y: Array, color: str, label: str, window: int = 1) -> None:
    """Draw each seed as a thin line, their median, averaged over a window of points, as a thick one."""
    axes.plot(x.T, y.T, color=color, linewidth=0.7, alpha=0.3)
    weights = np.full(window, 1 / window)
    middle = [np.convolve(np.median(values, axis=0), weights, mode="valid") for values in (x, y)]
    axes.plot(*middle, color=color, linewidth=2, label=label)


def _spread(values: Sequence[float], digits: int, unit: str = "") -> str:
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}{unit}"
