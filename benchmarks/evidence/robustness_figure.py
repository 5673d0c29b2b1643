"""The picture of the evidence of robustness, from the raw data."""

from __future__ import annotations

import math
import statistics

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.evidence.robustness import ADAM, BATCH_SIZES, CURVEBALLS, FACTORS, KRONECKER, METHODS, PUBLISHED, SGD
from benchmarks.evidence.robustness_tables import EQUAL, FIRST_ORDER, damping_ratios, finite_range, ratios, runs

# Of Okabe and Ito, who chose colors that people with any color vision tell apart.
COLORS = {KRONECKER: "#0072B2", PUBLISHED: "#E69F00", ADAM: "#D55E00", SGD: "#009E73"}
STYLES = dict(zip(FIRST_ORDER, ("-", "--"), strict=True))


def draw() -> Figure:
    """Draw losses on random nets, by the first damping and by batch size."""
    figure = Figure(figsize=(9, 7.2), layout="constrained")
    axes = figure.subplots(2, 2)
    for ax, equal in zip(axes[0], EQUAL, strict=True):
        _draw_nets(ax, equal)
    _draw_damping(axes[1, 0])
    _draw_batches(axes[1, 1])
    return figure


def _draw_nets(ax: Axes, equal: str) -> None:
    """Ratios of the losses on the random nets, from the best to the worst."""
    for ours in CURVEBALLS:
        for other in FIRST_ORDER:
            found = sorted(ratios(ours, other, equal))
            share = [100 * (i + 0.5) / len(found) for i in range(len(found))]
            ax.plot(share, found, STYLES[other], color=COLORS[ours], label=f"{ours} / {other.split()[0]}")
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set(yscale="log", xlabel="% of the nets, sorted", ylabel="training loss / the other's")
    ax.set_title(f"Random nets, after equal {equal} (below 1: ahead)", fontsize=10)
    ax.legend(fontsize=7.5, loc="upper left")


def _draw_damping(ax: Axes) -> None:
    """Medians, with bars from the lowest to the highest net, and the number of nets without a final loss."""
    for i, method in enumerate(CURVEBALLS):
        found = [damping_ratios(method, factor) for factor in FACTORS]
        ranges = [finite_range(each) for each in found]
        middle = [statistics.median(each) for each in found]
        below = [m - low for m, (low, _) in zip(middle, ranges, strict=True)]
        above = [high - m for m, (_, high) in zip(middle, ranges, strict=True)]
        beside = [factor * (0.87, 1.15)[i] for factor in FACTORS]  # so that the bars don't hide each other
        ax.errorbar(beside, middle, [below, above], color=COLORS[method], marker="o", capsize=3, label=method)
        for x, each, (_, high) in zip(beside, found, ranges, strict=True):
            if lost := sum(not math.isfinite(ratio) for ratio in each):
                place = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "fontsize": 7.5}
                ax.annotate(f"{lost} diverged", (x, high), color=COLORS[method], **place)
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set(
        xlim=(0.003, 300),
        xscale="log",
        yscale="log",
        xlabel="first λ / its default",
        ylabel="final loss / the default's",
    )
    ax.set_title("First damping: median and range of seven nets", fontsize=10)
    ax.legend(fontsize=7.5)


def _draw_batches(ax: Axes) -> None:
    """Final losses by batch size; what diverged is left out here, and named in the table."""
    found = runs("batch")
    for loss, style in (("cross-entropy", "-"), ("MSE", "--")):
        for method in METHODS:
            own = [found[f"{loss}, batch {size}"][method] for size in BATCH_SIZES]
            finals = [float("nan") if run.diverged else run.final for run in own]
            label = method if style == "-" else None
            ax.plot(BATCH_SIZES, finals, style, color=COLORS[method], marker="o", markersize=3, label=label)
    ax.set(yscale="log", xlabel="rows in a batch", ylabel="final training loss")
    ax.set_xscale("log", base=2)
    ax.set_xticks(BATCH_SIZES, [str(size) for size in BATCH_SIZES], fontsize=8)
    ax.set_title("Batch size, equal epochs (dashed: MSE)", fontsize=10)
    ax.set_ylim(bottom=0.01)
    ax.legend(fontsize=7.5, loc="lower right")
