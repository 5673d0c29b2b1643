"""The tangent of layer norm, and of RMS norm, in Triton; `norms` has the formula."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curveball_fused.backends.dtypes import compute_dtype

from .norms import BLOCK_TILE, WARPS, load, normalized, units_of
from .reduce import TYPES

LONGEST = 8192  # elements of a row that is kept in registers


@triton.jit
def _row_means(products, tangents, length, CENTERED: tl.constexpr):
    """Return <x̂ dx> and <dx>, the latter zero unless the rows are centered."""
    product_mean = (tl.sum(products, 1) / length)[:, None]
    t_mean = tl.zeros_like(product_mean)
    if CENTERED:
        t_mean = (tl.sum(tangents, 1) / length)[:, None]
    return product_mean, t_mean


@triton.jit
def _row_tangent(x_hat, t, product_mean, t_mean, rstd, weight, dweight, dbias, column, known, ACC: tl.constexpr):
    """Return dy of a part of rows; weight, dweight and dbias may be None."""
    dy = (t - t_mean - x_hat * product_mean) * rstd
    if weight is not None:
        dy *= load(weight, column, known, ACC)
    if dweight is not None:
        dy += load(dweight, column, known, ACC) * x_hat
    if dbias is not None:
        dy += load(dbias, column, known, ACC)
    return dy


@triton.jit(do_not_specialize=["n", "units"])
def layer_norm_kernel(
    dx,  # [n, D]
    x,  # [n, D]
    mean,  # [n], of dtype ACC; None for RMS norm
    rstd,  # [n], of dtype ACC
    weight,  # [D] or None, as the next two
    dweight,
    dbias,
    dy,  # [n, D], written
    n,
    units,  # D / UNIT
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Write dy of ROWS rows of at most BLOCK elements (WHOLE), or of one row of any length, which is read twice."""
    length = units * UNIT
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    r = load(rstd, row, row < n, ACC)
    m = tl.zeros_like(r)
    if mean is not None:
        m = load(mean, row, row < n, ACC)
    lane = tl.arange(0, BLOCK)[None, :]
    if WHOLE:
        offsets, inside = row * length + lane, (row < n) & (lane < length)
        x_hat, t = normalized(x, dx, offsets, inside, m, r, ACC)
        product_mean, t_mean = _row_means(x_hat * t, t, length, mean is not None)
        value = _row_tangent(x_hat, t, product_mean, t_mean, r, weight, dweight, dbias, lane, lane < length, ACC)
        tl.store(dy + offsets, value.to(dy.dtype.element_ty), inside)
    else:
        products, tangents = tl.zeros((ROWS, BLOCK), ACC), tl.zeros((ROWS, BLOCK), ACC)
        for begin in range(0, length, BLOCK):
            column = begin + lane
            x_hat, t = normalized(x, dx, row * length + column, column < length, m, r, ACC)
            products, tangents = products + x_hat * t, tangents + t
        product_mean, t_mean = _row_means(products, tangents, length, mean is not None)
        for begin in range(0, length, BLOCK):
            column = begin + lane
            offsets, inside = row * length + column, column < length
            x_hat, t = normalized(x, dx, offsets, inside, m, r, ACC)
            value = _row_tangent(x_hat, t, product_mean, t_mean, r, weight, dweight, dbias, column, inside, ACC)
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
    """Return dy, `[N, D]`, as `reference.tangents.layer_norm_tangent` does, in one launch.

    Args:
        dx: tangent of x, `[N, D]`, contiguous and of x's dtype.
        x: input, `[N, D]`, contiguous.
        mean: mean of each row, `[N]`, in the arithmetic's dtype; None for RMS norm: x̂ = x rstd, without the term <dx>.
        rstd: reciprocal standard deviation of each row, likewise.
        weight: `[D]`, contiguous, of x's dtype, or None for ones.
        dweight: its tangent, likewise, or None for zeros.
        dbias: tangent of the bias, likewise, or None for zeros.

    Returns:
        The tangent of the result, like x.
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
                ACC=TYPES[compute_dtype(x.dtype)],
                **shape,
                enable_fp_fusion=True,
            )
    return dy


def rows_of(length: int) -> dict[str, int]:
    """Return the rows of a tile, the elements of each, whether these are all, and the warps."""
    block = triton.next_power_of_2(length)
    if block > LONGEST:
        return dict(ROWS=1, BLOCK=BLOCK_TILE, WHOLE=False, num_warps=8)
    return dict(ROWS=max(BLOCK_TILE // block, 1), BLOCK=block, WHOLE=True, num_warps=max(block // 512, WARPS))
