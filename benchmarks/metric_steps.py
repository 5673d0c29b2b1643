"""Steps in the Kronecker metric and of AdamW under autocast, and the times of all steps of a turn, on any device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compare import Spread
from benchmarks.nets import Case
from benchmarks.report import bar
from curveball_fused import CurveBall, make_graphed_step

Step = Callable[[], Tensor]

BAR = 1.25  # a step over one of fused AdamW
ADAMW = "AdamW, fused"
TURN = 20  # steps: one of them solves, and each basis is refreshed once
WARM_UP = 12  # among the first ten are more solves than later


def under_autocast(model: torch.nn.Module, half: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """The model as it is trained in a half precision; None: in its own."""

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, half or torch.bfloat16, enabled=half is not None):
            out: Tensor = model(x)
            return out

    return forward


def adamw(case: Case, half: torch.dtype | None = None) -> Step:
    """Fused AdamW; each step returns the loss before it."""
    model, x, y = case.make()
    forward = under_autocast(model, half)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(x).float(), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def kronecker(case: Case, half: torch.dtype | None = None, backend: str = "auto") -> Step:
    """CurveBall in the metric, with its defaults."""
    model, x, y = case.make()
    forward = under_autocast(model, half)
    optimizer = CurveBall(model.parameters(), preconditioner="kronecker", backend=backend)
    return lambda: optimizer.step(lambda: forward(x), lambda out: F.cross_entropy(out, y))[0]


def graphed_kronecker(case: Case, half: torch.dtype | None = None) -> Step:
    """The same as CUDA graphs."""
    model, x, y = case.make()
    optimizer = CurveBall(model.parameters(), preconditioner="kronecker")
    step = make_graphed_step(optimizer, under_autocast(model, half), F.cross_entropy, (x, y))
    return lambda: step(x, y)[0]


def seconds_of_each(step: Step, count: int, device: torch.device) -> list[float]:
    """The times of `count` steps in a row.

    On a GPU they are those between events in its queue, for which nothing waits: of the device, and of the host where
    the device waits for it.
    """
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(count):
            step()
            marks.append(time.perf_counter())
        return [after - before for before, after in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [1e-3 * before.elapsed_time(after) for before, after in pairwise(events)]


def rows(steps: Mapping[str, Step], device: torch.device, turns: int, turn: int = TURN) -> list[dict[str, Any]]:
    """A table of `steps`, timed in turns; `ADAMW` is among them."""
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    seconds: dict[str, list[list[float]]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, step in steps.items():
            seconds[name].append(seconds_of_each(step, turn, device))

    def over_adamw(name: str, of: Callable[[list[float]], float], of_adamw: Callable[[list[float]], float]) -> Spread:
        pairs = zip(seconds[name], seconds[ADAMW], strict=True)
        return Spread.of([of(own) / of_adamw(theirs) for own, theirs in pairs])

    table = []
    for name, own in seconds.items():
        mean, median = (over_adamw(name, of, of) for of in (statistics.mean, statistics.median))
        row: dict[str, Any] = {"": name, "ms": 1e3 * statistics.median(statistics.mean(times) for times in own)}
        row |= mean.columns("mean step / AdamW's") | median.columns("median step / AdamW's")
        row["slowest / AdamW's median"] = over_adamw(name, max, statistics.median).median
        verdicts = f"mean {bar(mean, BAR)}; median {bar(median, BAR)}"
        table.append(row | {"bar": None if name == ADAMW else verdicts})
    return table
