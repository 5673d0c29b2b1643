"""A whole compiled optimizer step against a compiled step of momentum SGD, one thread.

Compiling takes minutes, so `pytest benchmarks` does not collect this file: run `pytest benchmarks/compiled_step.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch._inductor.utils import fresh_cache

from benchmarks.compare import compare
from benchmarks.nets import CASES, Case
from benchmarks.report import Report
from benchmarks.steps import INTERVAL, Step, repeated, sgd
from curveball_fused import CurveBall

ROUNDS = {"mlp": 15, "gpt": 5, "vit": 5, "basic_bn": 5, "resnet18": 3}


def compiled_sgd(case: Case) -> Step:
    """`steps.sgd` with the model compiled; its parameter step is one fused kernel already."""
    model, x, y = case.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    compiled = torch.compile(model)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(compiled(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def compiled_curveball(case: Case) -> Step:
    model, x, y = case.make()
    optimizer = CurveBall(model.parameters(), backend="cpu", compile=True)
    return lambda: optimizer.step(lambda: model(x), lambda out: F.cross_entropy(out, y))[0]


@pytest.mark.filterwarnings("ignore:curveball_fused. compiling")
@pytest.mark.parametrize("name", CASES)
def test_compiled_step(
    name: str, report: Report, benchmark: BenchmarkFixture, set_threads: Callable[[int], None]
) -> None:
    set_threads(1)
    case, turns = CASES[name], 1 if name != "mlp" else 25
    makers = {"SGD": compiled_sgd, "CurveBall": compiled_curveball}
    seconds: dict[str, tuple[float, float]] = {}
    for method, make in makers.items():
        with fresh_cache():
            seconds[method] = (_first_step(make, case), _first_step(make, case))
    steps = {"SGD, eager": sgd(case)} | {method: make(case) for method, make in makers.items()}
    for step in steps.values():
        step()

    calls = {method: repeated(step, INTERVAL * turns) for method, step in steps.items()}
    timings = compare(calls, "SGD", ROUNDS[name], 1, INTERVAL * turns)
    over_eager = compare(calls, "SGD, eager", ROUNDS[name], 1, INTERVAL * turns)["CurveBall"].ratio.median
    rows = []
    for method, timing in timings.items():
        cold, warm = seconds.get(method, (None, None))
        row = {"": method} | timing.columns() | {"first step, s": cold, "from the cache, s": warm}
        rows.append(row | {"over eager SGD": over_eager if method == "CurveBall" else None})
    note = (
        f"Batch {case.batch}, 1 thread, {ROUNDS[name]} rounds of {INTERVAL * turns} steps. Ratios are those to SGD "
        "with the model compiled. CurveBall: compile=True, with its updates of λ. First step: with all that "
        "compiling takes; from the cache: when Inductor finds its code on disk."
    )
    report.add(f"compiled step, {case.name}", note, rows)
    benchmark.extra_info["comparison"] = rows
    benchmark.pedantic(calls["CurveBall"])
    assert all(step().isfinite() for step in steps.values())


def _first_step(make: Callable[[Case], Step], case: Case) -> float:
    """Seconds until the first step is done, of what has not been compiled in this process."""
    torch.compiler.reset()
    start = time.perf_counter()
    make(case)()
    return round(time.perf_counter() - start, 1)
