"""`solve`, `adapt_damping` and `keep_coefficients` in Triton against `reference`: on a GPU, or interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from curveball_fused.backends.reference import parameters as reference
from curveball_fused.backends.triton import parameters as triton_parameters
from tests.helpers import coefficient_cases
from tests.helpers.solve_cases import cases
from tests.helpers.triton_cases import DEVICE, INF, NAN, RUNTIME_WARNINGS, every_dtype, named, scalars

pytestmark = RUNTIME_WARNINGS


def check_solve(
    products: Tensor,
    dots: Tensor | None = None,
    beta: float | None = None,
    rho: float | None = None,
    lr: float = 0.7,
    lr_tensor: Tensor | None = None,
    loss: Tensor | None = None,
    **state: float,
) -> dict[str, float]:
    given, loss = scalars(**state), torch.tensor(1.25) if loss is None else loss
    arguments = given, loss.to(DEVICE), products.to(DEVICE), None if dots is None else dots.to(DEVICE), beta, rho
    ours = triton_parameters.solve(*arguments, lr, lr_tensor)
    expected = reference.solve(*arguments, lr, lr_tensor)
    torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-12, equal_nan=True)
    assert named(given) == named(scalars(**state)), "the given scalars were changed"
    return named(ours)


def problem(seed: int, lambd: float, convex: bool = True, zero_z: bool = False) -> tuple[Tensor, Tensor]:
    """products and dots of a random small problem."""
    generator = torch.Generator().manual_seed(seed)
    j, root, g, z = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((4, 9), (4, 4), (4,), (9,)))
    h, z = root @ root.T * (1 if convex else -1), z * (not zero_z)
    r = j.T @ (h @ j @ z + g)
    jz, jr = j @ z, j @ r
    return torch.stack((g @ jz, jz @ h @ jz, g @ jr, jz @ h @ jr, jr @ h @ jr)), torch.stack((z @ z, z @ r, r @ r))


@pytest.mark.parametrize("fixed", [{}, dict(beta=0.3), dict(rho=0.4), dict(beta=1 / 3, rho=0.9)], ids=str)
@pytest.mark.parametrize("convex", [True, False])
def test_solve(fixed: dict[str, float], convex: bool) -> None:
    for seed, lambd in enumerate((1e-3, 0.2, 1.0, 30.0)):
        products, dots = problem(seed, lambd, convex)
        direct = check_solve(products, dots, **fixed, lambd=lambd, z_dot_z=-1.0)
        adjoint = check_solve(products, **fixed, lambd=lambd, z_dot_z=float(dots[0]), lr=1 / 3)
        assert adjoint["beta"] == pytest.approx(direct["beta"], rel=1e-6)
        assert adjoint["safe_steps"] >= 2 and (adjoint["safe_steps"] == 2 or not convex)


@pytest.mark.parametrize("fixed", [{}, dict(beta=0.3), dict(rho=0.4)], ids=str)
def test_solve_on_the_first_step_and_at_rest(fixed: dict[str, float]) -> None:
    products, dots = problem(1, 0.3, zero_z=True)
    check_solve(products, dots, **fixed)
    check_solve(products, z_dot_z=0.0, **fixed)
    check_solve(torch.zeros(5, dtype=torch.float64), z_dot_z=0.0, **fixed)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_solve_of_parallel_directions(sign: float) -> None:
    g, h, jz, zz = 0.7, 1.3, 0.9, 0.5
    products = [g * jz, jz * h * jz, 2 * sign * g * jz, 2 * sign * h * jz**2, 4 * h * jz**2]
    dots = torch.tensor([zz, 2 * sign * zz, 4 * zz], dtype=torch.float64)
    result = check_solve(torch.tensor(products, dtype=torch.float64), dots, lambd=0.2)
    along = result["beta"] * (2 * sign + 0.2) - result["rho"]  # the step is -along · z
    assert along == pytest.approx(g * jz / (h * jz**2 + 0.2 * zz), rel=1e-9)


def test_solve_does_not_trust_a_curvature_that_damping_barely_outweighs() -> None:
    products = torch.tensor([0.0, 0.0, 1.0, 0.0, -0.99], dtype=torch.float64)
    result = check_solve(products, lambd=1.0, z_dot_z=0.0)
    assert result["beta"] == pytest.approx(1.0) and result["safe_steps"] == 3


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("fixed", [{}, dict(beta=0.1, rho=0.9)], ids=str)
def test_solve_skips_and_counts_what_is_not_finite(bad: float, fixed: dict[str, float]) -> None:
    products, dots = problem(2, 0.3)
    cases = [dict(loss=torch.tensor(bad)), dict(lr=bad), dict(lr_tensor=torch.tensor(bad, device=DEVICE))]
    for case in cases:
        check_solve(products, dots, **fixed, **case)
    for place in range(5):
        spoiled = products.clone()
        spoiled[place] = bad
        result = check_solve(spoiled, dots, **fixed)
        assert result["beta"] != result["beta"] and result["rho"] != result["rho"] and result["skipped_steps"] == 5
    for place in range(3):
        spoiled = dots.clone()
        spoiled[place] = bad
        assert check_solve(products, spoiled, **fixed)["skipped_steps"] == 5


@every_dtype
def test_solve_takes_loss_and_lr_of_any_dtype(dtype: torch.dtype) -> None:
    products, dots = problem(3, 0.2)
    number = torch.tensor(0.5, dtype=dtype, device=DEVICE)
    result = check_solve(products, dots, loss=torch.tensor(1.25, dtype=dtype), lr_tensor=number)
    assert result["loss"] == 1.25
    assert result["predicted_change"] == pytest.approx(-0.5 * 0.5 * 1.5 * result["linear_term"])


def test_every_combination_of_options() -> None:
    for case in cases():
        arguments = [a.to(DEVICE) if isinstance(a, Tensor) else a for a in case.arguments()]
        ours, expected = triton_parameters.solve(*arguments), reference.solve(*arguments)
        torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("lambd", [0.0105, 1.0, 9.9])
@pytest.mark.parametrize("new_loss", [2.9, 2.0, 1.0, 3.5, NAN, INF, -INF])
def test_adapt_damping(lambd: float, new_loss: float) -> None:
    states = [dict(predicted_change=change) for change in (-1.0, 0.5, 0.0)] + [dict(beta=NAN, predicted_change=-1.0)]
    for state in states:
        given = scalars(lambd=lambd, **state)
        arguments = given, torch.tensor(new_loss, device=DEVICE), 0.4, 1.6, 0.9, 0.01, 10.0
        ours, expected = triton_parameters.adapt_damping(*arguments), reference.adapt_damping(*arguments)
        torch.testing.assert_close(ours, expected, rtol=1e-15, atol=0, equal_nan=True)


@every_dtype
def test_keep_coefficients(dtype: torch.dtype) -> None:
    for arguments in coefficient_cases.cases([dtype], DEVICE):
        before = arguments[0].clone()
        ours, expected = triton_parameters.keep_coefficients(*arguments), reference.keep_coefficients(*arguments)
        torch.testing.assert_close(ours, expected, rtol=1e-15, atol=0, equal_nan=True)
        torch.testing.assert_close(arguments[0], before, rtol=0, atol=0, equal_nan=True)
