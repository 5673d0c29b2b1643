"""For the tests of the Triton kernels: the device, numbers of any dtype, comparison with float64."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from curveball_fused.backends.dtypes import compute_dtype
from curveball_fused.backends.scalars import SCALARS
from tests.helpers.tiers import slow

pytest.importorskip("triton", reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

NAN, INF = math.nan, math.inf
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
RUNTIME_WARNINGS = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on NaN, in the interpreter
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# The strictest comparison and the coarsest numbers first: the interpreter takes seconds for a case.
two_dtypes_first = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, slow(torch.float32), slow(torch.float16)], ids=str
)


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0, offset: int = 0) -> Tensor:
    """Random numbers, `offset` elements after an aligned address."""
    numbers = scale * torch.randn(math.prod(shape) + offset, dtype=torch.float64)
    return numbers.to(dtype).to(DEVICE)[offset:].view(shape)


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def scalars(**values: float) -> Tensor:
    standard = dict(
        beta=0.3, rho=0.8, lambd=0.25, z_dot_z=2.0, linear_term=1.5, quadratic_term=0.7, predicted_change=-0.4
    )
    standard |= dict(ratio=0.7, loss=3.0, skipped_steps=4.0, safe_steps=2.0, direction_damping=0.2)
    standard |= dict(average_beta=0.1, average_rho=0.6, solves=3.0, gathered=5.0)
    return torch.tensor([(standard | values)[name] for name in SCALARS], dtype=torch.float64, device=DEVICE)


def named(values: Tensor) -> dict[str, float]:
    return dict(zip(SCALARS, values.tolist(), strict=True))


def tangent(
    function: Callable[..., Tensor], primals: list[Tensor], tangents: list[Tensor], dtype: torch.dtype
) -> Tensor:
    """Of `function`, in `dtype`."""
    return jvp(function, tuple(t.to(dtype) for t in primals), tuple(t.to(dtype) for t in tangents))[1]


def check_tangent(got: Tensor, function: Callable[..., Tensor], primals: list[Tensor], tangents: list[Tensor]) -> None:
    """Holds `got` against float64; for low precision, to twice the error of torch's own tangent in that precision."""
    truth = tangent(function, primals, tangents, torch.float64)
    assert got.shape == truth.shape and got.isfinite().all()
    error, size = (got.double() - truth).abs().max(), truth.abs().max()
    if got.dtype in TOLERANCE:
        assert error <= TOLERANCE[got.dtype] * size
    else:
        composed = tangent(function, primals, tangents, got.dtype)
        # The interpreter cuts bfloat16 off instead of rounding to nearest.
        cut = torch.finfo(got.dtype).eps * size if INTERPRETED and got.dtype == torch.bfloat16 else 0.0
        assert error <= 2 * (composed.double() - truth).abs().max() + cut


def check_loss(
    dtype: torch.dtype,
    sign: float,
    loss: Tensor,
    quadratic: Any,
    v: Tensor,
    u: Tensor,
    got: tuple[Tensor, ...],
    parts: Tensor,
    largest: float = 0.0,
) -> None:
    """Holds (loss, c, all five products) against float64.

    The bounds count the magnitudes that are added up: `parts` is that of the gradient. `largest` is the magnitude of
    logits, since exp(x - max) magnifies the rounding of its argument by it.
    """
    g, center, product = quadratic
    v, u = v.double(), u.double()
    cv, cu = center(v), center(u)
    hv, hu = product(cv), product(cu)
    terms = torch.stack([(a * b).sum() for a, b in ((g, cv), (cv, hv), (g, cu), (cv, hu), (cu, hu))])
    # The mean that is taken off v is rounded as v is.
    sizes = ((parts, v), (hv, v), (parts, u), (hu, v), (hu, u))
    size = torch.stack([(a.abs() * (b.abs() + b.abs().max())).sum() for a, b in sizes])
    epsilon = (16 + largest) * torch.finfo(compute_dtype(dtype)).eps
    got_loss, c, products = got
    assert got_loss.dtype == products.dtype == torch.float64 and got_loss.shape == () and c.dtype == dtype
    torch.testing.assert_close(got_loss, loss, rtol=epsilon, atol=epsilon)
    assert ((products - sign * terms).abs() <= epsilon * size).all()
    exact = sign * (g + hv)
    # The interpreter cuts bfloat16 off instead of rounding to nearest.
    ulps = 0.0 if dtype == compute_dtype(dtype) else 1.0 if INTERPRETED and dtype == torch.bfloat16 else 0.5
    magnitude = parts + product(torch.ones_like(v)).abs() * (1 + v.abs() + v.abs().max())
    rounding = ulps * torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
    assert ((c.double() - exact).abs() <= epsilon * magnitude + rounding).all()
