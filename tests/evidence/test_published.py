"""The method's own table: the page is what the raw data say, and the problems and systems are what they claim."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.evidence import published, solvers
from benchmarks.evidence.problems import PROBLEMS, LinearNetwork, Problem, Rosenbrock
from benchmarks.evidence.records import Records
from curveball_fused import CurveBall

ROSENBROCK, NOISY = (problem for problem in PROBLEMS[:2] if isinstance(problem, Rosenbrock))
LINEAR = LinearNetwork()

# Of CurveBall, mean and standard deviation of an independent implementation.
ELSEWHERE = {"deterministic": (13.2, 0.5), "noise_1": (12.8, 1.1), "noise_3": (13.5, 1.0), "linear": (40, 12)}


def test_raw_data_are_complete() -> None:
    records = published.RECORDS.read()
    for problem, system in itertools.product(PROBLEMS, solvers.SYSTEMS):
        seeds = [run["seed"] for run in published.reported_runs(records, problem, system)]
        assert sorted(seeds) == list(published.SEEDS)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_curveball_is_within_the_spread_measured_elsewhere(problem: Problem) -> None:
    runs = published.reported_runs(published.RECORDS.read(), problem, "CurveBall")
    mean, deviation = ELSEWHERE[problem.name]
    iterations = [run["iterations"] for run in runs]
    assert None not in iterations
    assert abs(sum(iterations) / len(iterations) - mean) < deviation


def test_rosenbrock_starts_on_a_line_and_ends_at_one_one() -> None:
    start = ROSENBROCK.start(range(100))
    assert torch.equal(start[:, 0], start[:, 1])
    assert -0.5 <= start.min() < start.max() <= 0
    assert not ROSENBROCK.residuals(torch.ones(2), torch.ones(())).any()
    u, v, epsilon = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    loss = epsilon**2 * 100 * (v - u**2) ** 2 + (1 - u) ** 2
    torch.testing.assert_close(solvers.loss_of(ROSENBROCK, torch.stack((u, v)), epsilon), loss)


def test_noise_is_of_its_range_and_does_not_depend_on_the_other_seeds() -> None:
    wide = PROBLEMS[2]
    drawn = torch.stack(list(itertools.islice(wide.draws([0, 1, 2]), 1500)))
    alone = torch.stack(list(itertools.islice(wide.draws([2]), 1500)))
    assert torch.equal(drawn[:, 2:], alone)
    assert 0 <= drawn.min() < 0.1
    assert 2.9 < drawn.max() <= 3
    assert torch.equal(next(ROSENBROCK.draws([0, 1])), torch.ones(2, dtype=torch.float64))


def network(w: Tensor, x: Tensor) -> Tensor:
    """W₂W₁x of every sample, as the problem is defined."""
    return F.linear(F.linear(x, w[:60].reshape(10, 6)), w[60:].reshape(10, 10))


def test_linear_network_has_the_loss_and_curvature_of_its_samples() -> None:
    x, a, w = LINEAR.sample(3)
    y = x @ a.T
    draw = next(LINEAR.draws([3]))[0]

    def loss(w: Tensor) -> Tensor:
        return (network(w, x) - y).square().sum() / len(x)

    torch.testing.assert_close(solvers.loss_of(LINEAR, w, draw), loss(w))
    jacobian = torch.func.jacrev(lambda w: network(w, x).flatten())(w)
    short = torch.func.jacrev(LINEAR.residuals)(w, draw)
    torch.testing.assert_close(short.T @ short, jacobian.T @ jacobian / len(x))

    parameter = torch.nn.Parameter(w.clone())
    optimizer = CurveBall([parameter], auto_lambda=False, **LINEAR.curveball)
    ours = solvers.OurCurveBall(LINEAR, w[None], **LINEAR.curveball)
    draws = LINEAR.draws([3])
    for _ in range(10):
        long, _ = optimizer.step(lambda: network(parameter, x), lambda out: (out - y).square().sum() / len(x))
        torch.testing.assert_close(ours.step(draws)[0], long, rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_first_order_methods_are_those_of_torch(name: str) -> None:
    parameters = [torch.nn.Parameter(w) for w in ROSENBROCK.start([0, 1])]
    method: solvers.Method
    optimizer: torch.optim.Optimizer
    if name == "SGD":
        method = solvers.SGD(ROSENBROCK, ROSENBROCK.start([0, 1]), lr=1e-3, momentum=0.9)
        optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
    else:
        method = solvers.Adam(ROSENBROCK, ROSENBROCK.start([0, 1]), lr=1e-2, beta1=0.9, beta2=0.99)
        optimizer = torch.optim.Adam(parameters, lr=1e-2, betas=(0.9, 0.99))
    draws = ROSENBROCK.draws([0, 1])
    for _ in range(20):
        method.step(draws)
        optimizer.zero_grad()
        sum(solvers.loss_of(ROSENBROCK, w, torch.ones(())) for w in parameters).backward()
        optimizer.step()
    torch.testing.assert_close(method.w, torch.stack([w.detach() for w in parameters]))


@pytest.mark.parametrize("system", ["CurveBall", "Levenberg-Marquardt", "BFGS", "Newton"])
@pytest.mark.parametrize("problem", [ROSENBROCK, NOISY], ids=lambda problem: problem.name)
def test_second_order_systems_converge(system: str, problem: Rosenbrock) -> None:
    setting = problem.curveball if system == "CurveBall" else {}
    for run in solvers.SYSTEMS[system](problem, [0, 1], setting):
        assert run.iterations is not None
        assert run.iterations <= 60
        assert run.loss < 1e-4
        assert len(run.path) == run.iterations


def test_newton_stays_at_a_saddle_point_and_says_so() -> None:
    (run,) = solvers.newton(LINEAR, [1], {})
    assert run.iterations is None
    assert run.loss > 1
    assert run.stuck


def test_divergence_is_no_number() -> None:
    (run,) = solvers.sgd(ROSENBROCK, [0], {"lr": 0.1, "momentum": 0.99})
    assert run.iterations is None
    assert not run.loss < float("inf")


def test_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grids = {"SGD + momentum": [{"lr": lr, "momentum": 0.9} for lr in (0.1, 1e-3)]}
    monkeypatch.setattr(published, "GRIDS", grids)
    monkeypatch.setattr(published, "CHOOSING_SEEDS", range(1000, 1002))
    monkeypatch.setattr(published, "SYSTEMS", {name: solvers.SYSTEMS[name] for name in ("CurveBall", "SGD + momentum")})
    records = Records("published", ("problem", "system", "setting", "seed"), tmp_path)
    published.make(records, [ROSENBROCK], range(2))
    whole = records.path.read_text(encoding="utf-8")
    assert len(records.read()) == 2 * 2 + 2 * 2
    assert published.setting_of(records.read(), ROSENBROCK, "SGD + momentum") == grids["SGD + momentum"][1]

    lines = whole.splitlines(keepends=True)
    records.path.write_text("".join(lines[:3] + lines[4:]), encoding="utf-8")
    published.make(records, [ROSENBROCK], range(2))
    assert records.path.read_text(encoding="utf-8") == "".join(lines[:3] + lines[4:] + lines[3:4])
