"""Sums in a fixed order, and the last program of each loss operator: what the Triton kernels share.

A program writes its partial sums, float64, to a place of its own; one last program adds them up. So the bits depend on
neither timing nor device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scalar import as_double

SUM_BLOCK = 2048  # partial sums at a time in the program that adds them up
SUM_WARPS = 8
TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def zeros(N: tl.constexpr):
    """Return N zeros, float64."""
    return tl.zeros((N,), tl.float64)


@triton.jit
def sum_partials(partials, begin, end, BLOCK: tl.constexpr):
    """Return the sum of partials[begin:end], in an order that depends on nothing but the number of terms."""
    lanes = zeros(BLOCK)
    for start in range(begin, end, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        lanes += tl.load(partials + offsets, offsets < end, other=0.0)
    return tl.sum(lanes)


@triton.jit
def reduce_vectors(x, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Return the sums, float64, of what one thread loads at once, all neighbors: fewer sums to carry than elements."""
    return tl.sum(tl.reshape(x.to(tl.float64), (BLOCK // VECTOR, VECTOR)), 1)


@triton.jit(do_not_specialize=["count"])
def sum_rows_kernel(partials, count, result, BLOCK: tl.constexpr):
    """Write result [n], the sums of the rows of partials [n, count], float64, by a program each."""
    row = tl.program_id(0).to(tl.int64)
    tl.store(result + row, sum_partials(partials, row * count, (row + 1) * count, BLOCK))


@triton.jit(do_not_specialize=["count"])
def finish_kernel(
    partials,  # [3, count], float64, as all here
    count,
    divisor,  # [1]
    sign: tl.float64,
    loss,  # [1]; None in the second call
    products,  # [2], of the first call; None in the first
    result,  # [2], or [5] in the second call
    BLOCK: tl.constexpr,
):
    """Write the loss and the first two products or, where these are given, all five products."""
    scale = tl.load(divisor)
    first = sum_partials(partials, 0, count, BLOCK) / scale
    second = as_double(sign) * sum_partials(partials, count, 2 * count, BLOCK) / scale
    third = as_double(sign) * sum_partials(partials, 2 * count, 3 * count, BLOCK) / scale
    if products is None:
        tl.store(loss, first)
        tl.store(result, second)
        tl.store(result + 1, third)
    else:
        tl.store(result, tl.load(products))
        tl.store(result + 1, tl.load(products + 1))
        tl.store(result + 2, as_double(sign) * first)
        tl.store(result + 3, second)
        tl.store(result + 4, third)


def finish_cotangent(partials: Tensor, divisor: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """Return the loss, 0-dim, and products [2], both float64, from `partials` [3, any number]."""
    loss, products = partials.new_empty(()), partials.new_empty(2)
    _finish(partials, divisor, sign, loss, None, products)
    return loss, products


def finish_products(partials: Tensor, divisor: Tensor, sign: float, products: Tensor) -> Tensor:
    """Return all five products, float64, from the first two and `partials` [3, any number]."""
    result = partials.new_empty(5)
    _finish(partials, divisor, sign, None, products, result)
    return result


def _finish(partials: Tensor, divisor: Tensor, sign: float, *rest: Tensor | None) -> None:
    finish_kernel[(1,)](
        partials,
        partials.shape[1],
        divisor,
        sign,
        *rest,
        BLOCK=SUM_BLOCK,
        num_warps=SUM_WARPS,
        enable_fp_fusion=False,
    )
