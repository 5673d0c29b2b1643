"""The text of the CUDA kernels for the scalars of a step, run on the CPU; and the operators' errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curveball_fused.backends.reference import parameters as reference
from curveball_fused.backends.scalars import PREDICTED_CHANGE, Z_DOT_Z
from tests.helpers import coefficient_cases
from tests.helpers.emulated import DTYPES, operators, scalars
from tests.helpers.solve_cases import cases


@given(
    seed=st.integers(0, 10**6),
    fixed=st.sampled_from([(None, None), (0.1, None), (None, 0.9), (0.1, 0.9)]),
    direct=st.booleans(),
    kind=st.sampled_from(["convex", "concave", "first step", "parallel", "infinite"]),
    loss_dtype=st.sampled_from(DTYPES),
    rate_dtype=st.sampled_from([None, *DTYPES]),
)
def test_solve(
    seed: int, fixed: Any, direct: bool, kind: str, loss_dtype: torch.dtype, rate_dtype: torch.dtype | None
) -> None:
    """Against `reference`, whose own tests hold it against least squares."""
    torch.manual_seed(seed)
    j, root, g = torch.randn(4, 9).double(), torch.randn(4, 4).double(), torch.randn(4).double()
    h = root @ root.T * (-1 if kind == "concave" else 1)
    z = torch.zeros(9).double() if kind == "first step" else torch.randn(9).double()
    r = 2 * z if kind == "parallel" else j.T @ (h @ j @ z + g)
    jz, jr = j @ z, j @ r
    products = torch.stack((g @ jz, jz @ h @ jz, g @ jr, jz @ h @ jr, jr @ h @ jr))
    dots = torch.stack((z @ z, z @ r, r @ r)) if direct or kind == "parallel" else None
    if kind == "infinite":
        products[seed % 5] = float("inf")
    s = scalars()
    s[Z_DOT_Z] = z @ z
    loss = torch.tensor(1.3).to(loss_dtype)
    lr_tensor = None if rate_dtype is None else torch.tensor(0.7).to(rate_dtype)
    result = operators.solve(s, loss, products, dots, *fixed, 0.4, lr_tensor)
    expected = reference.solve(s, loss, products, dots, *fixed, 0.4, lr_tensor)
    torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-9, equal_nan=True)


def test_every_combination_of_options() -> None:
    for case in cases():
        result, expected = operators.solve(*case.arguments()), reference.solve(*case.arguments())
        torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("new_loss", [2.0, 2.7, 2.9, 3.5, float("nan"), float("inf")])
@pytest.mark.parametrize("beta", [0.1, float("nan")])
@pytest.mark.parametrize("change", [-0.5, 0.0, 0.5])
def test_adapt_damping(dtype: torch.dtype, new_loss: float, beta: float, change: float) -> None:
    s, loss = scalars(beta), torch.tensor(new_loss).to(dtype)
    s[PREDICTED_CHANGE] = change
    rule = 0.5, 1.5, 0.9, 1e-3, 0.26
    torch.testing.assert_close(
        operators.adapt_damping(s, loss, *rule),
        reference.adapt_damping(s, loss, *rule),
        rtol=1e-14,
        atol=0,
        equal_nan=True,
    )


def test_keep_coefficients() -> None:
    for arguments in coefficient_cases.cases(DTYPES):
        before = arguments[0].clone()
        result, expected = operators.keep_coefficients(*arguments), reference.keep_coefficients(*arguments)
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(arguments[0], before, rtol=0, atol=0, equal_nan=True)


def test_errors_come_before_anything_changes() -> None:
    w, z, s = [torch.ones(3, 2)], [torch.ones(3, 2)], scalars()
    one = [1], [0.5], [0.0]
    for message, arguments in {
        "int64|Long": (w, z, [torch.zeros(3, 2, dtype=torch.int64)], s, *one),
        "convert z to float32": (w, [torch.zeros(3, 2, dtype=torch.float64)], w, s, *one),
        "convert r": (w, z, [torch.zeros(3, 2, dtype=torch.float64)], s, *one),
        "different sizes": (w, z, [torch.zeros(2, 3)], s, *one),
        "laid out differently": (w, z, [torch.zeros(2, 3).t()], s, *one),
        "not dense": ([torch.zeros(1).expand(3, 2)], z, w, s, *one),
        "same length": (w, [], w, s, *one),
        "group_sizes adds up": (w, z, w, s, [2], [0.5], [0.0]),
        "weight_decay has": (w, z, w, s, [1], [0.5], []),
        "scalars has dtype": (w, z, w, s.float(), *one),
        "scalars must be": (w, z, w, s[:3], *one),
        "lr_tensor must be": (w, z, w, s, *one, torch.ones(2)),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            operators.update_(*arguments)
    assert torch.equal(w[0], torch.ones(3, 2)) and torch.equal(z[0], torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="convert it to float32 or float64"):
        operators.dots([torch.zeros(3).half()], [torch.zeros(3)])
    with pytest.raises(RuntimeError, match="1 element"):
        operators.solve(s, torch.ones(2), torch.zeros(5).double(), None, None, None, 1.0)
    with pytest.raises(RuntimeError, match="products"):
        operators.solve(s, torch.ones(()), torch.zeros(4).double(), None, None, None, 1.0)
    one = s[0]
    for message, arguments in {
        "loss must be": (s, s[:2], one, one),
        "slope has dtype": (s, one, one.float(), one),
        "room must be": (s, one, one, s[:2]),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            operators.keep_coefficients(*arguments, 1.0)
