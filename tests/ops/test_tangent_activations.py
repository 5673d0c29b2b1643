"""Activations with their derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from curveball_fused.ops import tangents as tangent_ops
from tests.helpers.tangent_cases import BACKENDS, DTYPES, assert_near, jvp, native

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def precise(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """In float64, and without the cancellation in 1 + erf(x) and 1 + tanh(x)."""
    if name == "gelu":
        below = 0.5 * torch.special.erfc(-x / math.sqrt(2))
        return x * below, below + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    a, slope = x, torch.ones_like(x)
    if name == "gelu_tanh":
        a = 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    return x * torch.sigmoid(a), torch.sigmoid(a) + x * torch.sigmoid(a) * torch.sigmoid(-a) * slope


@pytest.mark.parametrize("name", tangent_ops.ACTIVATIONS)
def test_the_precise_functions_are_torchs(name: str) -> None:
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    y, derivative = precise(x, name)
    torch.testing.assert_close(y, FUNCTIONS[name](x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(derivative, jvp(FUNCTIONS[name], [x], [torch.ones_like(x)]), rtol=1e-12, atol=1e-12)


@native
@pytest.mark.parametrize("name", tangent_ops.ACTIVATIONS)
def test_activation_is_right_to_a_few_units_in_the_last_place(name: str) -> None:
    x = torch.cat([torch.linspace(-9, 9, 40001), torch.logspace(-30, 4, 4001), -torch.logspace(-30, 0.9, 4001)])
    y, derivative = tangent_ops.activation(x, name)
    true_y, true_derivative = precise(x.double(), name)
    torch.testing.assert_close(y.double(), true_y, rtol=6e-7, atol=1e-44)
    # The derivative has a root, where no number of units in the last place can be kept.
    torch.testing.assert_close(derivative.double(), true_derivative, rtol=6e-7, atol=3e-7)
    far = x < -3
    torch.testing.assert_close(derivative.double()[far], true_derivative[far], rtol=2e-6, atol=1e-44)
    y, derivative = tangent_ops.activation(x.double(), name)
    torch.testing.assert_close(y, true_y, rtol=1e-13, atol=1e-300)
    torch.testing.assert_close(derivative, true_derivative, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", tangent_ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (37,), (3, 5, 7)])
def test_activation(shape: tuple[int, ...], dtype: torch.dtype, name: str, backend: str) -> None:
    x = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    y, derivative = tangent_ops.activation(x, name, backend=backend)
    true_y, true_derivative = precise(x.double(), name)
    assert_near(y, true_y)
    assert_near(derivative, true_derivative)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", tangent_ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activation_where_numbers_end(dtype: torch.dtype, name: str, backend: str) -> None:
    ends = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0, -0.0], dtype=dtype)
    y, derivative = tangent_ops.activation(ends.repeat(5), name, backend=backend)
    nan, inf = math.nan, math.inf
    # At -inf torch, too, says 0 x inf; and so it does in the derivative on both sides.
    expected = torch.tensor([nan, inf, nan, 1e30, 0.0, 0.0, 0.0], dtype=dtype)
    torch.testing.assert_close(y, expected.repeat(5), equal_nan=True, rtol=0, atol=0)
    if backend == "auto":
        expected = torch.tensor([nan, nan, nan, 1, 0, 0.5, 0.5], dtype=dtype)
        torch.testing.assert_close(derivative, expected.repeat(5), equal_nan=True, rtol=0, atol=2e-7)


def test_activation_keeps_the_layout() -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    y, derivative = tangent_ops.activation(x, "gelu")
    assert y.stride() == derivative.stride() == x.stride()
    torch.testing.assert_close(y, F.gelu(x))
