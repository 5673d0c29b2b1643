"""The tangent of batch norm in Triton: see `triton_norms`."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .norms import TILE, WARPS, load, normalized, units_of
from .parameters import finish_dots_kernel
from .reduce import SUM_BLOCK, SUM_WARPS, TYPES, arithmetic

COLUMNS = 64  # channels side by side, where the channel is the last dimension
PROGRAMS = 1024  # over channels, unless that leaves them fewer tiles than
STEPS = 8
TERMS = tl.constexpr(16)  # added up in the arithmetic's dtype before they join a sum in float64


@triton.jit
def _tile(tile, group, rows, planes, length, ROWS: tl.constexpr, COLS: tl.constexpr, LAST: tl.constexpr):
    """Of a tile of a group of channels: offsets in memory [rows, planes, length], and which of them are there.

    A group is a plane of each row; or, if the channel is the LAST dimension, COLS neighbors in each row.
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
    """[rows, columns] summed to [1, channels of a group], in float64."""
    sums = tl.sum(lanes.to(tl.float64), 0)[None, :]
    return sums if LAST else tl.sum(sums, 1)[:, None]


@triton.jit(do_not_specialize=["rows", "planes", "units", "tiles", "parts", "count"])
def batch_norm_kernel(
    dx,
    x,
    mean,
    rstd,
    weight,
    dweight,
    dbias,
    partials,
    sums,
    dy,
    rows,
    planes,
    units,
    tiles,
    parts,
    count,
    UNIT: tl.constexpr,
    A: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LAST: tl.constexpr,
    TRAINING: tl.constexpr,
):
    """Program (part, group) takes every parts-th tile of a group of channels, and gives one of three:

    partials [2, channels, parts], the sums of dx and x̂ dx, if there is no dy; dy by sums [2, channels] of all parts;
    or, where one program has the whole group, dy by its own sums.
    """
    length, groups = units * UNIT, tl.num_programs(0) // parts
    group, part = (tl.program_id(0) % groups).to(tl.int64), (tl.program_id(0) // groups).to(tl.int64)
    if LAST:
        channels, channel = length, (group * COLS + tl.arange(0, COLS))[None, :]
    else:
        channels, channel = planes, (group + tl.arange(0, 1))[None, :]
    known = channel < channels
    m, r = load(mean, channel, known, A), load(rstd, channel, known, A)

    t_sum, product_sum = tl.zeros(channel.shape, tl.float64), tl.zeros(channel.shape, tl.float64)
    if sums is not None:
        t_sum += tl.load(sums + channel, known, other=0.0)
        product_sum += tl.load(sums + channels + channel, known, other=0.0)
    elif TRAINING:
        for start in range(part, tiles, parts * TERMS):
            tangents, products = tl.zeros((ROWS, COLS), A), tl.zeros((ROWS, COLS), A)
            for tile in range(start, tl.minimum(start + parts * TERMS, tiles), parts):
                offsets, inside = _tile(tile, group, rows, planes, length, ROWS, COLS, LAST)
                x_hat, t = normalized(x, dx, offsets, inside, m, r, A)
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
            gain *= load(weight, channel, known, A)
        slope, shift = -gain * (product_sum / count).to(A), -gain * (t_sum / count).to(A)
        if dweight is not None:
            slope += load(dweight, channel, known, A)
        if dbias is not None:
            shift += load(dbias, channel, known, A)
        for tile in range(part, tiles, parts):
            offsets, inside = _tile(tile, group, rows, planes, length, ROWS, COLS, LAST)
            x_hat, t = normalized(x, dx, offsets, inside, m, r, A)
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
    """dy, like x, for x and dx [N, C, ...] of one dtype and the same strides, contiguous or channels_last.

    mean and rstd [C], those of the batch if `training`, else constants: dy = weight rstd dx + dweight x̂ + dbias. They
    are in the arithmetic's dtype; weight, dweight and dbias [C] are each None or of x's dtype, all contiguous.
    """
    dy = torch.empty_like(x)
    if x.numel() == 0:
        return dy
    rows, channels, space = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    last = space == 1 or not x.is_contiguous()
    rows, planes, length = (rows * space, 1, channels) if last else (rows, channels, space)
    columns = min(triton.next_power_of_2(length), COLUMNS if last else TILE)
    across, groups = (1, triton.cdiv(length, columns)) if last else (triton.cdiv(length, columns), channels)
    tiles = triton.cdiv(rows, TILE // columns) * across
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
            A=TYPES[arithmetic(x)],
            ROWS=TILE // columns,
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
            finish_dots_kernel[(2 * channels,)](
                partials, parts, sums, BLOCK=SUM_BLOCK, num_warps=SUM_WARPS, enable_fp_fusion=False
            )
        launch(None, sums, dy)
    return dy
