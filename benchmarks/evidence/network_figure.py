"""The picture of the method's networks: training loss by steps and by seconds."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from benchmarks.evidence.network_tables import ends, mean_losses, seconds_until
from benchmarks.evidence.network_tasks import NETWORKS, WITHOUT_DROPOUT
from benchmarks.evidence.network_times import TIMES
from benchmarks.evidence.networks import ADAPTING, FIXED, KRONECKER, METHODS, RECORDS
from benchmarks.evidence.records import Record

# Of Okabe and Ito, who chose colors that people with any color vision tell apart.
STYLES = {
    KRONECKER: ("#0072B2", "-"),
    ADAPTING: ("#E69F00", "-"),
    FIXED: ("#CC79A7", "--"),
    "SGD": ("#009E73", "-"),
    "Adam": ("#D55E00", "-"),
    "AdamW": ("#56B4E9", "--"),  # over Adam's, from which it hardly differs
}
_COLUMNS = 3
_LOWEST = 1e-3  # of the losses shown


def draw() -> Figure:
    """Draw three networks side by side, their losses by steps above those by seconds; below, the next three."""
    runs, times = RECORDS.read(), TIMES.read()
    figure = Figure(figsize=(9, 10.5), layout="constrained")
    axes = figure.subplots(2 * len(WITHOUT_DROPOUT) // _COLUMNS, _COLUMNS)
    for i, name in enumerate(WITHOUT_DROPOUT):
        above, below = axes[i // _COLUMNS * 2 : i // _COLUMNS * 2 + 2, i % _COLUMNS]
        for method in METHODS:
            _curve(above, ends(runs, name), runs, name, method)
            _curve(below, seconds_until(runs, times, name, method), runs, name, method)
        for ax in (above, below):
            _finish(ax)
        above.set_title(NETWORKS[name].task.about, fontsize=9.5)
        above.set_xlabel("steps")
        below.set_xlabel("seconds of one core")
        if i % _COLUMNS == 0:
            for ax in (above, below):
                ax.set_ylabel("training loss")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


def _curve(ax: Axes, x: Sequence[float], runs: Sequence[Record], network: str, method: str) -> None:
    color, style = STYLES[method]
    losses = mean_losses(runs, network, method)
    ax.plot(x, losses, style, color=color, marker="o", markersize=2.5, linewidth=1.4, label=method)


def _finish(ax: Axes) -> None:
    ax.set_yscale("log")
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=max(_LOWEST, ax.get_ylim()[0]))
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.spines[["top", "right"]].set_visible(False)
