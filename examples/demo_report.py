"""What the demo shows in the end: a table in Markdown, a picture, and the numbers behind the table."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from demo_training import Run
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Array = npt.NDArray[Any]
Runs = Mapping[str, Sequence[Run]]  # by optimizer, one run per seed

COLORS = ("#d55e00", "#7b3294", "#0072b2", "#009e73")  # told apart by color-blind readers too
STATS = {"rho": r"momentum $\rho$", "beta": r"step size $\beta$", "lambd": r"damping $\lambda$ over its first value"}


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


def as_json(runs: Runs) -> dict[str, list[dict[str, Any]]]:
    """Return what the table is made of."""
    return {name: [asdict(run) | {"stats": {}} for run in group] for name, group in runs.items()}


def picture(runs: Runs, title: str, path: Path) -> None:
    """Draw loss against iterations, loss against seconds, and how each CurveBall set ρ, β and λ."""
    figure = Figure(figsize=(15, 5), layout="constrained")
    figure.suptitle(title, fontsize=13)
    grid = figure.add_gridspec(3, 3, width_ratios=(3, 3, 2.4))
    by_steps, by_seconds = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[:, 1])
    by_seconds.sharey(by_steps)
    colors = dict(zip(runs, COLORS, strict=True))
    ends = {}
    for name, group in runs.items():
        losses = np.array([run.train_loss for run in group])
        seconds = np.array([run.seconds for run in group])
        _curves(by_steps, np.broadcast_to(group[0].steps, losses.shape), losses, colors[name])
        _curves(by_seconds, seconds, losses, colors[name])
        ends[name] = np.median(seconds[:, -1]), np.median(losses[:, -1])
    by_steps.set(xlabel="iterations", ylabel="training loss", yscale="log")
    by_seconds.set(xlabel="seconds of training")
    _label_ends(by_steps, {name: (group[0].steps[-1], ends[name][1]) for name, group in runs.items()}, colors)
    _label_ends(by_seconds, ends, colors)

    own = {name: group for name, group in runs.items() if group[0].stats}
    panels = [figure.add_subplot(grid[row, 2]) for row in range(len(STATS))]
    for axes, (key, label) in zip(panels, STATS.items(), strict=True):
        for name, group in own.items():
            values = np.array([run.stats[key] for run in group])
            if key == "lambd":
                values = values / values[:, :1]
            steps = np.broadcast_to(np.arange(1, values.shape[1] + 1), values.shape)
            _curves(axes, steps, values, colors[name], window=1 + values.shape[1] // 25)
        axes.set_title(label, fontsize=10, loc="left", pad=3)
        axes.tick_params(labelbottom=axes is panels[-1])
    panels[1].set(yscale="log")
    panels[-1].set(xlabel="iterations")
    for axes in (by_steps, by_seconds, *panels):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"


def _curves(axes: Axes, x: Array, y: Array, color: str, window: int = 1) -> None:
    """Draw each seed as a thin line, their median, averaged over a window of points, as a thick one."""
    axes.plot(x.T, y.T, color=color, linewidth=0.7, alpha=0.25)
    weights = np.full(window, 1 / window)
    middle = [np.convolve(np.median(values, axis=0), weights, mode="valid") for values in (x, y)]
    axes.plot(*middle, color=color, linewidth=2)


def _label_ends(axes: Axes, ends: Mapping[str, tuple[float, float]], colors: Mapping[str, str]) -> None:
    """Write each name to the right of the axes, at the height of its curve's end, or as near as it finds room."""
    to_axes = axes.transData + axes.transAxes.inverted()
    room = 0.1  # of the height, for two lines of text
    lowest = -room
    heights = {name: float(to_axes.transform(end)[1]) for name, end in ends.items()}
    for i, name in enumerate(sorted(heights, key=heights.__getitem__)):
        above = len(heights) - 1 - i  # that need room, too
        lowest = min(max(heights[name], lowest + room), 1 - room * above)
        axes.plot(*ends[name], "o", color=colors[name], markersize=5)
        axes.annotate(
            name.split(" (")[0].replace(", ", ",\n"),
            xy=ends[name],
            xytext=(1.03, lowest),
            textcoords="axes fraction",
            color=colors[name],
            verticalalignment="center",
            arrowprops=dict(arrowstyle="-", color=colors[name], linestyle=":", alpha=0.6, shrinkA=2, shrinkB=4),
        )


def _spread(values: Sequence[float], digits: int, unit: str = "") -> str:
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}{unit}"
