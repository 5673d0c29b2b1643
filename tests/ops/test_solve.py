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
from curveball_fused.backends.scalars import SCALARS

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


class Problem:
    """A random small problem: Jacobian, curvature of the loss, gradient and z, and all that follows from them."""

    def __init__(self, seed: int, lambd: float, scale: float = 1.0, convex: bool = True, zero_z: bool = False) -> None:
        rng = np.random.default_rng(seed)
        j, root, g = rng.normal(size=(4, 9)), rng.normal(size=(4, 4)), rng.normal(size=4)
        h = root @ root.T if convex else -root @ root.T
        z = np.zeros(9) if zero_z else scale * rng.normal(size=9)
        r = j.T @ (h @ j @ z + g)
        jz, jr = j @ z, j @ r
        self.lambd, self.z, self.r, self.g = lambd, z, r, g
        self.products = torch.tensor([g @ jz, jz @ h @ jz, g @ jr, jz @ h @ jr, jr @ h @ jr])
        self.dots = torch.tensor([z @ z, z @ r, r @ r])
        curvature = j.T @ h @ j + lambd * np.eye(9)
        self.delta = r + lambd * z
        basis = np.stack((self.delta, z), axis=1)
        self.a, self.b = basis.T @ curvature @ basis, basis.T @ j.T @ g

    def solve(self, backend: str, direct: bool = False, **options: Any) -> dict[str, float]:
        state = scalars(self.lambd, -1.0 if direct else float(self.dots[0]))
        result = ops.solve(
            state,
            torch.tensor(1.25),
            self.products,
            self.dots if direct else None,
            backend=backend,
            **options,
        )
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
    result = problem.solve(backend, direct, lr=lr)
    scale = np.diag(problem.a) ** -0.5
    y = np.linalg.lstsq(scale[:, None] * problem.a * scale, scale * problem.b, rcond=1e-12)[0]
    x = scale * y
    # The value of the model is what matters, and it is well conditioned where x is not.
    ours = np.array([result["beta"], -result["rho"]])

    def model(v: Any) -> Any:
        return v @ problem.a @ v / 2 - v @ problem.b

    assert model(ours) == pytest.approx(model(x), rel=1e-6)
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
    rho = problem.solve(backend, beta=value)
    assert rho["beta"] == value and rho["rho"] == pytest.approx((a12 * value - problem.b[1]) / a22, rel=1e-8, abs=1e-10)
    beta = problem.solve(backend, rho=value)
    assert beta["rho"] == value and beta["beta"] == pytest.approx(
        (problem.b[0] + a12 * value) / a11, rel=1e-8, abs=1e-10
    )
    both = problem.solve(backend, rho=value, beta=0.3)
    assert (both["rho"], both["beta"]) == (value, 0.3)


@every_backend
def test_first_step_has_no_momentum(backend: str) -> None:
    problem = Problem(1, 0.3, zero_z=True)
    result = problem.solve(backend)
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
    result = problem.solve(backend)
    dd = problem.delta @ problem.delta
    assert result["safe_steps"] == 3 and result["rho"] == 0
    assert result["beta"] == pytest.approx(problem.b[0] / max(abs(problem.a[0, 0]), lambd * dd), rel=1e-9)
    step = -result["beta"] * problem.delta
    assert -result["beta"] * problem.b[0] <= 0, "the step climbs"
    assert np.linalg.norm(step) <= abs(problem.b[0]) / (lambd * np.sqrt(dd)) * (1 + 1e-9), "the step leaps"
    assert result["predicted_change"] == pytest.approx(-0.5 * result["linear_term"])
    assert problem.solve(backend, rho=0.4)["rho"] == 0.4
    assert problem.solve(backend, beta=0.4)["beta"] == 0.4


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
