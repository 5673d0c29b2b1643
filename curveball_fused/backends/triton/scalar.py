"""Functions of one number that the Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_finite(x):
    """Return whether x is neither infinite nor NaN."""
    return x - x == 0.0


@triton.jit
def as_double(x):
    """Return a float64 parameter as such: the interpreter passes it as a Python number."""
    return tl.full((), x, tl.float64)


@triton.jit
def divide_or_zero(numerator, denominator):
    """Return the quotient, and zero where the denominator is zero."""
    return tl.where(denominator == 0.0, 0.0, numerator / tl.where(denominator == 0.0, 1.0, denominator))
