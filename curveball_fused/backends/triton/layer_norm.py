"""The tangent of layer norm, and of RMS norm, in Triton: see `triton_norms`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .norms import TILE, WARPS, load, normalized, units_of
from .reduce import TYPES, arithmetic

LONGEST = 8192  # elements of a row that is kept in registers


@triton.jit
def _row_means(products, tangents, length, CENTERED: tl.constexpr):
    """<x̂ dx>, and <dx>, which counts for nothing unless the rows are centered."""
    product_mean = (tl.sum(products, 1) / length)[:, None]
    t_mean = tl.zeros_like(product_mean)
    if CENTERED:
        t_mean = (tl.sum(tangents, 1) / length)[:, None]
    return product_mean, t_mean


@triton.jit
def _row_tangent(x_hat, t, product_mean, t_mean, rstd, weight, dweight, dbias, column, known, A: tl.constexpr):
    """dy of a part of rows; weight, dweight and dbias may be None."""
    dy = (t - t_mean - x_hat * product_mean) * rstd
    if weight is not None:
        dy *= load(weight, column, known, A)
    if dweight is not None:
        dy += load(dweight, column, known, A) * x_hat
    if dbias is not None:
        dy += load(dbias, column, known, A)
    return dy


@triton.jit(do_not_specialize=["n", "units"])
def layer_norm_kernel(
    dx,
    x,
    mean,
    rstd,
    weight,
    dweight,
    dbias,
    dy,
    n,
    units,
    UNIT: tl.constexpr,
    A: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A program takes ROWS rows of at most BLOCK elements (WHOLE), or one of any length, which it reads twice."""
    length = units * UNIT
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    r = load(rstd, row, row < n, A)
    m = tl.zeros_like(r)
    if mean is not None:
        m = load(mean, row, row < n, A)
    lane = tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        offsets, inside = row * length + lane, (row < n) & (lane < length)
        x_hat, t = normalized(x, dx, offsets, inside, m, r, A)
        product_mean, t_mean = _row_means(x_hat * t, t, length, mean is not None)
        value = _row_tangent(x_hat, t, product_mean, t_mean, r, weight, dweight, dbias, lane, lane < length, A)
        tl.store(dy + offsets, value.to(dy.dtype.element_ty), inside)
    else:
        products, tangents = tl.zeros((ROWS, BLOCK), A), tl.zeros((ROWS, BLOCK), A)
        for begin in range(0, length, BLOCK):
            column = begin + lane
            x_hat, t = normalized(x, dx, row * length + column, column < length, m, r, A)
            products, tangents = products + x_hat * t, tangents + t
        product_mean, t_mean = _row_means(products, tangents, length, mean is not None)
        for begin in range(0, length, BLOCK):
            column = begin + lane
            offsets, inside = row * length + column, column < length
            x_hat, t = normalized(x, dx, offsets, inside, m, r, A)
            value = _row_tangent(x_hat, t, product_mean, t_mean, r, weight, dweight, dbias, column, inside, A)
            tl.store(dy + offsets, value.to(dy.dtype.element_ty), inside)


@torch.no_grad()
def layer_norm_tangent(
    dx: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> Tensor:
    """dy [N, D] for x and dx [N, D], contiguous and of one dtype, along which goes each row's mean.

    mean and rstd [N], in the arithmetic's dtype; mean None for RMS norm: x̂ = x rstd, without the term <dx>. weight,
    dweight and dbias [D], each None or of x's dtype, contiguous.
    """
    dy = torch.empty_like(x)
    if x.numel() > 0:
        with torch.cuda.device_of(x):
            shape = rows_of(x.shape[1])
            layer_norm_kernel[(triton.cdiv(len(x), shape["ROWS"]),)](
                dx,
                x,
                mean,
                rstd,
                weight,
                dweight,
                dbias,
                dy,
                len(x),
                **units_of(x.shape[1], x),
                A=TYPES[arithmetic(x)],
                **shape,
                enable_fp_fusion=True,
            )
    return dy


def rows_of(length: int) -> dict[str, int]:
    """Rows of a tile, elements of each, whether that is all of them, and warps."""
    block = triton.next_power_of_2(length)
    if block > LONGEST:
        return dict(ROWS=1, BLOCK=TILE, WHOLE=False, num_warps=8)
    return dict(ROWS=max(TILE // block, 1), BLOCK=block, WHOLE=True, num_warps=max(block // 512, WARPS))
