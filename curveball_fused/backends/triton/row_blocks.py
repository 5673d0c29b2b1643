"""Rows of logits: how the Triton kernels of cross-entropy walk them, and what they compute on the way.

Of short rows several make a tile. A long row is walked in three pieces: a head of less than 16 elements, a body without
masks whose accesses are 128 bits wide, and a tail; head and tail together are its edges.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .reduce import zeros
from .scalar import as_double

DIVISORS = tl.constexpr(128)  # programs that add up D


@triton.jit
def own_weight(target, weight, row, exists, classes, ignore_index, A):
    """Of each row: target, whether it counts, whether its target is a class, and if so the weight of that class."""
    y = tl.load(target + row, exists, other=0)
    kept = exists & (y != ignore_index)
    known = kept & (y >= 0) & (y < classes)
    own = tl.where(known, 1.0, 0.0).to(A) if weight is None else tl.load(weight + y, known, other=0.0)
    return y, kept, known, own


@triton.jit(do_not_specialize=["n", "classes", "ignore_index"])
def divisor_kernel(target, weight, divisors, n, classes, ignore_index, A: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    lanes = zeros(BLOCK)
    for start in range(program * BLOCK, n, DIVISORS * BLOCK):
        row = start + tl.arange(0, BLOCK)
        _, _, _, own = own_weight(target, weight, row, row < n, classes, ignore_index, A)
        lanes += own.to(tl.float64)
    tl.store(divisors + program, tl.sum(lanes))


@triton.jit
def targets(target, weight, row, n, classes, ignore_index, smoothing, mass, A, SMOOTH):
    """The rows' targets, and t in parts: `own` at the target, `each` times the class weight everywhere, their sum s.

    A target that is neither a class nor ignored makes them NaN.
    """
    y, kept, known, own = own_weight(target, weight, row, row < n, classes, ignore_index, A)
    own = tl.where(kept == known, own, float("nan"))
    each = tl.zeros_like(own)
    if SMOOTH:
        each = tl.where(kept, (as_double(smoothing) / classes).to(A), each)
        own = (1.0 - as_double(smoothing)).to(A) * own
    return y, kept, known, own, each, own + each * mass


@triton.jit
def total_mass(weight, classes, A, SMOOTH, BLOCK):
    """The sum of all class weights, where it is needed."""
    mass = as_double(classes)
    if SMOOTH and weight is not None:
        lanes = zeros(BLOCK)
        for start in range(0, classes, BLOCK):
            column = start + tl.arange(0, BLOCK)
            lanes += tl.load(weight + column, column < classes, other=0.0).to(tl.float64)
        mass = tl.sum(lanes)
    return mass.to(A)


@triton.jit
def pieces(tile, classes, ROWS, BODY):
    """Columns where the body of a long row begins and ends; of short rows all is tail."""
    begin, end = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    if ROWS == 1:
        begin = (16 - tile * classes % 16) % 16
        end = begin + (classes - begin) // BODY * BODY
    return begin, end


@triton.jit
def edge_at(i, begin, end, classes, exists, EDGE):
    """Columns of the i-th piece outside the body (the head is number 0), and which of them are there."""
    column = tl.where(i == 0, begin - 16, end + (i - 1) * EDGE) + tl.arange(0, EDGE)[None, :]
    return column, (column >= 0) & (column < tl.where(i == 0, begin, classes)) & exists[:, None]


@triton.jit
def body_at(tile, classes, begin, block, BODY):
    """Columns of a block of the body of a long row, and their offsets in the matrix: from a multiple of 16 on."""
    column = begin + block * BODY + tl.arange(0, BODY)[None, :]
    first = tl.multiple_of(tile * classes + begin, 16)
    return column, first + block * BODY + tl.arange(0, BODY)[None, :]


@triton.jit
def absorb(x, v, peak, total, moment):
    """The running maximum, Σ exp(x - peak) and Σ exp(x - peak) v of each lane, by a single exponential."""
    difference = x - peak
    small = tl.exp(-tl.abs(difference))
    larger = difference > 0.0
    total = tl.where(larger, total * small + 1.0, total + small)
    moment = tl.where(larger, moment * small + v, moment + small * v)
    return tl.where(larger, x, peak), total, moment


@triton.jit
def join(peak, total, moment, other_peak, other_total, other_moment):
    """Lanes [rows, lanes] into rows, and another such result with it."""
    top = tl.maximum(tl.max(peak, 1), tl.max(other_peak, 1))
    scale, other_scale = tl.exp(peak - top[:, None]), tl.exp(other_peak - top[:, None])
    total = tl.sum(total * scale, 1) + tl.sum(other_total * other_scale, 1)
    return top, total, tl.sum(moment * scale, 1) + tl.sum(other_moment * other_scale, 1)


@triton.jit
def curve(x, v, column, inside, weight, y, own, each, s, log_total, top, mean, scale, A, SMOOTH):
    """c of a piece of rows, and of each lane p v'², w log p and w v'."""
    log_p = x - top[:, None] - log_total[:, None]
    p, v = tl.exp(log_p), v - mean[:, None]
    t = tl.where(column == y[:, None], own[:, None], 0.0)
    log_sum, v_sum = tl.zeros_like(p), tl.zeros_like(p)
    if SMOOTH:
        w = tl.full(p.shape, 1.0, A)
        if weight is not None:
            w = tl.load(weight + column, inside)
        t += each[:, None] * w
        log_sum, v_sum = w * log_p, w * v
        if inside is not None:
            log_sum, v_sum = tl.where(inside, log_sum, 0.0), tl.where(inside, v_sum, 0.0)
    sp = s[:, None] * p
    return scale * ((sp - t) + sp * v), p * v * v, log_sum, v_sum


@triton.jit
def bend_of(x, v, u, offsets, column, inside, weight, log_total, v_mean, u_mean, A, SMOOTH):
    """Of each lane p v' u', p u'² and w u'."""
    p = tl.exp(tl.load(x + offsets, inside, eviction_policy="evict_first").to(A) - log_total[:, None])
    v_value = tl.load(v + offsets, inside).to(A) - v_mean[:, None]
    u_value = tl.load(u + offsets, inside, eviction_policy="evict_first").to(A) - u_mean[:, None]
    vpu, upu, wu = p * u_value * v_value, p * u_value * u_value, tl.zeros_like(p)
    if SMOOTH:
        wu = u_value
        if weight is not None:
            wu = u_value * tl.load(weight + column, inside)
    if inside is not None:
        vpu, upu, wu = tl.where(inside, vpu, 0.0), tl.where(inside, upu, 0.0), tl.where(inside, wu, 0.0)
    return vpu, upu, wu
