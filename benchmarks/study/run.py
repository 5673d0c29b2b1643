"""Train one task with one method, or all of them, and keep the losses of each step.

    python -m benchmarks.study.run --task gpt --method "Adam 0.003 cosine" --seed 0
    python -m benchmarks.study.run --all

Results that are there already are not computed again, so a run may be stopped and continued. Losses by step do not
depend on how busy the machine is; seconds are none of this program's business.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.study import baselines, results
from benchmarks.study.methods import CURVEBALL, Method
from benchmarks.study.results import Result, rounded
from benchmarks.study.tasks import TASKS

METHODS = {method.name: method for method in (*baselines.FIRST, *baselines.OTHERS)} | CURVEBALL
BASELINES = [[method.name for method in group] for group in (baselines.FIRST, baselines.OTHERS)]


def train(name: str, method: Method, seed: int) -> Result:
    """Train until the last step, or until the loss is not finite."""
    task = TASKS[name]
    net = task.make(seed)
    training = method.start(task, net, **method.options)
    losses: list[float] = []
    for x, y in task.batches(seed):
        loss = rounded(training.step(x, y).item())
        if loss is None:
            break
        losses.append(loss)
    train_loss, validation_loss, error = None, None, None
    if len(losses) == task.steps:
        training.finish(seed)
        final = task.evaluate(net)
        train_loss, validation_loss, error = map(rounded, (final.train, final.validation, final.error))
    return Result(
        name,
        method.name,
        dict(method.options),
        seed,
        losses,
        train_loss,
        validation_loss,
        error,
        task.steps,
        {"torch": torch.__version__} | {package: version(package) for package in method.packages},
        commit(),
    )


@functools.cache
def commit() -> str:
    """The commit at the first call, marked where what belongs to it has been changed, results apart."""

    def git(*arguments: str) -> str:
        return subprocess.check_output(("git", *arguments), cwd=Path(__file__).parent, text=True).strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
    short = git("rev-parse", "--short=12", "HEAD")
    return f"{short}, with changes" if changed else short


def everything(seeds: int) -> Iterator[tuple[str, str, int]]:
    """All baselines: Adam and SGD before the others, the first seed of all tasks before the next."""
    for seed in range(seeds):
        for methods in BASELINES:
            for task in TASKS:
                yield from ((task, method, seed) for method in methods)


def main() -> int:
    options = _parser().parse_args()
    torch.set_num_threads(1)
    if options.all:
        wanted = everything(options.seeds)
    else:
        seeds = range(options.seeds) if options.seed is None else [options.seed]
        wanted = ((task, method, seed) for seed in seeds for task in options.task for method in options.method)
    failed = 0
    for task, method, seed in wanted:
        there = {(result.method, result.seed) for result in results.read(task)}
        if (method, seed) in there and not options.again:
            continue
        began = time.monotonic()
        try:
            result = train(task, METHODS[method], seed)
        except Exception:  # the other runs are still worth their time
            traceback.print_exc()
            print(f"{task}, {method}, seed {seed}: FAILED", flush=True)
            failed += 1
            continue
        results.append(result)
        took = time.monotonic() - began
        finals = f"train {result.final_train}, validation {result.final_validation}, error {result.final_error}"
        print(f"{task}, {method}, seed {seed}: {finals}; {took:.0f} s", flush=True)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", default=list(TASKS), choices=list(TASKS), metavar="TASK")
    parser.add_argument("--method", nargs="+", default=["Kronecker"], choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--seed", type=int, help="one seed (default: the first --seeds)")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from 0 on (default: 1)")
    parser.add_argument(
        "--all", action="store_true", help="all baselines of all tasks; --task and --method don't count"
    )
    parser.add_argument("--again", action="store_true", help="also where there is a result; the last one counts")
    return parser


if __name__ == "__main__":
    sys.exit(main())
