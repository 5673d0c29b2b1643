"""A graphed step on the GPU against a graphed step of momentum SGD, and against ordinary steps of both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compare import compare
from benchmarks.gpu.measure import in_a_row
from benchmarks.nets import CASES, Case
from benchmarks.report import Report, bar
from benchmarks.steps import INTERVAL, sgd
from curveball_fused import CurveBall, make_graphed_step
from tests.gpu.device import DEVICE, launches

BATCH, ROUNDS = 128, 10
STEPS = 4 * INTERVAL
BAR = 2.6
Step = Callable[[], Tensor]


def graphed_sgd(case: Case) -> Step:
    """The whole step of `steps.sgd`, captured as torch's documentation shows it."""
    model, x, y = case.make(BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay(held: object = (model, x, y, optimizer)) -> Tensor:
        """Replay, and hold what the graph reads by its address."""
        graph.replay()
        return loss

    return replay


def eager(case: Case) -> Step:
    model, x, y = case.make(BATCH)
    optimizer = CurveBall(model.parameters())
    return lambda: optimizer.step(lambda: model(x), lambda out: F.cross_entropy(out, y))[0]


def graphed(case: Case) -> Step:
    model, x, y = case.make(BATCH)
    step = make_graphed_step(CurveBall(model.parameters()), model, F.cross_entropy, (x, y))
    return lambda: step(x, y)[0]


@pytest.mark.parametrize("name", ["mlp", "gpt", "resnet18"])
def test_graphed_step(name: str, report: Report) -> None:
    case = CASES[name]
    with DEVICE:
        steps = {"SGD, graphed": graphed_sgd(case), "SGD": sgd(case, BATCH)}
        steps |= {"CurveBall": eager(case), "CurveBall, graphed": graphed(case)}

    calls = {method: in_a_row(step, STEPS) for method, step in steps.items()}
    for call in calls.values():
        call()
    timings = compare(calls, "SGD, graphed", ROUNDS, units=STEPS)
    rows = []
    for method, timing in timings.items():
        verdict = bar(timing.ratio, BAR) if method == "CurveBall, graphed" else None
        rows.append({"": method} | timing.columns() | {"launches": len(launches(steps[method])), "bar": verdict})
    note = (
        f"Batch {BATCH}, float32, time on the wall; {ROUNDS} rounds of {STEPS} steps; launches: kernels, copies and "
        "fills of one step that the profiler saw. CurveBall: defaults, with its updates of λ."
    )
    report.add(f"graphed step, {case.name}", note, rows)
    assert all(step().isfinite() for step in steps.values())
