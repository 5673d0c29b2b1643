"""The kernels that cross the parameters, against torch's own on the same memory: 32M float32, 64 tensors."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch

from benchmarks.compare import compare
from benchmarks.operators import COUNT, PARAMETERS, SIZE, Vectors, vectors
from benchmarks.report import Report, bar, cores, threads_text

UPDATE_BAR, DOTS_BAR, PRECONDITION_BAR = 1.10, 1.15, 1.00
ROUNDS, OTHER_ROUNDS = 40, 10
THREADS = sorted({1, cores()})


@pytest.fixture(scope="module")
def flat() -> Vectors:
    return vectors()


@pytest.mark.parametrize("threads", THREADS)
def test_update(threads: int, flat: Vectors, report: Report, set_threads: Callable[[int], None]) -> None:
    set_threads(threads)
    note = (
        "z ← (ρ-βλ) z - βr, w ← w + lr z, and z·z, which SGD does not compute, on 32M float32 in 64 tensors; "
        f"{threads_text(threads)}. All rows work on the same memory."
    )
    _measure("update_", threads, note, flat, UPDATE_BAR, report)
    assert torch.isfinite(flat[0]).all()


@pytest.mark.parametrize("threads", THREADS)
def test_dots(threads: int, flat: Vectors, report: Report, set_threads: Callable[[int], None]) -> None:
    set_threads(threads)
    note = (
        "z·z, z·r and r·r of two lists of 64 tensors, 32M float32 each, with sums in double precision, against "
        f"one torch.dot, a single sum over the same memory as two flat vectors; {threads_text(threads)}."
    )
    _measure("dots", threads, note, flat, DOTS_BAR, report)


@pytest.mark.parametrize("threads", THREADS)
def test_precondition(threads: int, flat: Vectors, report: Report, set_threads: Callable[[int], None]) -> None:
    set_threads(threads)
    # Adam reads w, z, v, r and writes w, z, v; ours reads v, r, z and writes u, v.
    moved = dict(zip(PARAMETERS["precondition_"], (28, 20, 16, 12, 20), strict=True))
    note = (
        "u ← r / p, v, and z·Pz, z·r and r·u, on 32M float32 in 64 tensors, against a whole step of Adam; GB/s: of "
        f"the memory that must be read and written; {threads_text(threads)}."
    )
    _measure("precondition_", threads, note, flat, PRECONDITION_BAR, report, moved)


def _measure(
    operator: str,
    threads: int,
    note: str,
    flat: Vectors,
    most: float,
    report: Report,
    moved: dict[str, int] | None = None,
) -> None:
    """Compares the alternatives with the first of them; the second is ours.

    The pair that a bar judges takes turns by itself: some of the others fill the caches with temporary tensors. `moved`
    has the bytes of an element, for a column of GB/s.
    """
    calls = {name: make(flat) for name, make in PARAMETERS[operator].items()}
    for call in calls.values():
        call()
    baseline, ours, *_ = calls
    pair = {name: calls[name] for name in (baseline, ours)}
    timings = compare(calls, baseline, OTHER_ROUNDS) | compare(pair, baseline, ROUNDS)
    rows = [
        {"": name, **timing.columns(), "bar": bar(timing.ratio, most) if name == ours else None}
        for name, timing in timings.items()
    ]
    if moved is not None:
        for row, (name, timing) in zip(rows, timings.items(), strict=True):
            row["GB/s"] = moved[name] * COUNT * SIZE / 1e9 / statistics.median(timing.rounds)
    report.add(f"{operator}, {threads_text(threads)}", note, rows)
