"""Activations and their derivatives in Triton against float64: on a GPU, else by the interpreter."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from curveball_fused.backends.dtypes import compute_dtype
from curveball_fused.backends.triton import tangents as triton_tangents
from tests.helpers.triton_cases import (
    DEVICE,
    INF,
    INTERPRETED,
    NAN,
    RUNTIME_WARNINGS,
    channels_last,
    draw,
    every_dtype,
)

pytestmark = RUNTIME_WARNINGS


def exact(x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, y', the magnitude of what y' is the sum of, and of the exponent, in float64."""
    x = x.double()
    if name == "gelu":
        factor, slope = torch.special.erfc(-x / math.sqrt(2)) / 2, torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        exponent = torch.zeros_like(x)
    else:
        scale = 2 * math.sqrt(2 / math.pi)
        inner = x if name == "silu" else scale * (x + 0.044715 * x**3)
        factor, other = (i.clamp(max=0).exp() / (1 + i.abs().neg().exp()) for i in (inner, -inner))  # torch's underflow
        slope = factor * other * (1.0 if name == "silu" else scale * (1 + 3 * 0.044715 * x * x))
        exponent = torch.zeros_like(x) if name == "silu" else inner.abs()
    return x * factor, factor + x * slope, factor + (x * slope).abs(), exponent


NAMES = pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])


@NAMES
@every_dtype
def test_activation(name: str, dtype: torch.dtype) -> None:
    """float32 to 8 units in the last place of the value, far out too, beside what the exponent's own rounding makes."""
    x = torch.cat([torch.linspace(-20, 20, 2501), torch.logspace(-9, 0, 99), -torch.logspace(-9, 2, 99)])
    x = x.to(dtype).to(DEVICE)
    y, derivative, size, exponent = exact(x, name)
    got = triton_tangents.activation(x, name)
    epsilon = torch.finfo(compute_dtype(dtype)).eps
    relative = 8 * epsilon + 2 * epsilon * exponent
    if dtype == torch.float64 and name == "gelu":
        size_y, size_derivative = x.double().abs(), 1 + size  # 1 + erf, as torch has it
    else:
        size_y, size_derivative = y.abs(), size
    # One rounding to the dtype (the interpreter cuts bfloat16 off), and what is below its range: for the arithmetic's,
    # numbers that are multiplied by x or by the derivative of a cubic polynomial of x.
    ulps = 0.0 if dtype == compute_dtype(dtype) else 1.0 if INTERPRETED and dtype == torch.bfloat16 else 0.5
    of = torch.finfo(dtype)
    least = of.tiny * (of.eps if ulps < 1 else 1)
    least = least + torch.finfo(compute_dtype(dtype)).tiny * epsilon * (2 + x.double().abs()) ** 3
    assert got[0].dtype == got[1].dtype == dtype
    for mine, truth, magnitude in ((got[0], y, size_y), (got[1], derivative, size_derivative)):
        assert ((mine.double() - truth).abs() <= relative * magnitude + ulps * of.eps * truth.abs() + least).all()


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activation_of_what_is_not_finite(name: str, dtype: torch.dtype) -> None:
    """As in torch, whose float64 kernels keep to the formulas."""
    function = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}[name]
    x = torch.tensor([INF, -INF, NAN, 1e9, -1e9, 0.0, -0.0], dtype=torch.float64, requires_grad=True)
    y = function(x)
    (derivative,) = torch.autograd.grad(y.sum(), x)
    got = triton_tangents.activation(x.detach().to(dtype).to(DEVICE), name)
    for mine, truth in zip(got, (y, derivative)):
        torch.testing.assert_close(mine.cpu().double(), truth.detach(), rtol=0, atol=0, equal_nan=True)


@NAMES
def test_activation_of_any_dense_shape(name: str) -> None:
    x = channels_last(draw(2, 3, 5, 9, dtype=torch.float32))
    y, derivative = triton_tangents.activation(x, name)
    assert y.stride() == derivative.stride() == x.stride()
    torch.testing.assert_close(y.double(), exact(x, name)[0], rtol=1e-5, atol=1e-6)
    for shape in ((), (0, 3), (1025,)):
        x = draw(*shape, dtype=torch.float32, offset=1)
        torch.testing.assert_close(
            triton_tangents.activation(x, name)[1].double(), exact(x, name)[1], rtol=1e-5, atol=1e-6
        )
