"""The tangent of batch norm in Triton; `norms` has the formula."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from curveball_fused.backends.dtypes import compute_dtype

from .norms import BLOCK_TILE, WARPS, load, normalized, units_of
from .reduce import SUM_BLOCK, SUM_WARPS, TYPES, sum_rows_kernel

COLUMNS = 64  # channels side by side, where the channel is the last dimension
PROGRAMS = 1024  # over channels, unless that leaves them fewer tiles than
STEPS = 8
TERMS = tl.constexpr(16)  # added up in the arithmetic's dtype before they join a sum in float64


@triton.jit
def _tile(tile, group, rows, planes, length, ROWS: tl.constexpr, COLS: tl.constexpr, LAST: tl.constexpr):
    """Return a tile's offsets in memory [rows, planes, length], and which of them exist.

    A group of channels is a plane of each row; or, if the channel is the LAST dimension, COLS neighbors in each row.

    Returns:
        Offsets and mask, [ROWS, COLS] both.
    """
    if LAST:
        first_row, plane, first = tile * ROWS, 0, group * COLS
    else:
        across = tl.cdiv(length, COLS)
        first_row, plane, first = tile // across * ROWS, group, tile % across * COLS
    row, column = first_row + tl.arange(0, ROWS)[:, None], first + tl.arange(0, COLS)[None, :]
    return (row * planes + plane) * length + column, (row < rows) & (column < length)


@triton.jit
def _over_channel(lanes, LAST: tl.constexpr):
    """Sum [rows, columns] to [1, channels of a group], in float64."""
    sums = tl.sum(lanes.to(tl.float64), 0)[None, :]
    return sums if LAST else tl.sum(sums, 1)[:, None]


@triton.jit(do_not_specialize=["rows", "planes", "units", "tiles", "parts", "count"])
def batch_norm_kernel(
    dx,  # [rows, planes, units * UNIT], as x and dy
    x,
    mean,  # [channels], of dtype ACC
    rstd,  # [channels], of dtype ACC
    weight,  # [channels] or None, as the next two
    dweight,
    dbias,
    partials,  # [2, channels, parts], float64, or None
    sums,  # [2, channels], float64, or None
    dy,
    rows,
    planes,
    units,
    tiles,
    parts,
    count,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LAST: tl.constexpr,
    TRAINING: tl.constexpr,
):
    """Write sums or the tangent of every parts-th tile of a group of channels, by program (part, group).

    Without dy: partials, the sums of dx and x̂ dx. With dy: the tangent by `sums`, those of all parts, or, where one
    program has the whole group, by its own.
    """
    length, groups = units * UNIT, tl.num_programs(0) // parts
    group, part = (tl.program_id(0) % groups).to(tl.int64), (tl.program_id(0) // groups).to(tl.int64)
    if LAST:
        channels, channel = length, (group * COLS + tl.arange(0, COLS))[None, :]
    else:
        channels, channel = planes, (group + tl.arange(0, 1))[None, :]
    known = channel < channels
    m, r = load(mean, channel, known, ACC), load(rstd, channel, known, ACC)

    t_sum, product_sum = tl.zeros(channel.shape, tl.float64), tl.zeros(channel.shape, tl.float64)
    if sums is not None:
        t_sum += tl.load(sums + channel, known, other=0.0)
        product_sum += tl.load(sums + channels + channel, known, other=0.0)
    elif TRAINING:
        for start in range(part, tiles, parts * TERMS):
            tangents, products = tl.zeros((ROWS, COLS), ACC), tl.zeros((ROWS, COLS), ACC)
            for tile in range(start, tl.minimum(start + parts * TERMS, tiles), parts):
                offsets, inside = _tile(tile, group, rows, planes, length, ROWS, COLS, LAST)
                x_hat, t = normalized(x, dx, offsets, inside, m, r, ACC)
                tangents, products = tangents + t, products + x_hat * t
            t_sum += _over_channel(tangents, LAST)
            product_sum += _over_channel(products, LAST)

    if dy is None:
        tl.store(partials + channel * parts + part, t_sum, known)
        tl.store(partials + (channels + channel) * parts + part, product_sum, known)
    else:
        # dy = gain dx + slope x̂ + shift
        gain = r
        if weight is not None:
            gain *= load(weight, channel, known, ACC)
        slope, shift = -gain * (product_sum / count).to(ACC), -gain * (t_sum / count).to(ACC)
        if dweight is not None:
            slope += load(dweight, channel, known, ACC)
        if dbias is not None:
            shift += load(dbias, channel, known, ACC)
        for tile in range(part, tiles, parts):
            offsets, inside = _tile(tile, group, rows, planes, length, ROWS, COLS, LAST)
            x_hat, t = normalized(x, dx, offsets, inside, m, r, ACC)
            tl.store(dy + offsets, (gain * t + slope * x_hat + shift).to(dy.dtype.element_ty), inside)


@torch.no_grad()
def batch_norm_tangent(
    dx: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    training: bool,
) -> Tensor:
    """Return dy, like x, as `reference.tangents.batch_norm_tangent` does, in one launch or three.

    Args:
        dx: tangent of x, of its dtype and strides.
        x: input, `[N, C, ...]`, contiguous or channels-last.
        mean: mean of each channel, `[C]`, in the arithmetic's dtype.
        rstd: reciprocal standard deviation of each channel, likewise.
        weight: `[C]`, contiguous, of x's dtype, or None for ones.
        dweight: its tangent, likewise, or None for zeros.
        dbias: tangent of the bias, likewise, or None for zeros.
        training: whether mean and rstd are those of the batch; else they are constants, and
            dy = weight rstd dx + dweight x̂ + dbias.

    Returns:
        The tangent of the result, like x.
    """
    dy = torch.empty_like(x)
    if x.numel() == 0:
        return dy
    rows, channels, space = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    last = space == 1 or not x.is_contiguous()
    rows, planes, length = (rows * space, 1, channels) if last else (rows, channels, space)
    columns = min(triton.next_power_of_2(length), COLUMNS if last else BLOCK_TILE)
    across, groups = (1, triton.cdiv(length, columns)) if last else (triton.cdiv(length, columns), channels)
    tiles = triton.cdiv(rows, BLOCK_TILE // columns) * across
    parts = min(triton.cdiv(tiles, STEPS), triton.cdiv(PROGRAMS, groups))
    parameters = (weight, dweight, dbias)

    def launch(partials: Tensor | None, sums: Tensor | None, result: Tensor | None) -> None:
        batch_norm_kernel[(groups * parts,)](
            dx,
            x,
            mean,
            rstd,
            *(parameters if partials is None else (None, None, None)),
            partials,
            sums,
            result,
            rows,
            planes,
            tiles=tiles,
            parts=parts,
            count=x.numel() // channels,
            **units_of(length, x),
            ACC=TYPES[compute_dtype(x.dtype)],
            ROWS=BLOCK_TILE // columns,
            COLS=columns,
            LAST=last,
            TRAINING=training,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )

    with torch.cuda.device_of(x):
        sums = None
        if training and parts > 1:
            partials, sums = (x.new_empty(2 * channels * k, dtype=torch.float64) for k in (parts, 1))
            launch(partials, None, None)
            sum_rows_kernel[(2 * channels,)](
                partials, parts, sums, BLOCK=SUM_BLOCK, num_warps=SUM_WARPS, enable_fp_fusion=False
            )
        launch(None, sums, dy)
    return dy
