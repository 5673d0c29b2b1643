"""Draw the pictures of docs/figures/ from the raw data in benchmarks/results/: `python -m benchmarks.figures`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.evidence import accuracy_figure, network_figure, published_figure, robustness_figure
from benchmarks.evidence.contest import figure as contest_figure

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures"
FIGURES: dict[str, Callable[[], Figure]] = {
    "networks": network_figure.draw,
    "published": published_figure.draw,
    "robustness": robustness_figure.draw,
    "accuracy": accuracy_figure.draw,
    "contest": contest_figure.draw,
}


def main() -> None:
    matplotlib.use("Agg")  # no display is needed
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        # Without the version of Matplotlib, so that the same data give the same file.
        draw().savefig(FOLDER / f"{name}.png", dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
