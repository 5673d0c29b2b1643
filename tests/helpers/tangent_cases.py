"""Arguments for the tangent operators, and what is right: torch's own forward-mode derivatives in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from curveball_fused import backends
from curveball_fused.backends.dtypes import at_least_float32, compute_dtype
from curveball_fused.ops import tangents as tangent_ops

native = pytest.mark.skipif(not backends.has_operators(), reason="needs the native library")
BACKENDS = ["auto", "torch"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2}


def doubles(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.double() for t in tensors]


def jvp(function: Callable[..., Tensor], primals: list[Tensor], tangents: list[Tensor]) -> Tensor:
    return torch.func.jvp(function, tuple(primals), tuple(tangents))[1]  # type: ignore[no-any-return]


def assert_near(result: Tensor, truth: Tensor) -> None:
    """To rounding, of the largest number around: the tangents are sums of terms that may cancel."""
    assert result.shape == truth.shape
    scale = max(1.0, truth.abs().max().item()) if truth.numel() else 1.0
    torch.testing.assert_close(result.double(), truth, rtol=0, atol=TOLERANCE[result.dtype] * scale)


def layer_norm_case(rows: int, size: int, dtype: torch.dtype, offset: float = 0.0) -> tuple[list[Tensor], list[Tensor]]:
    dx, x = torch.randn(2, rows, size, dtype=torch.float64).to(dtype)
    x = x + offset
    vectors = list(torch.randn(3, size, dtype=torch.float64).to(dtype))
    wide = at_least_float32(x)
    mean = wide.mean(1)
    rstd = (wide.double().var(1, unbiased=False) + 1e-5).rsqrt().to(wide.dtype)
    return [dx, x, mean, rstd], vectors


def batch_norm_case(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> tuple[list[Tensor], list[Tensor]]:
    dx, x = (t.to(dtype) for t in torch.randn(2, *shape, dtype=torch.float64))
    if channels_last:
        dx, x = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (dx, x))
    dims = [d for d in range(len(shape)) if d != 1]
    wide = x.double()
    mean, rstd = wide.mean(dims), (wide.var(dims, unbiased=False) + 1e-5).rsqrt()
    vectors = list(torch.randn(3, shape[1], dtype=torch.float64).to(dtype))
    return [dx, x, *(t.to(compute_dtype(dtype)) for t in (mean, rstd))], vectors


def attention_case(b: int, h: int, t: int, s: int, d: int, e: int, dtype: torch.dtype) -> list[Tensor]:
    """dq, dk, dv, q, k, v as a model makes them: heads are columns of a wider tensor."""

    def heads(rows: int, width: int) -> Tensor:
        return torch.randn(b, rows, h, width, dtype=torch.float64).to(dtype).transpose(1, 2)

    return [heads(t, d), heads(s, d), heads(s, e), heads(t, d), heads(s, d), heads(s, e)]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale)


def everything() -> list[Tensor]:
    """Results of all operators, large enough for several threads."""
    results: list[Tensor] = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(3)
        statistics, vectors = layer_norm_case(700, 131, dtype)
        results.append(tangent_ops.layer_norm_tangent(*statistics, *vectors))
        for last in (False, True):
            statistics, vectors = batch_norm_case((8, 19, 33, 31), dtype, last)
            results.append(tangent_ops.batch_norm_tangent(*statistics, *vectors, training=True))
        x = torch.randn(100_003, dtype=torch.float64).to(dtype)
        for name in tangent_ops.ACTIVATIONS:
            results += tangent_ops.activation(x, name)
        case = attention_case(2, 3, 200, 150, 20, 24, dtype)
        out = attention(*case[3:], None, True, 0.3)
        results.append(tangent_ops.attention_tangent(*case, out, is_causal=True, scale=0.3))
    return results
