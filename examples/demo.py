"""Train a small convolutional net on real images: CurveBall in two metrics, without any hyper-parameter, SGD, Adam.

All four start from the same weights and see the same batches, for several seeds. Prints a table in Markdown
and saves a picture. Needs `pip install 'curveball_fused[demo]'`. As it comes, it takes about a minute on two
cores; Fashion-MNIST takes some minutes per epoch and seed.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from demo_data import FASHION_DIR, DataError, digits, fashion_mnist
from demo_report import as_json, count, picture, table
from demo_training import MEASURED_IMAGES, OPTIMIZERS, Run, steps_per_epoch, train, warm_up
from tqdm import tqdm


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    if options.data_dir and options.data == "digits":
        parser.error("--data-dir is for --data fashion-mnist; the digits come with scikit-learn")
    torch.set_num_threads(options.threads)
    try:
        data = digits() if options.data == "digits" else fashion_mnist(options.data_dir or FASHION_DIR)
    except DataError as error:
        parser.error(str(error))
    if options.batch_size > len(data.train_images):
        parser.error(f"--batch-size: there are only {len(data.train_images)} training images")

    warm_up(data, options.batch_size)
    runs: dict[str, list[Run]] = {name: [] for name in OPTIMIZERS}
    steps = options.seeds * options.epochs * steps_per_epoch(data, options.batch_size)
    width = max(len(name) for name in OPTIMIZERS)
    layout = "{desc} |{bar}| {n_fmt}/{total_fmt} steps{postfix}"
    bars = {  # silent where standard error is no terminal
        name: tqdm(total=steps, desc=name.ljust(width), position=i, bar_format=layout, disable=None)
        for i, name in enumerate(OPTIMIZERS)
    }
    for seed in range(options.seeds):  # they take turns, so that a slow spell of the machine hits all
        for name, bar in bars.items():
            run = train(name, data, seed, options.epochs, options.batch_size, on_step=bar.update)
            runs[name].append(run)
            bar.set_postfix_str(f"loss {run.train_loss[-1]:.4f}, test error {run.test_error[-1]:.2f} %")
    for bar in bars.values():
        bar.close()

    size = len(data.train_images)
    setting = f"{data.name}, {size:,} training images, batches of {options.batch_size}, "
    setting += count(options.seeds, "seed")
    print(f"{setting}, {count(torch.get_num_threads(), 'thread')}, torch {torch.__version__}\n")
    print(table(runs, options.epochs))
    print(
        "\nMean ± standard deviation over the seeds. Equal seconds: the time of the shortest run, the longest\n"
        "that all runs have; slower ones are read at their last measurement within it. Train loss: of\n"
        f"{min(size, MEASURED_IMAGES):,} training images, in evaluation mode. Measuring does not count as time.\n"
        'Neither CurveBall was given a number: CurveBall(params, preconditioner="kronecker"), and CurveBall(params)\n'
        "as published. The rates of the others are usual ones."
    )
    if options.runs:
        options.runs.write_text(json.dumps({"epochs": options.epochs, "runs": as_json(runs)}), encoding="utf-8")
    picture(runs, f"A small convolutional net with batch norm on {setting}", options.output)
    print(f"\nPicture: {options.output}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits", help="training data")
    parser.add_argument("--data-dir", type=Path, help=f"of Fashion-MNIST's files, if not {FASHION_DIR}")
    parser.add_argument("--epochs", type=_positive, default=15, help="passes over the training set")
    parser.add_argument("--seeds", type=_positive, default=5, help="runs of each optimizer")
    parser.add_argument("--batch-size", type=_positive, default=128, help="images per step")
    parser.add_argument("--threads", type=_threads, default=1, help="of torch; more pay off on idle cores alone")
    parser.add_argument("--output", type=_png, default=Path("demo.png"), help="where to save the picture")
    parser.add_argument("--runs", type=Path, help="where to save what is measured of each run, as JSON")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _threads(text: str) -> int:
    threads, cores = _positive(text), os.cpu_count() or 1
    if threads > cores:
        raise argparse.ArgumentTypeError(f"{threads} is more than this machine's {cores} cores")
    return threads


def _png(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {str(path.parent)!r}")
    return path


if __name__ == "__main__":
    main()
