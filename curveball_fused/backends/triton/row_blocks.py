"""Rows of logits: how the Triton kernels of cross-entropy walk them, and what they compute on the way.

Of short rows several make a tile. A long row is walked in three parts: a head of less than 16 elements; the main part,
an aligned range of columns, in blocks without masks whose accesses are 128 bits wide; and a tail. Head and tail
together are its edges, in blocks with masks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .reduce import zeros
from .scalar import as_double

DIVISORS = tl.constexpr(128)  # programs that add up D


@triton.jit
def own_weight(target, weight, row, exists, classes, ignore_index, ACC):
    """Return each row's target, whether it counts, whether it is a class, and if so the weight of that class."""
    y = tl.load(target + row, exists, other=0)
    kept = exists & (y != ignore_index)
    known = kept & (y >= 0) & (y < classes)
    own = tl.where(known, 1.0, 0.0).to(ACC) if weight is None else tl.load(weight + y, known, other=0.0)
    return y, kept, known, own


@triton.jit(do_not_specialize=["n", "classes", "ignore_index"])
def divisor_kernel(
    target,  # [n], int64
    weight,  # [classes], of dtype ACC, or None
    divisors,  # [DIVISORS], float64, written
    n,
    classes,
    ignore_index,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write partial sums of D, the weights of the targets."""
    program = tl.program_id(0).to(tl.int64)
    lanes = zeros(BLOCK)
    for start in range(program * BLOCK, n, DIVISORS * BLOCK):
        row = start + tl.arange(0, BLOCK)
        _, _, _, own = own_weight(target, weight, row, row < n, classes, ignore_index, ACC)
        lanes += own.to(tl.float64)
    tl.store(divisors + program, tl.sum(lanes))


@triton.jit
def targets(target, weight, row, n, classes, ignore_index, smoothing, mass, ACC, SMOOTH):
    """Return the rows' targets, and t in parts.

    Returns:
        Target, whether it counts, whether it is a class; t: `own` at the target, `each` times the class weight
        everywhere, and their sum s, NaN for a target that is neither a class nor ignored.
    """
    y, kept, known, own = own_weight(target, weight, row, row < n, classes, ignore_index, ACC)
    own = tl.where(kept == known, own, float("nan"))
    each = tl.zeros_like(own)
    if SMOOTH:
        each = tl.where(kept, (as_double(smoothing) / classes).to(ACC), each)
        own = (1.0 - as_double(smoothing)).to(ACC) * own
    return y, kept, known, own, each, own + each * mass


@triton.jit
def total_mass(weight, classes, ACC, SMOOTH, BLOCK):
    """Return the sum of all class weights, where it is needed."""
    mass = as_double(classes)
    if SMOOTH and weight is not None:
        lanes = zeros(BLOCK)
        for start in range(0, classes, BLOCK):
            column = start + tl.arange(0, BLOCK)
            lanes += tl.load(weight + column, column < classes, other=0.0).to(tl.float64)
        mass = tl.sum(lanes)
    return mass.to(ACC)


@triton.jit
def aligned_range(tile, classes, ROWS, BLOCK_MAIN):
    """Return the columns where the main part of a long row begins and ends; short rows have none."""
    begin, end = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    if ROWS == 1:
        begin = (16 - tile * classes % 16) % 16
        end = begin + (classes - begin) // BLOCK_MAIN * BLOCK_MAIN
    return begin, end


@triton.jit
def edge_block(i, begin, end, classes, exists, BLOCK_EDGE):
    """Return the columns of the i-th edge block (the head is number 0), and which of them exist."""
    column = tl.where(i == 0, begin - 16, end + (i - 1) * BLOCK_EDGE) + tl.arange(0, BLOCK_EDGE)[None, :]
    return column, (column >= 0) & (column < tl.where(i == 0, begin, classes)) & exists[:, None]


@triton.jit
def main_block(tile, classes, begin, block, BLOCK_MAIN):
    """Return the columns of a main block, and their offsets in the matrix: from a multiple of 16 on."""
    column = begin + block * BLOCK_MAIN + tl.arange(0, BLOCK_MAIN)[None, :]
    first = tl.multiple_of(tile * classes + begin, 16)
    return column, first + block * BLOCK_MAIN + tl.arange(0, BLOCK_MAIN)[None, :]


@triton.jit
def online_softmax_update(x, v, peak, total, moment):
    """Update each lane's running maximum, Σ exp(x - peak) and Σ exp(x - peak) v, by a single exponential."""
    difference = x - peak
    small = tl.exp(-tl.abs(difference))
    larger = difference > 0.0
    total = tl.where(larger, total * small + 1.0, total + small)
    moment = tl.where(larger, moment * small + v, moment + small * v)
    return tl.where(larger, x, peak), total, moment


@triton.jit
def online_softmax_merge(peak, total, moment, other_peak, other_total, other_moment):
    """Merge two sets of lanes [rows, lanes] into one result for each row."""
    top = tl.maximum(tl.max(peak, 1), tl.max(other_peak, 1))
    scale, other_scale = tl.exp(peak - top[:, None]), tl.exp(other_peak - top[:, None])
    total = tl.sum(total * scale, 1) + tl.sum(other_total * other_scale, 1)
    return top, total, tl.sum(moment * scale, 1) + tl.sum(other_moment * other_scale, 1)


@triton.jit
def cotangent_terms(x, v, column, inside, weight, y, own, each, s, log_total, top, mean, scale, ACC, SMOOTH):
    """Return c of a block, and of each lane p v'², w log p and w v'."""
    log_p = x - top[:, None] - log_total[:, None]
    p, v = tl.exp(log_p), v - mean[:, None]
    t = tl.where(column == y[:, None], own[:, None], 0.0)
    log_sum, v_sum = tl.zeros_like(p), tl.zeros_like(p)
    if SMOOTH:
        w = tl.full(p.shape, 1.0, ACC)
        if weight is not None:
            w = tl.load(weight + column, inside)
        t += each[:, None] * w
        log_sum, v_sum = w * log_p, w * v
        if inside is not None:
            log_sum, v_sum = tl.where(inside, log_sum, 0.0), tl.where(inside, v_sum, 0.0)
    sp = s[:, None] * p
    return scale * ((sp - t) + sp * v), p * v * v, log_sum, v_sum


@triton.jit
def curvature_terms(x, v, u, offsets, column, inside, weight, log_total, v_mean, u_mean, ACC, SMOOTH):
    """Return p v' u', p u'² and w u' of each lane."""
    p = tl.exp(tl.load(x + offsets, inside, eviction_policy="evict_first").to(ACC) - log_total[:, None])
    v_value = tl.load(v + offsets, inside).to(ACC) - v_mean[:, None]
    u_value = tl.load(u + offsets, inside, eviction_policy="evict_first").to(ACC) - u_mean[:, None]
    vpu, upu, wu = p * u_value * v_value, p * u_value * u_value, tl.zeros_like(p)
    if SMOOTH:
        wu = u_value
        if weight is not None:
            wu = u_value * tl.load(weight + column, inside)
    if inside is not None:
        vpu, upu, wu = tl.where(inside, vpu, 0.0), tl.where(inside, upu, 0.0), tl.where(inside, wu, 0.0)
    return vpu, upu, wu
