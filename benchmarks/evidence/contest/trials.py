"""Tune four optimizers on each workload by random search; what they reach within the budget is the target.

As AlgoPerf's rules make targets: each optimizer's best trial is run again with fresh seeds, and the target is the
lowest of the four medians of the final validation losses.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from benchmarks.evidence.contest.workloads import WORKLOADS, Workload
from benchmarks.evidence.records import Record, Records

RECORDS = Records("contest-trials", ("workload", "optimizer", "trial", "seed"))
TRIALS = 20
TRIAL_SEED = 100  # of weights and batches
FRESH_SEEDS = 101, 102, 103  # for the best trials; those of the contest are others again
WARM_UP = 0.05  # of the steps

Setting = dict[str, float]
_ADAM_LIKE = {
    "lr": (1e-4, 3e-2),
    "one_minus_beta1": (0.02, 0.5),
    "one_minus_beta2": (1e-3, 0.2),
    "weight_decay": (1e-3, 1.0),
}
_SGD_LIKE = {"lr": (1e-3, 1.0), "one_minus_momentum": (5e-3, 0.3), "weight_decay": (1e-7, 1e-3)}
RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "AdamW": _ADAM_LIKE,
    "NAdamW": _ADAM_LIKE,
    "Nesterov": _SGD_LIKE,
    "Heavy ball": _SGD_LIKE,
}


def setting_of(optimizer: str, trial: int) -> Setting:
    """Draw each number log-uniformly; a trial has the same setting on all workloads."""
    draw = random.Random(f"{optimizer} {trial}")
    return {
        name: math.exp(draw.uniform(math.log(low), math.log(high))) for name, (low, high) in RANGES[optimizer].items()
    }


def make(optimizer: str, params: Iterable[nn.Parameter], setting: Setting) -> torch.optim.Optimizer:
    lr, weight_decay = setting["lr"], setting["weight_decay"]
    if optimizer in ("Nesterov", "Heavy ball"):
        momentum, nesterov = 1 - setting["one_minus_momentum"], optimizer == "Nesterov"
        return torch.optim.SGD(
            params, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, fused=True
        )
    betas = 1 - setting["one_minus_beta1"], 1 - setting["one_minus_beta2"]
    if optimizer == "AdamW":
        return torch.optim.AdamW(params, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    return torch.optim.NAdam(
        params, lr=lr, betas=betas, weight_decay=weight_decay, decoupled_weight_decay=True, foreach=True
    )


def warm_up_and_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The rate rises on a line, then falls to 0 on half a cosine."""
    warm_up = max(1, round(WARM_UP * steps))

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warm_up) / (steps - warm_up)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train(workload: Workload, optimizer: str, setting: Setting, seed: int) -> float:
    """Return the final validation loss; infinite if a batch's loss was not finite."""
    net = workload.task.make(seed)
    steps = make(optimizer, net.parameters(), setting)
    scheduler = warm_up_and_cosine(steps, workload.budget)
    for x, y in workload.batches(seed, workload.budget):
        steps.zero_grad()
        loss = workload.task.loss_fn(net(x), y)
        if not math.isfinite(loss.item()):
            return math.inf
        loss.backward()
        steps.step()
        scheduler.step()
    return workload.validation_loss(net)


def make_trials() -> None:
    """Make what is missing of all trials, then of the best ones with fresh seeds."""
    for runs in (_trials(), _fresh_runs()):
        for run in RECORDS.missing(runs):
            setting = setting_of(run["optimizer"], run["trial"])
            loss = train(WORKLOADS[run["workload"]], run["optimizer"], setting, run["seed"])
            RECORDS.add(run | {"setting": setting, "validation_loss": float(f"{loss:.5g}")})


def best_trial(records: list[Record], workload: str, optimizer: str) -> Record:
    """The trial with the lowest final validation loss."""
    of_it = [run for run in _of(records, workload, optimizer) if run["seed"] == TRIAL_SEED]
    return min(of_it, key=final_loss)


def medians(records: list[Record], workload: str) -> dict[str, float]:
    """For each optimizer the median of its best trial's final losses over the fresh seeds."""
    found = {}
    for optimizer in RANGES:
        best = best_trial(records, workload, optimizer)["trial"]
        fresh = [
            run for run in _of(records, workload, optimizer) if run["trial"] == best and run["seed"] in FRESH_SEEDS
        ]
        found[optimizer] = statistics.median(map(final_loss, fresh))
    return found


def target(records: list[Record], workload: str) -> float:
    return min(medians(records, workload).values())


def _trials() -> Iterator[Record]:
    for trial in range(TRIALS):
        yield from (
            {"workload": workload, "optimizer": optimizer, "trial": trial, "seed": TRIAL_SEED}
            for workload in WORKLOADS
            for optimizer in RANGES
        )


def _fresh_runs() -> Iterator[Record]:
    records = RECORDS.read()
    for workload in WORKLOADS:
        for optimizer in RANGES:
            best = best_trial(records, workload, optimizer)["trial"]
            yield from (
                {"workload": workload, "optimizer": optimizer, "trial": best, "seed": seed} for seed in FRESH_SEEDS
            )


def _of(records: list[Record], workload: str, optimizer: str) -> list[Record]:
    return [run for run in records if (run["workload"], run["optimizer"]) == (workload, optimizer)]


def final_loss(run: Record) -> float:
    """The raw data have None where it was not finite."""
    return math.inf if run["validation_loss"] is None else float(run["validation_loss"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_trials()
