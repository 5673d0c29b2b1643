"""The evidence of high accuracy: problems, methods and tables are what the page says."""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from benchmarks.evidence import accuracy, accuracy_seconds
from benchmarks.evidence.accuracy_figure import COLORS, draw
from benchmarks.evidence.accuracy_methods import ADAM, DEFAULTS, DENSE, KRONECKER, METHODS, Training, methods_on
from benchmarks.evidence.accuracy_problems import (
    IMAGE,
    JACOBIAN_BYTES,
    TASKS,
    Problem,
    franke_of,
    loss,
    perceptron,
    solution,
    temperature,
)
from benchmarks.evidence.accuracy_tables import Curve, tables_of
from benchmarks.evidence.levenberg_marquardt import LevenbergMarquardt, damped_step
from benchmarks.evidence.records import Record, Records

SHAPES = {
    "poisson": (1020,),
    "sinc": (200, 1),
    "autoencoder": (1000, 64),
    "siren": (80 * 120, 1),
    "heat": (989,),
    "franke": (900, 1),
}
WEIGHTS = {"poisson": 9873, "sinc": 61, "autoencoder": 9048, "siren": 8577, "heat": 2241, "franke": 1801}


def test_no_run_is_missing() -> None:
    assert not list(accuracy.RECORDS.missing(accuracy.settings_cases(list(TASKS))))
    assert not list(accuracy.RECORDS.missing(accuracy.reported_cases(list(TASKS))))


def test_the_figure_has_a_panel_for_each_problem_and_a_color_for_each_method() -> None:
    assert [ax.get_title() for ax in draw().axes] == [task.title for task in TASKS.values()]
    assert list(COLORS) == list(METHODS)


@pytest.mark.parametrize("name", TASKS)
def test_problems_have_their_shapes_and_start_from_a_seed(name: str) -> None:
    problem, again, other = (TASKS[name].make(seed) for seed in (0, 0, 1))
    residuals = problem.residuals(problem.net)
    assert residuals.shape == SHAPES[name] and residuals.dtype == torch.float64
    assert sum(p.numel() for p in problem.net.parameters()) == WEIGHTS[name]
    assert problem.error(problem.net) == again.error(again.net) != other.error(other.net)
    assert (problem.jacobian is None) == (8 * residuals.numel() * WEIGHTS[name] > JACOBIAN_BYTES)
    assert (DENSE in methods_on(name)) == (problem.jacobian is not None)


def test_the_image_has_more_pixels_than_the_net_has_weights() -> None:
    assert math.prod(IMAGE) > WEIGHTS["siren"]


def test_the_exact_solution_of_poissons_equation_has_no_error() -> None:
    problem = TASKS["poisson"].make(0)
    assert problem.error(lambda x: solution(x)[:, None]) == 0
    assert problem.error(lambda x: solution(x)[:, None] + 0.01) == pytest.approx(0.01)
    assert problem.residuals(lambda x: solution(x)[:, None]).abs().max() < 1e-12
    # Of u = 1: the mean of f², which the points' even grid gives nearly, and 1 on the boundary.
    constant = problem.residuals(lambda x: 1 + 0 * x[:, :1].square()).detach()
    assert float(loss(constant)) == pytest.approx((2 * math.pi**2) ** 2 / 4 * (31 / 30) ** 2 + 1)


def test_the_exact_solution_of_the_heat_equation_has_no_error() -> None:
    problem = TASKS["heat"].make(0)
    assert problem.error(lambda x: temperature(x)[:, None]) == 0
    assert problem.residuals(lambda x: temperature(x)[:, None]).abs().max() < 1e-12


def test_exact_fits_have_no_error() -> None:
    assert TASKS["franke"].make(0).error(lambda x: franke_of(x)[:, None]) == 0
    assert TASKS["sinc"].make(0).error(lambda x: (10 * x).sin() / (10 * x)) < 1e-30
    assert TASKS["autoencoder"].make(0).error(lambda x: x) == 0


@pytest.mark.parametrize("name", ["poisson", "sinc", "heat", "franke"])
def test_the_jacobian_is_autograds(name: str) -> None:
    problem = TASKS[name].make(0)
    assert problem.jacobian is not None
    jacobian = problem.jacobian(problem.net)
    residuals = problem.residuals(problem.net).flatten()
    for row in (0, 150, len(residuals) - 1):
        gradients = torch.autograd.grad(residuals[row], list(problem.net.parameters()), retain_graph=True)
        torch.testing.assert_close(jacobian[row], torch.cat([g.flatten() for g in gradients]))


def tiny() -> Problem:
    """The sinc on eleven points."""
    net = perceptron(0, nn.Tanh, 1, 5, 1)
    x = torch.linspace(-1, 1, 11, dtype=torch.float64)[:, None]

    def residuals(model: object) -> Tensor:
        assert callable(model)
        result: Tensor = model(x) - torch.sinc(x)
        return result

    def jacobian(net: nn.Module) -> Tensor:
        each = residuals(net).flatten().split(1)
        rows = [torch.autograd.grad(r, list(net.parameters()), retain_graph=True) for r in each]
        return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])

    return Problem(net, residuals, lambda model: float(loss(residuals(model)).detach()), jacobian)


@pytest.mark.parametrize(
    ("method", "setting"), [(method, next(iter(settings))) for method, settings in METHODS.items()]
)
def test_each_method_lowers_the_loss_in_a_few_steps(method: str, setting: str) -> None:
    if method == "SOAP" and not find_spec("pytorch_optimizer"):
        pytest.skip("pytorch_optimizer is not installed")
    problem = tiny()
    training = next(iter(METHODS[method].values()))(problem, 20)
    before = problem.error(problem.net)
    for _ in range(10):
        training.step()
    assert problem.error(problem.net) < 0.9 * before
    assert training.count >= 10


def test_a_cosine_ends_at_nothing() -> None:
    training = METHODS[ADAM]["lr 0.01, cosine"](tiny(), 4)
    rates: list[float] = []
    for _ in range(4):
        training.step()
        rates.append(training.optimizer.param_groups[0]["lr"])  # type: ignore[attr-defined]
    assert rates == pytest.approx([0.01 * (0.5 + 0.5 * math.cos(math.pi * t / 4)) for t in range(4)])


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_a_damped_step_is_that_of_the_dense_system(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    jacobian, r = torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], dtype=torch.float64)
    damping = torch.tensor(0.3, dtype=torch.float64)
    gram = jacobian @ jacobian.mT if shape[0] < shape[1] else jacobian.mT @ jacobian
    step = damped_step(jacobian, gram, r, jacobian.mT @ r, damping)
    dense = jacobian.mT @ jacobian + damping * torch.eye(shape[1], dtype=torch.float64)
    torch.testing.assert_close(step, -torch.linalg.solve(dense, jacobian.mT @ r))


def test_levenberg_marquardt_takes_that_step_and_lowers_the_damping() -> None:
    torch.manual_seed(0)
    jacobian, target = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    weight = nn.Parameter(torch.ones(4, dtype=torch.float64))
    r = (jacobian @ weight - target).detach()
    method = LevenbergMarquardt([weight], lambda: jacobian @ weight - target, lambda: jacobian)
    method.step()
    gram = jacobian.mT @ jacobian
    damping = 1e-3 * gram.diagonal().max()
    dense = gram + damping * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(weight.detach(), 1 - torch.linalg.solve(dense, jacobian.mT @ r))
    assert method.damping is not None
    assert float(method.damping) == pytest.approx(float(damping) / 3)  # as the model is exact


def test_levenberg_marquardt_stays_where_no_trial_is_better() -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    wrong = torch.ones(1, 1, dtype=torch.float64)  # of the residual 1 + w², which has its minimum here
    method = LevenbergMarquardt([weight], lambda: 1 + weight.square(), lambda: wrong)
    method.step()
    assert not weight.any()


def test_a_run_keeps_errors_by_step_and_ends_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy_seconds, "of", lambda problem, method: TASKS[problem].seconds / 30)
    run = accuracy.run("sinc", KRONECKER, DEFAULTS, 0)
    assert run["counts"][:3] == [1, 2, 3] and run["counts"][-1] == 30
    assert run["errors"] == run["losses"] and len(run["errors"]) == len(run["counts"])
    assert run["errors"][-1] < run["errors"][0]
    assert accuracy.run("sinc", "L-BFGS", DEFAULTS, 0)["counts"][-1] >= 30


class NoNumbers(Training):
    def __init__(self, problem: Problem, end: int) -> None:
        super().__init__(problem)

    @torch.no_grad()
    def step(self) -> None:
        next(self.problem.net.parameters()).fill_(math.nan)
        self.count += 1


def test_a_run_that_diverges_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy_seconds, "of", lambda problem, method: TASKS[problem].seconds / 30)
    monkeypatch.setattr(accuracy, "METHODS", {"none": {DEFAULTS: NoNumbers}})
    run = accuracy.run("sinc", "none", DEFAULTS, 0)
    assert run["counts"] == [1] and math.isnan(run["errors"][0])


def test_seconds_are_measured_of_all_methods_that_run(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records("accuracy-seconds", ("problem", "method"), tmp_path_factory.mktemp("seconds"))
    monkeypatch.setattr(accuracy_seconds, "RECORDS", records)
    monkeypatch.setattr(accuracy_seconds, "TURN", 1e-3)
    monkeypatch.setattr(accuracy_seconds, "methods_on", lambda problem: [ADAM, DENSE])
    assert accuracy_seconds.missing(["sinc"]) == ["sinc"]
    accuracy_seconds.measure(["sinc"])
    assert accuracy_seconds.missing(["sinc"]) == []
    assert all(0 < each["fastest"] <= each["seconds"] <= each["slowest"] for each in records.read())
    assert accuracy_seconds.of("sinc", ADAM) == records.read()[0]["seconds"]


def record(method: str, setting: str, seed: int, errors: list[float | None]) -> Record:
    counts = list(range(1, len(errors) + 1))
    return {
        "problem": "sinc", "method": method, "setting": setting, "seed": seed, "counts": counts, "errors": errors,
    }  # fmt: skip


def test_errors_between_counts_lie_on_a_line_of_logarithms() -> None:
    curve = Curve({"counts": [1, 4, 16], "errors": [1.0, 1e-2, 1e-3]}, seconds_per_count=0.5)
    assert [curve.error_after(t) for t in (0.1, 0.5, 1, 2, 8, 100)] == pytest.approx([1, 1, 0.1, 1e-2, 1e-3, 1e-3])
    assert [curve.seconds_until(e) for e in (2.0, 0.1, 1e-3)] == pytest.approx([0.5, 1, 8])
    assert curve.seconds_until(1e-4) is None
    diverged = Curve({"counts": [1, 2], "errors": [1.0, None]}, seconds_per_count=1.0)
    assert diverged.final == diverged.error_after(1.5) == diverged.error_after(9) == math.inf


def test_tables_say_what_the_records_say() -> None:
    constant, cosine = "lr 0.01, constant", "lr 0.01, cosine"
    records = [
        record(ADAM, constant, 0, [1.0, 0.5]),
        record(ADAM, cosine, 0, [1.0, 0.1]),
        record(ADAM, cosine, 1, [1.0, 0.2]),
        record(ADAM, cosine, 2, [1.0, 0.3]),
        record(KRONECKER, DEFAULTS, 0, [0.2, 1e-3]),
        record(KRONECKER, DEFAULTS, 1, [0.5, None]),
        record("L-BFGS", DEFAULTS, 0, [1.0, 0.9]),
    ]
    seconds = [{"problem": "sinc", "method": method, "seconds": 2.5} for method in (ADAM, KRONECKER, "L-BFGS")]
    found = tables_of(records, seconds)

    def row(table: str, method: str) -> str:
        (line,) = (line for line in found[table].splitlines() if line.startswith(f"| {method} |"))
        return line.split("|")[3].strip()

    assert row("accuracy-settings", ADAM) == cosine
    assert row("accuracy-end", ADAM) == "0.2 (0.1-0.3)"
    assert row("accuracy-end", KRONECKER) == "diverged (0.001-diverged)"
    assert row("accuracy-end", "L-BFGS") == "0.9"
    assert row("accuracy-third", ADAM) == "1 (1-1)"
    assert row("accuracy-until", KRONECKER) == "2.5 (1 of 2)"
    assert row("accuracy-until", "L-BFGS") == "never (0 of 1)"
    assert row("accuracy-costs", ADAM) == "2.5e+03 ms (2)"
    assert row("accuracy-end", DENSE) == ""
