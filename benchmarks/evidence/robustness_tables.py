"""The tables of docs/evidence-robustness.md, from the raw data."""

from __future__ import annotations

import math
import statistics
from typing import Any, NamedTuple

import numpy as np

from benchmarks.evidence.markdown import table
from benchmarks.evidence.records import Record
from benchmarks.evidence.robustness import (
    ADAM,
    BATCH_SIZES,
    CURVEBALLS,
    FACTORS,
    KRONECKER,
    METHODS,
    RECORDS,
    SGD,
    damping_name,
)

FIRST_ORDER = ADAM, SGD
DIVERGED = "diverged"
JUMP = 10.0  # times the lowest loss so far, from which on an epoch counts as a jump


class Run(NamedTuple):
    """One method on one net, with what all methods of this net share.

    Attributes:
        record: what they share.
        own: what is this method's.
    """

    record: Record
    own: dict[str, Any]

    @property
    def losses(self) -> list[float]:
        """Of the epochs; infinite where they are no number."""
        return [math.inf if loss is None else loss for loss in self.own["losses"]]

    @property
    def final(self) -> float:
        return self.losses[-1]

    @property
    def diverged(self) -> bool:
        """Whether a loss was not finite, or the last one is above that of the initial weights."""
        return not all(map(math.isfinite, self.losses)) or self.final > self.record["initial_loss"]

    @property
    def jump(self) -> tuple[float, float] | None:
        """The lowest epoch's loss and the largest multiple of it that follows, if that is more than JUMP times it."""
        pairs = [(min(self.losses[:i]), self.losses[i]) for i in range(1, len(self.losses))]
        low, high = max(pairs, key=lambda pair: pair[1] / pair[0])
        return (low, high) if high > JUMP * low else None

    @property
    def seconds(self) -> float:
        steps = len(self.losses) * self.record["steps_per_epoch"]
        early: int = min(steps, self.record["turn"])
        return early * self._early + (steps - early) * self._later

    def loss_after(self, seconds: float) -> float:
        """The loss at the epoch that ends then; between two epochs on a line."""
        turn = self.record["turn"]
        later_steps = (seconds - turn * self._early) / self._later
        steps = turn + later_steps if later_steps > 0 else seconds / self._early
        return float(np.interp(steps / self.record["steps_per_epoch"], range(1, len(self.losses) + 1), self.losses))

    @property
    def _early(self) -> float:
        """Seconds of a step of the first turn."""
        return float(self.own["first_turn_seconds_per_step"])

    @property
    def _later(self) -> float:
        return float(self.own["later_median_seconds_per_step"])


def runs(experiment: str) -> dict[str, dict[str, Run]]:
    """By case and method."""
    return {
        record["case"]: {method: Run(record, own) for method, own in record["runs"].items()}
        for record in RECORDS.read()
        if record["experiment"] == experiment
    }


def at_equal_epochs(ours: Run, other: Run) -> float:
    """Our final loss over the other's."""
    return ours.final / other.final


def at_equal_seconds(ours: Run, other: Run) -> float:
    """Our loss over the other's after the shorter run's time."""
    seconds = min(ours.seconds, other.seconds)
    return ours.loss_after(seconds) / other.loss_after(seconds)


EQUAL = {"epochs": at_equal_epochs, "seconds": at_equal_seconds}


def ratios(ours: str, other: str, equal: str) -> list[float]:
    """The ratio of losses for each random net; below 1 we are ahead."""
    return [EQUAL[equal](net[ours], net[other]) for net in runs("nets").values()]


def damping_ratios(method: str, factor: float) -> list[float]:
    """For each net: the final loss with λ at this factor of its default, over that with the default."""
    return [
        at_equal_epochs(net[damping_name(method, factor)], net[damping_name(method, 1.0)])
        for net in runs("damping").values()
    ]


def finite_range(values: list[float]) -> tuple[float, float]:
    """The range of those that are numbers; a run without one is counted as diverged."""
    finite = [value for value in values if math.isfinite(value)]
    return min(finite), max(finite)


def tables() -> dict[str, str]:
    """All tables in Markdown, by the names of their markers."""
    return {
        "robustness-50": _all_nets(),
        "robustness-jumps": _jumps(),
        "robustness-ahead": _ahead(),
        "robustness-behind": _behind(),
        "robustness-damping": _damping(),
        "robustness-batch": _batch(),
    }


def _all_nets() -> str:
    nets = runs("nets").values()
    rows = []
    for method in METHODS:
        own = [net[method] for net in nets]
        steps = sum(len(run.losses) * run.record["steps_per_epoch"] for run in own)
        skipped = sum(run.own["skipped_steps"] for run in own)
        price = [net[method].seconds / net[SGD].seconds for net in nets]
        rows.append([
            method, f"{sum(run.diverged for run in own)} of {len(own)}",
            f"{sum(run.jump is not None for run in own)} of {len(own)}",
            f"{skipped} of {steps}" if method in CURVEBALLS else "", _spread(price),
        ])  # fmt: skip
    heads = ["", "diverged", "jumped", "steps skipped", "seconds over SGD's: median (quartiles)"]
    return table(heads, rows)


def _jumps() -> str:
    """Runs that diverged, or whose loss jumped."""
    rows = []
    for net in runs("nets").values():
        for method, run in net.items():
            if run.jump or run.diverged:
                low, high = run.jump or (min(run.losses), max(run.losses))
                losses = [run.record["initial_loss"], low, high, run.final]
                rows.append([run.record["about"], method, *(f"{loss:.2g}" for loss in losses)])
    return table(["", "", "initial loss", "fell to", "rose to", "last epoch"], rows)


def _ahead() -> str:
    rows = []
    for equal in EQUAL:
        for ours in CURVEBALLS:
            for other in FIRST_ORDER:
                found = ratios(ours, other, equal)
                ahead = sum(ratio < 1 for ratio in found)
                rows.append([
                    f"equal {equal}", ours, other, f"{ahead} of {len(found)} ({ahead / len(found):.0%})",
                    _spread(found), f"{max(found):.3g}",
                ])  # fmt: skip
    return table(["after", "", "beside", "ahead on", "loss over the other's: median (quartiles)", "largest"], rows)


def _behind() -> str:
    """The random nets on which the Kronecker metric is behind in any of the four comparisons."""
    rows = []
    for net in runs("nets").values():
        found = [EQUAL[equal](net[KRONECKER], net[other]) for equal in EQUAL for other in FIRST_ORDER]
        if max(found) >= 1:
            rows.append([net[KRONECKER].record["about"], *(f"{ratio:.2f}" for ratio in found)])
    heads = [f"equal {equal}, {other.split()[0]}" for equal in EQUAL for other in FIRST_ORDER]
    return table(["", *heads], rows)


def _damping() -> str:
    nets = runs("damping").values()
    rows = []
    for factor in FACTORS:
        row = [f"{factor:g}"]
        for method in CURVEBALLS:
            found = damping_ratios(method, factor)
            diverged = sum(net[damping_name(method, factor)].diverged for net in nets)
            low, high = finite_range(found)
            row += [f"{statistics.median(found):.3g} ({low:.3g}-{high:.3g})", f"{diverged} of {len(nets)}"]
        rows.append(row)
    heads = [head for method in CURVEBALLS for head in (f"{method}: median (range)", "diverged")]
    return table(["first λ over its default", *heads], rows)


def _batch() -> str:
    found = runs("batch")
    rows = [
        [loss, str(size), *(_loss(found[f"{loss}, batch {size}"][method]) for method in METHODS)]
        for loss in ("cross-entropy", "MSE")
        for size in BATCH_SIZES
    ]
    return table(["loss", "batch", *METHODS], rows)


def _loss(run: Run) -> str:
    return DIVERGED if run.diverged else f"{run.final:.3g}"


def _spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3g} ({low:.3g}-{high:.3g})"
