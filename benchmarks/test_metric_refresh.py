"""Ways to refresh the bases of the Kronecker metric, on a CPU, one thread: QR is what the package takes there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.compare import compare
from benchmarks.refreshes import SETTLED, WAYS, quality, side
from benchmarks.report import Report
from benchmarks.steps import repeated

CPU = torch.device("cpu")
SHAPES = [(1, 32), (12, 32), (1, 64), (12, 64), (1, 128), (6, 128)]
ROUNDS, FLOATS = 10, 2**17  # of all matrices in a round


@pytest.mark.parametrize(("count", "n"), SHAPES)
def test_metric_refresh(
    count: int, n: int, report: Report, benchmark: BenchmarkFixture, set_threads: Callable[[int], None]
) -> None:
    set_threads(1)
    factor, basis = side(count, n, CPU, settled=True)
    calls = max(1, FLOATS // factor.numel())
    timings = compare(
        {name: repeated(partial(way, factor, basis), calls) for name, way in WAYS.items()}, "QR", ROUNDS, units=calls
    )
    rows = []
    for name, timing in timings.items():
        error, off_diagonal = quality(WAYS[name], count, n, CPU)
        rows.append({"": name} | timing.columns() | {"error of QᵀQ": error, "off diagonal": off_diagonal})
    note = (
        f"{count} matrices of {n} x {n} at once, float32; one thread. Error of QᵀQ: its largest entry over {SETTLED} "
        "refreshes from the identity. Off diagonal: the norm of what QᵀFQ then has there, over that of F; where it "
        "stays large, the way is no refresh, whatever it costs."
    )
    report.add(f"refresh, {count} of {n} x {n}", note, rows)
    benchmark.extra_info["comparison"] = rows
    benchmark.pedantic(partial(WAYS["QR"], factor, basis), rounds=ROUNDS)
