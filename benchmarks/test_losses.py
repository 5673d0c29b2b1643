"""The loss operators on the CPU, against the closed forms in torch and against the loss's own gradient; one thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F

from benchmarks.compare import compare
from benchmarks.operators import GRADIENT, LOSSES, loss_calls
from benchmarks.report import Report

SIZES = [(128, 10), (2048, 96)]
LARGE = (2048, 50257)


@pytest.mark.parametrize(
    ("loss", "rows", "columns"), [*((loss, *size) for loss in LOSSES for size in SIZES), (F.cross_entropy, *LARGE)]
)
def test_loss(loss: Any, rows: int, columns: int, report: Report, set_threads: Callable[[int], None]) -> None:
    set_threads(1)
    calls = loss_calls(loss, rows, columns)
    for call in calls.values():
        call()
    large = (rows, columns) == LARGE
    timings = compare(calls, GRADIENT, rounds=3 if large else 40, turns=1 if large else 5)
    table = [{"": name, **timing.columns()} for name, timing in timings.items()]
    note = "c = g + Hv and the five products of a step, against the loss and its gradient alone; float32, 1 thread."
    report.add(f"{loss.__name__}, {rows} x {columns}", note, table)
