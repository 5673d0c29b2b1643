"""Activations in Triton: value and derivative in one pass.

With σ the logistic function, Φ and φ the normal distribution and its density:

    gelu        y = x Φ(x),     y' = Φ(x) + x φ(x)
    gelu_tanh   y = x σ(2u),    y' = σ(2u) + 2 x u' σ(2u) σ(-2u),    u = √(2/π) (x + 0.044715 x³)
    silu        y = x σ(x),     y' = σ(x) + x σ(x) σ(-x)

All three need a single exponential, of a number that is not positive. Arithmetic is in float32, or in float64 for
float64. In float32 Φ(x) and σ(x) are accurate to a few units in the last index even where they are tiny, which torch's
1 + erf and 1 + tanh are not; σ(2u) as far as 2u is known, of which rounding leaves |2u| such units.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curveball_fused.backends.dtypes import compute_dtype

from .reduce import TYPES

BLOCK = 1024
WARPS = 4


@triton.jit
def _power_of_two(k):
    """Return 2ᵏ for whole numbers -126 ≤ k ≤ 127."""
    return ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _exponential(a, b, ACC: tl.constexpr):
    """Return exp(a + b) for a ≤ 0, where b is a small correction."""
    # In float32 not by tl.exp, whose relative error grows with |a|: it rounds a log₂ e. Here a = k ln 2 + f, with ln 2
    # in two parts of which the first times k is exact, and a polynomial for exp(f).
    if tl.float64 == ACC:
        result = tl.exp(a + b)
    else:
        a = tl.maximum(a, -104.0)  # where the result is 0
        k = tl.floor((a + b) * 1.44269504 + 0.5)
        f = (a - k * 0.693359375) + (k * 2.12194440e-4 + b)
        p = 1.3981999507e-3 + f * 1.9875691500e-4
        p = 5.0000001201e-1 + f * (1.6666665459e-1 + f * (4.1665795894e-2 + f * (8.3334519073e-3 + f * p)))
        half = tl.floor(0.5 * k)  # in two factors, as results below 2⁻¹²⁶ have no factor of their own
        result = (1.0 + (f + f * f * p)) * _power_of_two(half) * _power_of_two(k - half)
    return result


@triton.jit
def _logistic(x, ACC: tl.constexpr):
    """Return σ(x) and σ(-x)."""
    small = _exponential(-tl.abs(x), 0.0, ACC)
    larger = 1.0 / (1.0 + small)
    return tl.where(x < 0.0, small * larger, larger), tl.where(x < 0.0, larger, small * larger)


@triton.jit
def _normal(x, ACC: tl.constexpr):
    """Return Φ(x) and φ(x)."""
    t = tl.abs(x)
    if tl.float64 == ACC:
        bell = tl.exp(-0.5 * t * t)
        above = 0.5 + 0.5 * tl.erf(x * 0.70710678118654752)
    else:
        t = tl.minimum(t, 15.0)  # where both Φ(-t) and φ(t) are 0
        # t² = high² + (t - high)(t + high), the first exact.
        high = (t.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
        bell = _exponential(-0.5 * high * high, -0.5 * (t - high) * (t + high), ACC)
        # (1 + t) Φ(-t) / exp(-t²/2), fitted to 4e-9 for t from 0 to 15 (Shepherd and Laframboise 1981 have the form).
        q = (t - 2.5) / (t + 2.5)
        p = -4.969970177626237e-07 + q * (-0.00022558943601325154 + q * -6.201226642588153e-05)
        p = -0.0060469307936728 + q * (0.0012844178127124906 + q * (0.0012622170615941286 + q * p))
        p = -0.03771665319800377 + q * (0.04606280475854874 + q * (-0.008699891157448292 + q * p))
        below = bell * (0.4946596622467041 + q * (-0.09158747643232346 + q * p)) / (1.0 + t)
        above = tl.where(x < 0.0, below, 1.0 - below)
    return above, 0.3989422804014327 * bell


@triton.jit
def _store(x, y, derivative, offsets, mask, NAME: tl.constexpr, ACC: tl.constexpr):
    v = tl.load(x + offsets, mask).to(ACC)
    if NAME == "gelu":
        factor, slope = _normal(v, ACC)
    elif NAME == "silu":
        factor, other = _logistic(v, ACC)
        slope = factor * other
    else:
        w = tl.minimum(tl.maximum(v, -30.0), 30.0)  # beyond, σ is 0 or 1, but w³ might overflow
        factor, other = _logistic(1.5957691216057308 * w * (1.0 + 0.044715 * w * w), ACC)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * w * w) * (factor * other)
    tl.store(y + offsets, (v * factor).to(y.dtype.element_ty), mask)
    tl.store(derivative + offsets, (factor + v * slope).to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["n"])
def activation_kernel(
    x,  # [n]
    y,  # [n], written
    derivative,  # [n], written
    n,
    NAME: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write value and derivative of BLOCK elements."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = begin + tl.arange(0, BLOCK)
    if begin + BLOCK <= n:  # without a mask, which makes every access 128 bits wide
        _store(x, y, derivative, offsets, None, NAME, ACC)
    else:
        _store(x, y, derivative, offsets, offsets < n, NAME, ACC)


@torch.no_grad()
def activation(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return f(x) and f'(x), both like x, for f = "gelu", "gelu_tanh" (its approximation) or "silu"; x is dense."""
    y, derivative = torch.empty_like(x), torch.empty_like(x)
    if x.numel() > 0:
        with torch.cuda.device_of(x):
            activation_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                x,
                y,
                derivative,
                x.numel(),
                NAME=name,
                ACC=TYPES[compute_dtype(x.dtype)],
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
    return y, derivative
