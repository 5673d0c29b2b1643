"""The operators on scalars on the GPU, against `reference` on the CPU, and the choice of a backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from curveball_fused import backends, ops
from curveball_fused.backends.scalars import SCALARS
from tests.gpu.device import DEVICE, DTYPES, draw, every_backend
from tests.helpers import coefficient_cases
from tests.helpers.solve_cases import cases

NAN, INF = float("nan"), float("inf")
SYSTEMS = ("convex", "concave", "no z", "parallel", "opposite", "nothing")


def scalars(lambd: float, z_dot_z: float, **others: float) -> Tensor:
    values = dict(lambd=lambd, z_dot_z=z_dot_z, beta=0.1, rho=0.2, ratio=0.7, loss=3.0, skipped_steps=4.0)
    return torch.tensor([(values | others).get(name, 0.0) for name in SCALARS], dtype=torch.float64)


def system(kind: str, seed: int) -> tuple[Tensor, Tensor]:
    """Products and dots of a random problem with four outputs and nine parameters."""
    torch.manual_seed(seed)
    j, root, g, z = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 9), (4, 4), (4,), (9,)))
    h = -root @ root.T if kind == "concave" else root @ root.T
    if kind in ("no z", "nothing"):
        z = torch.zeros_like(z)
    r = j.T @ (h @ j @ z + g)
    if kind in ("parallel", "opposite", "nothing"):
        r = {"parallel": 2.0, "opposite": -2.0, "nothing": 0.0}[kind] * z
    jz, jr = j @ z, j @ r
    products = torch.stack((g @ jz, jz @ h @ jz, g @ jr, jz @ h @ jr, jr @ h @ jr))
    return products, torch.stack((z @ z, z @ r, r @ r))


def check_solve(
    backend: str, state: Tensor, loss: Tensor, products: Tensor, dots: Tensor | None, **options: Any
) -> None:
    expected = ops.solve(state, loss, products, dots, backend="torch", **options)
    given = state.to(DEVICE)
    if isinstance(options.get("lr"), Tensor):
        options["lr"] = options["lr"].to(DEVICE)
    on_device = None if dots is None else dots.to(DEVICE)
    result = ops.solve(given, loss.to(DEVICE), products.to(DEVICE), on_device, backend=backend, **options)
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-8, atol=1e-12, equal_nan=True)
    assert torch.equal(given.cpu(), state)


@every_backend
@pytest.mark.parametrize("kind", SYSTEMS)
@pytest.mark.parametrize("fixed", [{}, dict(beta=0.3), dict(rho=0.8), dict(beta=0.3, rho=0.8)], ids=str)
def test_solve(backend: str, kind: str, fixed: dict[str, float]) -> None:
    for seed in range(6):
        products, dots = system(kind, seed)
        state = scalars(0.3 * 10 ** (seed - 3), float(dots[0]))
        direct = seed % 2 or kind in ("parallel", "opposite")  # there r is no gradient: adjointness does not hold
        loss, lr = torch.tensor(1.25), 0.4 + 0.1 * seed
        check_solve(backend, state, loss, products, dots if direct else None, lr=lr, **fixed)


@every_backend
def test_every_combination_of_options(backend: str) -> None:
    for case in cases():
        options: dict[str, Any] = dict(lr=case.lr, **case.fixed, **case.options)
        given = case.scalars, case.loss, case.products, case.dots
        on_device = (None if t is None else t.to(DEVICE) for t in given)
        result = ops.solve(*on_device, backend=backend, **options)
        expected = ops.solve(*given, backend="torch", **options)
        torch.testing.assert_close(result.cpu(), expected, rtol=1e-7, atol=1e-9, equal_nan=True)


@every_backend
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("place", range(6))
def test_not_finite_is_skipped_and_counted(backend: str, bad: float, place: int) -> None:
    products, dots = system("convex", 0)
    loss = torch.tensor(bad if place == 5 else 1.0)
    if place < 5:
        products[place] = bad
    for fixed in ({}, dict(beta=0.1, rho=0.9)):
        check_solve(backend, scalars(0.3, float(dots[0])), loss, products, None, **fixed)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_loss_and_rate(backend: str, dtype: torch.dtype) -> None:
    products, dots = system("convex", 1)
    for lr in (0.5, torch.tensor(0.5, dtype=dtype), torch.tensor(NAN, dtype=dtype), NAN):
        check_solve(backend, scalars(0.3, float(dots[0])), torch.tensor(1.25, dtype=dtype), products, None, lr=lr)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("state", "new_losses"),
    [
        (scalars(1.0, 1.0, predicted_change=-1.0), (2.9, 2.0, 1.0, 3.5, NAN, INF, -INF)),
        (scalars(9.9, 1.0, predicted_change=-1.0), (3.5,)),
        (scalars(0.0105, 1.0, predicted_change=-1.0), (1.0,)),
        (scalars(1.0, 1.0, predicted_change=0.5), (3.5, 4.0)),
        (scalars(1.0, 1.0, predicted_change=0.0), (1.0,)),
        (scalars(1.0, 1.0, predicted_change=-1.0, beta=NAN), (1.0,)),
    ],
    ids=["usual", "maximum", "minimum", "climb", "no change", "skipped"],
)
def test_adapt_damping(backend: str, dtype: torch.dtype, state: Tensor, new_losses: tuple[float, ...]) -> None:
    rule = dict(low=0.4, high=1.6, factor=0.9, minimum=0.01, maximum=10.0)
    for value in new_losses:
        loss = torch.tensor(value, dtype=dtype)
        expected = ops.adapt_damping(state, loss, **rule, backend="torch")
        given = state.to(DEVICE)
        result = ops.adapt_damping(given, loss.to(DEVICE), **rule, backend=backend)
        torch.testing.assert_close(result.cpu(), expected, rtol=1e-14, atol=0, equal_nan=True)
        torch.testing.assert_close(given.cpu(), state, rtol=0, atol=0, equal_nan=True)


@every_backend
def test_keep_coefficients(backend: str) -> None:
    for *given, sign in coefficient_cases.cases(DTYPES):
        expected = ops.keep_coefficients(*given, sign=sign, backend="torch")
        scalars, loss, three, room = (None if t is None else t.to(DEVICE) for t in given)
        result = ops.keep_coefficients(scalars, loss, three, room, sign=sign, backend=backend)
        torch.testing.assert_close(result.cpu(), expected, rtol=1e-14, atol=0, equal_nan=True)
        torch.testing.assert_close(scalars.cpu(), given[0], rtol=0, atol=0, equal_nan=True)


def test_auto_takes_the_native_kernels() -> None:
    assert backends.choose("auto", DEVICE) == "cuda", backends.why_not("cuda", DEVICE)
    info = backends.build_info()
    assert info["backend"] == "cuda" and info["cuda library"] == "loaded"


@pytest.mark.parametrize(("backend", "device"), [("cpu", DEVICE), ("cuda", "cpu"), ("triton", "cpu")])
def test_a_named_backend_that_cannot_run_raises(backend: str, device: torch.device | str) -> None:
    tensors = [draw((3,), torch.float32).to(device)]
    with pytest.raises(RuntimeError, match=f'backend="{backend}" cannot run on'):
        ops.dots(tensors, tensors, backend=backend)
