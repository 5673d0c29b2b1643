"""Whole steps of all optimizers: for pytest-benchmark, a group a net; and in turns, as ratios over AdamW.

`--benchmark-only` takes the first, which compare with another commit by --benchmark-save and --benchmark-compare,
`--benchmark-skip` the second. Within the first one optimizer follows the other, so that a slow spell of the machine
falls upon some of them: ratios are those of the second.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.compare import compare
from benchmarks.nets import CASES
from benchmarks.optimizers import ADAMW, OPTIMIZERS, STEPS_OF_A_TURN, WARM_UP, installed
from benchmarks.report import Report, cores, threads_text
from benchmarks.steps import repeated

ROUNDS = {"mlp": 9, "gpt": 3, "vit": 3, "basic_bn": 2, "resnet18": 1}  # of a turn of each optimizer
THREADS = [count for count in (1, 2) if count <= cores()]


@pytest.mark.parametrize("method", OPTIMIZERS)
@pytest.mark.parametrize("name", CASES)
def test_step(name: str, method: str, benchmark: BenchmarkFixture, set_threads: Callable[[int], None]) -> None:
    set_threads(1)
    case, steps = CASES[name], STEPS_OF_A_TURN[method]
    try:
        step = OPTIMIZERS[method](case, None)
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    benchmark.group = f"step, {case.name}, batch {case.batch}, 1 thread"
    benchmark.pedantic(step, rounds=ROUNDS[name], iterations=steps, warmup_rounds=1)
    if benchmark.stats is not None:
        benchmark.extra_info["samples / s"] = round(case.batch / benchmark.stats.stats.median, 1)
    assert step().isfinite()


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("name", CASES)
def test_in_turns(name: str, threads: int, report: Report, set_threads: Callable[[int], None]) -> None:
    set_threads(threads)
    case, steps, rounds = CASES[name], installed(CASES[name]), ROUNDS[name]
    for method, step in steps.items():
        repeated(step, WARM_UP[method])()
    calls = {method: repeated(step, STEPS_OF_A_TURN[method]) for method, step in steps.items()}
    timings = compare(calls, ADAMW, rounds, units=STEPS_OF_A_TURN)
    rows = [
        {"": method, "samples / s": case.batch / statistics.median(timing.rounds), **timing.columns()}
        for method, timing in timings.items()
    ]
    note = (
        f"Batch {case.batch}, {threads_text(threads)}; ratio: of the time of a step over AdamW's, in turns of as many "
        f"steps as have the average cost; rounds: {rounds}. SGD, AdamW: fused. Muon: torch's for hidden matrices, "
        "pytorch_optimizer's where all are filters, beside AdamW. SOAP: of pytorch_optimizer."
    )
    report.add(f"throughput, {case.name}, {threads_text(threads)}", note, rows)
    assert all(step().isfinite() for step in steps.values())
