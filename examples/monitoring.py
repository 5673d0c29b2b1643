"""Train a small net on handwritten digits in both metrics, and draw what `history()` says: docs/monitoring.png.

Beside the picture it writes a CSV file of each training. Needs `pip install 'curveball_fused[demo]'`; as it comes, it
takes half a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_data import digits
from demo_training import net

from curveball_fused import CurveBall, plot_history, write_csv

METRICS = {"published": None, "kronecker": "kronecker"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training set")
    parser.add_argument("--output", type=Path, default=Path("monitoring.png"), help="where to save the picture")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, axes = digits(), None
    for label, preconditioner in METRICS.items():
        model = net(seed=0)
        optimizer = CurveBall(model.parameters(), preconditioner=preconditioner)
        order = torch.Generator().manual_seed(0)
        path = options.output.with_name(f"{options.output.stem}-{label}.csv")
        for _ in range(options.epochs):
            for rows in torch.randperm(len(data.train_images), generator=order)[:1408].split(128):
                images, classes = data.train_images[rows], data.train_classes[rows]
                optimizer.step(lambda: model(images), lambda outputs: F.cross_entropy(outputs, classes))  # noqa: B023
            write_csv(optimizer, path)
        figure = plot_history(optimizer, axes, label)
        axes = figure.axes
    figure.savefig(options.output, dpi=100)
    print(f"Picture: {options.output}")


if __name__ == "__main__":
    main()
