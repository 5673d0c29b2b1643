"""Loads and formulas that the tangents of layer norm, RMS norm and batch norm in Triton share.

With x̂ = (x - mean) rstd, and <.> the mean over what is normalized together:

    dy = weight rstd (dx - <dx> - x̂ <x̂ dx>) + dweight x̂ + dbias

Arithmetic is in float32, or in float64 for float64. Sums have an order that follows from the shape alone; those over a
channel, which may be long, are in float64.

The last dimension in memory is `units` times UNIT long, by which the compiler knows how far every access is aligned.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

BLOCK_TILE = 2048  # elements at a time of rows that are shorter or longer, and of channels
WARPS = 4  # for one, at least


@triton.jit
def load(tensor, offsets, mask, ACC: tl.constexpr):
    """Load elements in the dtype of the arithmetic, and zero where the mask is not set."""
    return tl.load(tensor + offsets, mask, other=0.0).to(ACC)


@triton.jit
def normalized(x, dx, offsets, inside, mean, rstd, ACC: tl.constexpr):
    """Return x̂, and dx, which is zero outside."""
    return (load(x, offsets, inside, ACC) - mean) * rstd, load(dx, offsets, inside, ACC)


def units_of(length: int, x: Tensor) -> dict[str, int]:
    """Return the elements of the widest aligned access (UNIT), and how many of these make the length."""
    unit = math.gcd(length, 16 // x.element_size())
    return dict(units=length // unit, UNIT=unit)
