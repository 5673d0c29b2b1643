"""The operators and what stands beside each in plain torch, for pytest-benchmark: a group an operator.

The same in turns, with ratios, are test_kernels.py and test_losses.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.operators import LOSS_CALLS, LOSSES, PARAMETERS, Vectors, loss_calls, vectors
from benchmarks.report import cores, threads_text

THREADS = sorted({1, cores()})
ROUNDS = 20
ROWS, COLUMNS = 2048, 96


@pytest.fixture(scope="module")
def flat() -> Vectors:
    return vectors()


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(
    ("operator", "name"), [(operator, name) for operator, calls in PARAMETERS.items() for name in calls]
)
def test_parameters(
    operator: str,
    name: str,
    threads: int,
    flat: Vectors,
    benchmark: BenchmarkFixture,
    set_threads: Callable[[int], None],
) -> None:
    set_threads(threads)
    benchmark.group = f"{operator}, {threads_text(threads)}"
    benchmark.pedantic(PARAMETERS[operator][name](flat), rounds=ROUNDS, warmup_rounds=2)


@pytest.mark.parametrize("name", LOSS_CALLS)
@pytest.mark.parametrize("loss", LOSSES)
def test_loss(loss: Any, name: str, benchmark: BenchmarkFixture, set_threads: Callable[[int], None]) -> None:
    set_threads(1)
    benchmark.group = f"{loss.__name__}, {ROWS} x {COLUMNS}, 1 thread"
    call = loss_calls(loss, ROWS, COLUMNS)[name]
    benchmark.pedantic(call, rounds=ROUNDS, iterations=5, warmup_rounds=1)
