"""The picture of the contest: performance profiles, and scores as bars."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.evidence.contest.contestants import CONTESTANTS, KRONECKER, KRONECKER_COSINE, PUBLISHED
from benchmarks.evidence.contest.score import LARGEST_RATIO, profile, score
from benchmarks.evidence.contest.tables import ranking

# Of Okabe and Ito, who chose colors that people with any color vision tell apart; lines of one color differ in style.
_OURS = {KRONECKER: ("#0072B2", "-"), KRONECKER_COSINE: ("#0072B2", "--"), PUBLISHED: ("#0072B2", ":")}
_PALETTE = "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#000000"
_OTHERS = [name for name in CONTESTANTS if name not in _OURS]
STYLES = _OURS | {
    name: (_PALETTE[i % len(_PALETTE)], ("-", "--", ":")[i // len(_PALETTE)]) for i, name in enumerate(_OTHERS)
}


def draw() -> Figure:
    found = ranking()
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    _profiles(left, found)
    _bars(right, found)
    return figure


def _profiles(axes: Axes, found: dict[str, list[float]]) -> None:
    """Draw the profiles of those that reach any target in time, a little apart where they lie on each other."""
    taus = np.linspace(1, LARGEST_RATIO, 601)
    shown = [name for name, ratios in found.items() if profile(ratios, LARGEST_RATIO)]
    for place, name in enumerate(shown):
        color, style = STYLES[name]
        apart = 0.6 * (len(shown) / 2 - place)
        shares = [100 * profile(found[name], tau) + apart for tau in taus]
        axes.plot(taus, shares, style, color=color, linewidth=2.6 if name in _OURS else 1.6, label=name)
    axes.set(xlim=(1, LARGEST_RATIO), ylim=(-5, 105), xlabel="τ", ylabel="% of the workloads")
    axes.set_title("Target reached within τ times the fastest's time", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _bars(axes: Axes, found: dict[str, list[float]]) -> None:
    """Draw the scores, with each line's style beside its name."""
    names = list(found)
    scores = [score(found[name]) for name in names]
    places = range(len(names))
    axes.barh(places, scores, color=[STYLES[name][0] for name in names], height=0.55)
    for place, name, value in zip(places, names, scores, strict=True):
        color, style = STYLES[name]
        axes.plot((-0.13, -0.02), (place, place), style, color=color, linewidth=2, clip_on=False)
        axes.annotate(f"{value:.2f}", (value, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(places, names, fontsize=8.5)
    axes.tick_params(axis="y", length=0, pad=30)
    axes.set(xlim=(0, 1.08), ylim=(len(names) - 0.4, -0.6), xlabel="score")
    axes.set_title("Score: mean of the profile", fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
