"""The 2x2 solve and the λ rule: against NumPy's least squares on real systems, and in every corner."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curveball_fused import backends, ops
from curveball_fused.backends.reference import parameters as reference
from curveball_fused.backends.scalars import SAFE_STEPS, SCALARS, SKIPPED_STEPS, Z_DOT_Z
from tests.helpers.solve_cases import Problem, cases

BACKENDS = ["torch"] + (["cpu"] if backends.has_operators() else [])
NAN = float("nan")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def scalars(lambd: float, z_dot_z: float, **others: float) -> Tensor:
    values = dict(
        lambd=lambd,
        z_dot_z=z_dot_z,
        beta=0.1,
        rho=0.2,
        ratio=0.7,
        loss=3.0,
        skipped_steps=4.0,
        safe_steps=2.0,
    )
    return torch.tensor([(values | others).get(name, 0.0) for name in SCALARS], dtype=torch.float64)


def named(values: Tensor) -> dict[str, float]:
    return dict(zip(SCALARS, values.tolist(), strict=True))


def solved(problem: Problem, backend: str, direct: bool = False, **options: Any) -> dict[str, float]:
    """All scalars after the solve of a problem, by dot products in its metric or by adjointness."""
    state = scalars(problem.lambd, -1.0 if direct else float(problem.dots[0]))
    dots = problem.dots if direct else None
    options = dict(theta=problem.theta) | options
    result = ops.solve(state, torch.tensor(1.25), problem.products, dots, backend=backend, **options)
    assert named(state)["beta"] == 0.1, "the given scalars were changed"
    return named(result)


@every_backend
@pytest.mark.parametrize("direct", [False, True])
@given(
    seed=st.integers(0, 10**6),
    exponent=st.integers(-6, 6),
    lambd=st.floats(1e-3, 1e3),
    lr=st.floats(0.1, 1.5),
)
def test_minimizes_the_model(backend: str, direct: bool, seed: int, exponent: int, lambd: float, lr: float) -> None:
    problem = Problem(seed, lambd, scale=10.0**exponent)
    result = solved(problem, backend, direct, lr=lr)
    scale = np.diag(problem.a) ** -0.5
    y = np.linalg.lstsq(scale[:, None] * problem.a * scale, scale * problem.b, rcond=1e-12)[0]
    x = scale * y
    ours = np.array([result["beta"], -result["rho"]])
    # The value of the model is what matters, and it is well conditioned where x is not.
    assert problem.model(ours[0], -ours[1]) == pytest.approx(problem.model(x[0], -x[1]), rel=1e-6)
    assert result["linear_term"] == pytest.approx(ours @ problem.b, rel=1e-6)
    assert result["quadratic_term"] == pytest.approx(ours @ problem.a @ ours, rel=1e-5)
    assert result["predicted_change"] == pytest.approx(-0.5 * lr * (2 - lr) * float(problem.b @ ours), rel=1e-4)
    assert (
        result["loss"] == 1.25 and result["skipped_steps"] == 4 and result["safe_steps"] == 2 and result["ratio"] == 0.7
    )


@every_backend
@given(seed=st.integers(0, 10**6), lambd=st.floats(1e-3, 1e3), value=st.floats(0.01, 0.99))
def test_one_value_fixed(backend: str, seed: int, lambd: float, value: float) -> None:
    problem = Problem(seed, lambd)
    (a11, a12), (_, a22) = problem.a
    rho = solved(problem, backend, beta=value)
    assert rho["beta"] == value and rho["rho"] == pytest.approx((a12 * value - problem.b[1]) / a22, rel=1e-8, abs=1e-10)
    beta = solved(problem, backend, rho=value)
    assert beta["rho"] == value and beta["beta"] == pytest.approx(
        (problem.b[0] + a12 * value) / a11, rel=1e-8, abs=1e-10
    )
    both = solved(problem, backend, rho=value, beta=0.3)
    assert (both["rho"], both["beta"]) == (value, 0.3)


@every_backend
def test_first_step_has_no_momentum(backend: str) -> None:
    problem = Problem(1, 0.3, zero_z=True)
    result = solved(problem, backend)
    assert result["beta"] == pytest.approx(problem.b[0] / problem.a[0, 0], rel=1e-12) and result["rho"] == 0


@every_backend
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_parallel_directions(backend: str, sign: float) -> None:
    """r = ±2z, one output: the minimum-norm step in the scaled variables, and the model's minimum all the same."""
    g, h, jz, lambd, zz = 0.7, 1.3, 0.9, 0.2, 0.5
    products = torch.tensor(
        [g * jz, jz * h * jz, 2 * sign * g * jz, 2 * sign * h * jz**2, 4 * h * jz**2], dtype=torch.float64
    )
    dots = torch.tensor([zz, 2 * sign * zz, 4 * zz], dtype=torch.float64)
    result = named(ops.solve(scalars(lambd, zz), torch.tensor(1.0), products, dots, backend=backend))
    along = result["beta"] * (2 * sign + lambd) - result["rho"]  # the step is -along · z
    assert along == pytest.approx(g * jz / (h * jz**2 + lambd * zz), rel=1e-9)
    assert result["beta"] * (2 * sign + lambd) == pytest.approx(-result["rho"], rel=1e-9)


@every_backend
def test_nothing_to_do_at_a_stationary_point(backend: str) -> None:
    result = named(
        ops.solve(scalars(0.5, 0.0), torch.tensor(1.0), torch.zeros(5, dtype=torch.float64), backend=backend)
    )
    assert (result["beta"], result["rho"], result["predicted_change"], result["skipped_steps"]) == (
        0,
        0,
        0,
        4,
    )


@every_backend
@given(seed=st.integers(0, 10**6), lambd=st.floats(1e-3, 1.0))
def test_concave_loss_takes_a_safe_step_down(backend: str, seed: int, lambd: float) -> None:
    problem = Problem(seed, lambd, convex=False)
    result = solved(problem, backend)
    dd = problem.delta @ problem.delta
    assert result["safe_steps"] == 3 and result["rho"] == 0
    assert result["beta"] == pytest.approx(problem.b[0] / max(abs(problem.a[0, 0]), lambd * dd), rel=1e-9)
    step = -result["beta"] * problem.delta
    assert -result["beta"] * problem.b[0] <= 0, "the step climbs"
    assert np.linalg.norm(step) <= abs(problem.b[0]) / (lambd * np.sqrt(dd)) * (1 + 1e-9), "the step leaps"
    assert result["predicted_change"] == pytest.approx(-0.5 * result["linear_term"])
    assert solved(problem, backend, rho=0.4)["rho"] == 0.4
    assert solved(problem, backend, beta=0.4)["beta"] == 0.4


@every_backend
def test_curvature_that_damping_barely_outweighs_is_not_trusted(backend: str) -> None:
    """A is positive definite, but only just: A⁻¹ b would leap a hundred times further than the damping allows."""
    zz, lambd = 0.0, 1.0
    products = torch.tensor([0.0, 0.0, 1.0, 0.0, -0.99], dtype=torch.float64)
    result = named(ops.solve(scalars(lambd, zz), torch.tensor(1.0), products, backend=backend))
    assert result["beta"] == pytest.approx(1.0) and result["safe_steps"] == 3


@every_backend
@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("fixed", [{}, dict(beta=0.1, rho=0.9)], ids=str)
def test_not_finite_is_skipped_and_counted(backend: str, bad: float, place: int, fixed: dict[str, float]) -> None:
    problem = Problem(2, 0.3)
    loss = torch.tensor(bad if place == 5 else 1.0)
    if place < 5:
        problem.products[place] = bad
    state = scalars(0.3, float(problem.dots[0]))
    result = named(ops.solve(state, loss, problem.products, backend=backend, **fixed))
    expected = named(state) | dict(linear_term=0.0, quadratic_term=0.0, predicted_change=0.0, skipped_steps=5.0)
    expected["direction_damping"] = 0.3
    for name, value in result.items():
        if name in ("beta", "rho"):
            assert value != value
        elif name != "loss":
            assert value == expected[name], name


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensor_lr_and_dtypes_of_the_loss(backend: str, dtype: torch.dtype) -> None:
    problem = Problem(3, 0.2)
    state = scalars(0.2, float(problem.dots[0]))
    loss = torch.tensor(1.25, dtype=dtype)
    for lr in (0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)):
        result = named(ops.solve(state, loss, problem.products, lr=lr, backend=backend))
        assert result["loss"] == 1.25
        assert result["predicted_change"] == pytest.approx(-0.5 * 0.5 * 1.5 * result["linear_term"])


@every_backend
@pytest.mark.parametrize("theta", [0.0, 0.4, 1.0])
@given(seed=st.integers(0, 10**6), lambd=st.floats(1e-3, 1e3))
def test_minimizes_the_model_in_any_metric(backend: str, theta: float, seed: int, lambd: float) -> None:
    problem = Problem(seed, lambd, theta=theta, metric=True)
    result = solved(problem, backend, direct=True)
    beta, minus_rho = np.linalg.solve(problem.a, problem.b)
    assert problem.model(result["beta"], result["rho"]) == pytest.approx(problem.model(beta, -minus_rho), rel=1e-6)
    assert result["direction_damping"] == theta * lambd and result["safe_steps"] == 2


@every_backend
@pytest.mark.parametrize("theta", [0.0, 0.4])
@given(seed=st.integers(0, 10**6), lambd=st.floats(1e-3, 1e3))
def test_adjointness_gives_the_dot_products_at_any_share_of_the_residual(
    backend: str, theta: float, seed: int, lambd: float
) -> None:
    problem = Problem(seed, lambd, theta=theta)
    direct, adjoint = (solved(problem, backend, direct=direct) for direct in (True, False))
    for name in ("beta", "rho", "linear_term", "quadratic_term"):
        assert adjoint[name] == pytest.approx(direct[name], rel=1e-6, abs=1e-9), name


@every_backend
@given(seed=st.integers(0, 10**6), lambd=st.floats(1e-3, 1.0))
def test_a_safe_step_along_the_gradient_in_a_metric(backend: str, seed: int, lambd: float) -> None:
    problem = Problem(seed, lambd, convex=False, theta=0.0, metric=True)
    result = solved(problem, backend, direct=True)
    damping = lambd * float(problem.dots[2])
    if problem.a[0, 0] < damping / 2 or problem.a[1, 1] < lambd * float(problem.dots[0]) / 2:
        assert result["safe_steps"] == 3 and result["rho"] == 0
        assert result["beta"] == pytest.approx(problem.b[0] / max(abs(problem.a[0, 0]), damping), rel=1e-9)
        assert result["quadratic_term"] == result["linear_term"]


@every_backend
def test_bounded_momentum_is_the_best_within_its_bounds(backend: str) -> None:
    free = []
    for seed in range(30):
        problem = Problem(seed, 0.1, theta=(0.0, 1.0)[seed % 2], metric=True)
        free.append(solved(problem, backend, direct=True)["rho"])
        result = solved(problem, backend, direct=True, bounded=True)
        assert result["rho"] == min(max(free[-1], 0.0), 1.0)
        for rho in np.linspace(0, 1, 11):
            beta = (problem.b[0] + problem.a[0, 1] * rho) / problem.a[0, 0]
            assert problem.model(result["beta"], result["rho"]) <= problem.model(beta, rho) + 1e-9
        x = np.array([result["beta"], -result["rho"]])
        assert result["quadratic_term"] == pytest.approx(x @ problem.a @ x, rel=1e-9)
    assert min(free) < 0 and max(free) > 1 and any(0 < rho < 1 for rho in free)


@every_backend
def test_bounds_are_for_a_momentum_that_is_solved_for(backend: str) -> None:
    free = []
    for seed in range(20):
        problem = Problem(seed, 0.1, theta=0.0)
        free.append(solved(problem, backend, beta=0.3)["rho"])
        result = solved(problem, backend, beta=0.3, bounded=True)
        assert result["beta"] == 0.3 and result["rho"] == min(max(free[-1], 0.0), 1.0)
        for rho in (-0.5, 1.5):
            assert solved(problem, backend, rho=rho, bounded=True) == solved(problem, backend, rho=rho)
    assert min(free) < 0 and max(free) > 1


@every_backend
@pytest.mark.parametrize("average", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("fixed", [{}, dict(beta=0.3), dict(rho=0.7)], ids=str)
def test_coefficients_are_averaged_over_solves(backend: str, average: float, fixed: dict[str, float]) -> None:
    """Those so far alike, until there are 1/(1 - average); a skipped step counts for nothing."""
    state, means, solves, factors = scalars(0.1, -1.0), {"beta": 0.0, "rho": 0.0}, 0, []
    for seed in range(9):
        problem = Problem(seed, 0.1, theta=0.4, metric=True)
        now = solved(problem, backend, direct=True, **fixed)
        loss, before = torch.tensor(NAN if seed == 3 else 1.25), named(state)
        state = ops.solve(
            state, loss, problem.products, problem.dots, theta=0.4, average=average, lr=0.7, backend=backend, **fixed
        )
        result = named(state)
        if seed == 3:
            assert result["beta"] != result["beta"] and result["predicted_change"] == 0
            assert all(result[name] == before[name] for name in ("average_beta", "average_rho", "solves"))
            continue
        solves += 1
        share = max(1 - average, 1 / solves)
        for name in means:
            means[name] += share * (now[name] - means[name])
            assert result[f"average_{name}"] == pytest.approx(means[name], rel=1e-12, abs=1e-14)
        assert result["solves"] == solves and result["gathered"] == 0
        mean = np.array([means["beta"], -means["rho"]])
        falls, curves = mean @ problem.b, mean @ problem.a @ mean
        # To the minimum of this batch's model on the way, where it climbs along the averages.
        factors.append(max(falls, 0.0) / curves if share < 1 and not fixed and curves > 2 * falls else 1.0)
        x = np.array([result["beta"], -result["rho"]])
        np.testing.assert_allclose(x, factors[-1] * mean, rtol=1e-9, atol=1e-14)
        assert result["linear_term"] == pytest.approx(x @ problem.b, rel=1e-9)
        assert result["quadratic_term"] == pytest.approx(x @ problem.a @ x, rel=1e-9)
        assert all(result[name] == value for name, value in fixed.items())
    shortened = [factor for factor in factors if factor < 1]
    assert bool(shortened) == (average > 0 and not fixed)


@every_backend
@pytest.mark.parametrize("climbs", [False, True])
def test_a_step_by_averages_is_shortened_where_the_model_climbs(backend: str, climbs: bool) -> None:
    """To no step at all where it climbs from the start."""
    problem = Problem(0, 0.1, theta=0.0)
    once = solved(problem, backend)
    state = scalars(0.1, float(problem.dots[0]), average_beta=-9.0 if climbs else 9.0 * once["beta"], solves=3.0)
    result = named(ops.solve(state, torch.tensor(1.0), problem.products, theta=0.0, average=0.75, backend=backend))
    mean = np.array([result["average_beta"], -result["average_rho"]])
    falls, curves = mean @ problem.b, mean @ problem.a @ mean
    assert (falls < 0) == climbs and curves > 2 * falls
    assert result["beta"] == pytest.approx(max(falls, 0.0) / curves * mean[0])
    assert result["predicted_change"] == pytest.approx(-0.5 * max(falls, 0.0) ** 2 / curves)


@every_backend
@pytest.mark.parametrize("theta", [0.0, 0.4, 1.0])
def test_the_change_that_is_predicted_is_that_of_the_update(backend: str, theta: float) -> None:
    """With averaged coefficients too, which are not the minimizer: z ← ρ z - β Δ, and w moves by lr z."""
    state, lr = scalars(0.1, -1.0), 0.7
    for seed in range(4):
        problem = Problem(seed, 0.1, theta=theta, metric=True)
        state = ops.solve(
            state, torch.tensor(1.0), problem.products, problem.dots,
            theta=theta, average=0.9, bounded=True, lr=lr, backend=backend,
        )  # fmt: skip
        w, z = torch.zeros(9, dtype=torch.float64), torch.from_numpy(problem.z.copy())
        new = ops.update_groups_(
            [w], [z], [torch.from_numpy(problem.u)], state,
            group_sizes=[1], lr=[lr], weight_decay=[0.0], backend=backend,
        )  # fmt: skip
        coefficients = named(state)
        np.testing.assert_allclose(z, coefficients["rho"] * problem.z - coefficients["beta"] * problem.delta, atol=1e-9)
        assert coefficients["predicted_change"] == pytest.approx(problem.change(w.numpy()), rel=1e-8, abs=1e-10)
        torch.testing.assert_close(new[Z_DOT_Z], z.square().sum())


@every_backend
def test_a_safe_step_is_averaged_too(backend: str) -> None:
    """It predicts as if the length of what is used were the minimizer's."""
    problem = Problem(0, 0.1, convex=False)
    once = solved(problem, backend)
    state = scalars(0.1, float(problem.dots[0]), average_beta=1.0, average_rho=0.5, solves=3.0)
    result = named(ops.solve(state, torch.tensor(1.0), problem.products, average=0.75, backend=backend))
    assert result["safe_steps"] == 3 and result["rho"] == 0.375
    assert result["beta"] == pytest.approx(0.75 + 0.25 * once["beta"])
    linear_term = result["beta"] * problem.b[0] - result["rho"] * problem.b[1]
    assert result["linear_term"] == result["quadratic_term"] == pytest.approx(linear_term)
    assert result["predicted_change"] == pytest.approx(-0.5 * linear_term)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the native kernels")
def test_every_combination_of_options_on_the_cpu() -> None:
    kinds = set()
    for case in cases():
        result, expected = torch.ops.curveball_fused.solve(*case.arguments()), reference.solve(*case.arguments())
        torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-9, equal_nan=True)
        kinds.add((float(expected[SAFE_STEPS]), float(expected[SKIPPED_STEPS])))
    assert kinds == {(2.0, 2.0), (3.0, 2.0), (2.0, 3.0)}  # usual, safe and skipped


RULE = dict(low=0.4, high=1.6, factor=0.9, minimum=0.01, maximum=10.0)


@every_backend
@pytest.mark.parametrize(
    ("before", "new_loss", "expected"),
    [
        (1.0, 2.9, 1 / 0.9),  # γ = 0.1
        (1.0, 2.0, 1.0),  # γ = 1
        (1.0, 1.0, 0.9),  # γ = 2
        (1.0, 3.5, 1 / 0.9),  # climbed
        (1.0, NAN, 1 / 0.9),
        (1.0, float("inf"), 1 / 0.9),
        (1.0, -float("inf"), 1 / 0.9),
        (9.9, 3.5, 10.0),
        (0.0105, 1.0, 0.01),
    ],
)
def test_damping_follows_the_ratio(backend: str, before: float, new_loss: float, expected: float) -> None:
    state = scalars(before, 1.0, loss=3.0, predicted_change=-1.0)
    result = named(ops.adapt_damping(state, torch.tensor(new_loss), **RULE, backend=backend))
    assert result["lambd"] == pytest.approx(expected)
    assert result["ratio"] == pytest.approx(3.0 - new_loss, nan_ok=True)
    assert named(state)["lambd"] == before


@every_backend
@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_a_climb_that_was_expected_raises_the_damping(backend: str, ratio: float) -> None:
    """M > 0, which fixed β and ρ can bring about: the loss climbs as predicted, and γ looks good."""
    state = scalars(1.0, 1.0, loss=3.0, predicted_change=0.5)
    result = named(ops.adapt_damping(state, torch.tensor(3.0 + 0.5 * ratio), **RULE, backend=backend))
    assert result["ratio"] == ratio and result["lambd"] == pytest.approx(1 / 0.9)


@every_backend
@pytest.mark.parametrize("lr", [NAN, torch.tensor(NAN)], ids=["number", "tensor"])
def test_a_learning_rate_that_is_not_finite_skips_the_step(backend: str, lr: float | Tensor) -> None:
    problem = Problem(2, 0.3)
    state = scalars(0.3, float(problem.dots[0]))
    result = named(ops.solve(state, torch.tensor(1.0), problem.products, lr=lr, backend=backend))
    assert result["beta"] != result["beta"] and result["skipped_steps"] == 5 and result["predicted_change"] == 0


@every_backend
@pytest.mark.parametrize(
    "state",
    [dict(beta=NAN, predicted_change=0.0), dict(beta=NAN, predicted_change=-1.0), dict(predicted_change=0.0)],
    ids=str,
)
def test_damping_learns_nothing_from_a_skipped_step(backend: str, state: dict[str, float]) -> None:
    before = scalars(1.0, 1.0, **state)
    result = ops.adapt_damping(before, torch.tensor(1.0), **RULE, backend=backend)
    torch.testing.assert_close(result, before, rtol=0, atol=0, equal_nan=True)
