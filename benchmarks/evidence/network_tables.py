"""The tables of docs/evidence-networks.md, from the raw data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from benchmarks.evidence.markdown import table
from benchmarks.evidence.network_tasks import CHOOSING, NETWORKS, WITHOUT_DROPOUT
from benchmarks.evidence.network_times import TIMES, seconds
from benchmarks.evidence.networks import (
    CHOOSING_SEED,
    CURVEBALLS,
    GRIDS,
    METHODS,
    PARTS,
    RECORDS,
    final_loss,
    seeds_of,
    select,
    setting_of,
)
from benchmarks.evidence.records import Record

DIVERGED = "diverged"


def tables() -> dict[str, str]:
    """All tables in Markdown, by the names of their markers."""
    runs, times = RECORDS.read(), TIMES.read()
    return {
        "networks-ahead": ahead_table(runs, times),
        "networks-errors": errors_table(runs),
        "networks-losses": losses_table(runs),
        "networks-seconds": seconds_table(runs, times),
        "networks-cost": cost_table(times),
        "networks-grid": grid_table(runs),
    }


def mean_losses(runs: Sequence[Record], network: str, method: str) -> list[float]:
    """Return the training loss of each tenth, the mean of the reported seeds; infinite where one was not finite."""
    losses = [run["losses"] for run in _reported(runs, network, method)]
    return [statistics.fmean(map(_number, tenth)) for tenth in zip(*losses, strict=True)]


def ends(runs: Sequence[Record], network: str) -> list[float]:
    """Return the steps that are done at the end of each tenth."""
    steps = next(run["steps"] for run in runs if run["network"] == network)
    return [steps * (i + 1) / PARTS for i in range(PARTS)]


def seconds_until(runs: Sequence[Record], times: Sequence[Record], network: str, method: str) -> list[float]:
    """Return the seconds that have passed at the end of each tenth."""
    return [seconds(times, network, method, steps) for steps in ends(runs, network)]


def loss_in_time(runs: Sequence[Record], times: Sequence[Record], network: str, method: str) -> float:
    """Return the loss of the tenth that ends when the quickest method's run does; between two tenths on a line."""
    time = min(seconds_until(runs, times, network, each)[-1] for each in METHODS)
    return float(np.interp(time, seconds_until(runs, times, network, method), mean_losses(runs, network, method)))


def errors_table(runs: Sequence[Record]) -> str:
    def cell(network: str, method: str) -> str:
        errors = [mean_error(runs, network, method, part) for part in ("train", "validation")]
        return " / ".join(f"{100 * each:.1f}" for each in errors) if all(map(math.isfinite, errors)) else DIVERGED

    rows = [[NETWORKS[name].task.about, *(cell(name, method) for method in METHODS)] for name in NETWORKS]
    return table(["errors in %, train / validation", *METHODS], rows)


def mean_error(runs: Sequence[Record], network: str, method: str, part: str) -> float:
    """Return the mean of the seeds' final errors of a part of the data; infinite where a run diverged."""
    return statistics.fmean(_number(run[f"{part}_error"]) for run in _reported(runs, network, method))


def losses_table(runs: Sequence[Record]) -> str:
    def cell(network: str, method: str) -> str:
        return ", ".join(_loss(final_loss(run)) for run in _reported(runs, network, method))

    rows = [[NETWORKS[name].task.about, *(cell(name, method) for method in METHODS)] for name in NETWORKS]
    return table(["after equal steps", *METHODS], rows)


def seconds_table(runs: Sequence[Record], times: Sequence[Record]) -> str:
    rows = [
        [NETWORKS[name].task.about, *(_loss(loss_in_time(runs, times, name, method)) for method in METHODS)]
        for name in WITHOUT_DROPOUT
    ]
    return table(["after equal seconds", *METHODS], rows)


def ahead_table(runs: Sequence[Record], times: Sequence[Record]) -> str:
    """On how many networks each CurveBall is below the best of SGD, Adam and AdamW."""

    def losses(network: str, method: str) -> float:
        return mean_losses(runs, network, method)[-1]

    def losses_by_time(network: str, method: str) -> float:
        return loss_in_time(runs, times, network, method)

    def errors(network: str, method: str) -> float:
        return mean_error(runs, network, method, "validation")

    columns = {
        "training loss, equal steps": (losses, list(NETWORKS)),
        "training loss, equal seconds": (losses_by_time, WITHOUT_DROPOUT),
        "validation error, equal steps": (errors, list(NETWORKS)),
    }
    rows = []
    for ours in CURVEBALLS:
        row = [ours]
        for measure, names in columns.values():
            ahead = sum(measure(name, ours) < min(measure(name, other) for other in GRIDS) for name in names)
            row.append(f"{ahead} of {len(names)}")
        rows.append(row)
    return table(["below the best of SGD, Adam and AdamW", *columns], rows)


def cost_table(times: Sequence[Record]) -> str:
    rows = []
    for record in times:
        ratios = [f"{cost(record, method):.2f}" for method in METHODS]
        milliseconds = 1000 * record["seconds"]["SGD"]["later"]
        rows.append([NETWORKS[record["network"]].task.about, f"{milliseconds:.3g}", *ratios])
    return table(["a step over SGD's", "SGD's, ms", *METHODS], rows)


def cost(record: Record, method: str) -> float:
    """Return a step's time over that of SGD's."""
    seconds = record["seconds"]
    return float(seconds[method]["later"] / seconds["SGD"]["later"])


def grid_table(runs: Sequence[Record]) -> str:
    """The losses of the last tenth by which rates are chosen; the chosen one is bold."""
    columns = [(method, lr) for method, rates in GRIDS.items() for lr in rates]
    rows = []
    for name in CHOOSING:
        row = [NETWORKS[name].task.about]
        for method, lr in columns:
            (run,) = (each for each in select(runs, name, method, [CHOOSING_SEED]) if each["setting"] == {"lr": lr})
            loss = _loss(final_loss(run))
            row.append(f"**{loss}**" if setting_of(runs, name, method) == {"lr": lr} else loss)
        rows.append(row)
    return table(["", *(f"{method} {lr:g}" for method, lr in columns)], rows)


def _reported(runs: Sequence[Record], network: str, method: str) -> list[Record]:
    setting = setting_of(runs, network, method)
    found = [run for run in select(runs, network, method, seeds_of(network)) if run["setting"] == setting]
    return sorted(found, key=lambda run: int(run["seed"]))


def _number(value: float | None) -> float:
    """Return what is None in the raw data, as it was not finite, as infinite."""
    return math.inf if value is None else value


def _loss(value: float) -> str:
    return f"{value:.2g}" if math.isfinite(value) else DIVERGED
