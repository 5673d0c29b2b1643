"""A step of a physics-informed net, which differentiates inside the model, against a step of Adam on the same loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from benchmarks.compare import compare
from benchmarks.report import Report, bar
from benchmarks.steps import INTERVAL, Step, repeated
from curveball_fused import CurveBall

BAR = 2.6  # over Adam; the fewest multiply-adds of an exact step are 7/3
POINTS, ROUNDS = 2048, 15
WIDTHS = (2, 64, 64, 48, 48, 1)
METHODS = ("linearize_operators", "forward", "double_backward")


def poisson() -> tuple[nn.Module, Callable[[], Tensor]]:
    """A net u, and what -Δu = f and u = 0 on the boundary leave of it."""
    torch.manual_seed(0)
    layers = [module for a, b in pairwise(WIDTHS) for module in (nn.Linear(a, b), nn.Tanh())]
    net = nn.Sequential(*layers[:-1]).double()
    x = torch.rand(POINTS, 2, dtype=torch.float64, requires_grad=True)
    boundary = torch.rand(POINTS // 8, 2, dtype=torch.float64)
    boundary[:, 0] = 0
    source = 2 * math.pi**2 * (math.pi * x.detach()).sin().prod(1)

    def residuals() -> Tensor:
        (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        second = [torch.autograd.grad(g[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
        return torch.cat([second[0] + second[1] + source, 10 * net(boundary)[:, 0]])

    return net, residuals


def loss(residuals: Tensor) -> Tensor:
    return residuals.square().mean()


def adam() -> Step:
    net, residuals = poisson()
    optimizer = torch.optim.Adam(net.parameters(), fused=True)

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss(residuals())
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def curveball(curvature: str) -> Step:
    net, residuals = poisson()
    optimizer = CurveBall(net.parameters(), backend="cpu", curvature=curvature)
    return lambda: optimizer.step(residuals, loss)[0]


@pytest.mark.parametrize("threads", [1])
def test_step_of_a_physics_informed_net(
    threads: int, report: Report, benchmark: BenchmarkFixture, set_threads: Callable[[int], None]
) -> None:
    set_threads(threads)
    steps = {"Adam": adam()} | {method: curveball(method) for method in METHODS}
    for step in steps.values():
        step()
    calls = {name: repeated(step, 1) for name, step in steps.items()}
    timings = compare(calls, "Adam", ROUNDS, turns=INTERVAL)
    rows = [
        {"": name, **timing.columns(), "bar": bar(timing.ratio, BAR) if name == METHODS[0] else None}
        for name, timing in timings.items()
    ]
    note = (
        f"Poisson's equation, tanh net {'-'.join(map(str, WIDTHS))}, {POINTS} points, {POINTS // 8} on the boundary, "
        f"float64, 1 thread. Adam: fused; zero_grad, forward, backward, step. {ROUNDS} rounds of {INTERVAL} steps."
    )
    report.add("step, physics-informed net", note, rows)
    benchmark.extra_info["comparison"] = rows
    benchmark.pedantic(calls[METHODS[0]], rounds=INTERVAL)
    assert all(step().isfinite() for step in steps.values())
