"""A whole optimizer step on the GPU against a step of fused momentum SGD, eager, on the benchmarks' networks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compare import Timing, compare
from benchmarks.gpu.measure import in_a_row
from benchmarks.nets import CASES
from benchmarks.report import Report
from benchmarks.steps import INTERVAL, sgd
from curveball_fused import CurveBall
from tests.gpu.device import BACKENDS, DEVICE

BATCH, ROUNDS = 128, 10


def curveball(name: str, backend: str) -> Callable[[], Tensor]:
    model, x, y = CASES[name].make(BATCH)
    optimizer = CurveBall(model.parameters(), backend=backend)
    return lambda: optimizer.step(lambda: model(x), lambda out: F.cross_entropy(out, y))[0]


@pytest.mark.parametrize("name", CASES)
def test_step(name: str, report: Report) -> None:
    with DEVICE:  # where the networks and data are made
        steps = {"SGD": sgd(CASES[name], BATCH)}
        steps |= {backend: curveball(name, backend) for backend in (*BACKENDS, "torch")}

    calls = {method: in_a_row(step, INTERVAL) for method, step in steps.items()}
    for call in calls.values():
        call()
        call()
    timings: dict[str, Timing] = compare(calls, "SGD", ROUNDS, units=INTERVAL)
    rows = [{"": method} | timing.columns() for method, timing in timings.items()]
    note = (
        f"Batch {BATCH}, float32, eager, time on the wall; {ROUNDS} rounds of {INTERVAL} steps. SGD: momentum, fused; "
        "zero_grad, forward, backward, step. CurveBall: defaults, with its updates of λ, by backend."
    )
    report.add(f"step, {CASES[name].name}", note, rows)
    assert all(step().isfinite() for step in steps.values())
