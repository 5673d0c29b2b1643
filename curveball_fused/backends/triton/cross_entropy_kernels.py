"""The kernels of cross-entropy in Triton.

With p = softmax(x), w_y the class weight of the target (0 where it is ignored), t = (1-ε) w_y onehot(y) + ε/C w,
s = Σ t, and D = Σ w_y or 1:  L = -1/D Σ t log p,  g = (s p - t)/D,  v' = v - <p, v>,  H v = s p v'/D. As Σ p v' = 0,
g·v' = -1/D Σ t v' needs no sum over p; and v'·H v' = 1/D Σ s p v'² is a sum of terms that are not negative.

A row is read twice, the second time from the cache: first for the normalizer and <p, v>, then for c and the sums. The
number of programs, and with it the order of all sums, follows from the number of rows alone; within a row, sums run in
the arithmetic's dtype over lanes of few terms.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .reduce import sum_partials
from .row_blocks import (
    DIVISORS,
    aligned_range,
    cotangent_terms,
    curvature_terms,
    edge_block,
    main_block,
    online_softmax_merge,
    online_softmax_update,
    targets,
    total_mass,
)
from .scalar import as_double

STAGES = tl.constexpr(3)  # blocks of a long row under way: in registers alone there is no room for enough of them


@triton.jit
def _divisor(divisors):
    """Return D."""
    total = as_double(1.0)
    if divisors is not None:
        total = sum_partials(divisors, 0, DIVISORS, DIVISORS)
    return total


@triton.jit
def _over_rows(terms, kept):
    """Return the sum, float64, over the rows that count."""
    return tl.sum(tl.where(kept, terms, 0.0).to(tl.float64))


@triton.jit(do_not_specialize=["n", "classes", "ignore_index"])
def cotangent_kernel(
    x,  # [n, classes]
    v,  # [n, classes]
    target,  # [n], int64
    weight,  # [classes], of dtype ACC, or None
    c,  # [n, classes], written
    row_stats,  # [n, 3], of dtype ACC, written: log Σ exp x, <p, v> and s/D
    divisors,  # [DIVISORS], float64, or None for D = 1
    divisor,  # [1], float64, written: D
    partials,  # [3, programs], float64, written: sums of the loss, g·v' and v'·Hv', times D
    n,
    classes,
    ignore_index,
    smoothing: tl.float64,
    sign: tl.float64,
    ACC: tl.constexpr,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_MAIN: tl.constexpr,
    BLOCK_EDGE: tl.constexpr,
):
    """Write loss, c and two products: the first call of the operator."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    total_weight = _divisor(divisors)
    if program == 0:
        tl.store(divisor, total_weight)
    mass = total_mass(weight, classes, ACC, SMOOTH, BLOCK_EDGE)
    lowest: tl.constexpr = -3.4e38 if tl.float32 == ACC else -1.7e308  # not infinite, as inf - inf is NaN
    loss_sum, gv_sum, vhv_sum = as_double(0.0), as_double(0.0), as_double(0.0)
    for tile in range(program, tl.cdiv(n, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        exists = row < n
        y, kept, known, own, each, s = targets(
            target, weight, row, n, classes, ignore_index, smoothing, mass, ACC, SMOOTH
        )
        start = row * classes
        begin, end = aligned_range(tile, classes, ROWS, BLOCK_MAIN)
        first_edge, edges = tl.where(begin == 0, 1, 0), 1 + tl.cdiv(classes - end, BLOCK_EDGE)
        blocks = (end - begin) // BLOCK_MAIN

        peak = tl.full((ROWS, BLOCK_EDGE), lowest, ACC)
        total, moment = tl.zeros((ROWS, BLOCK_EDGE), ACC), tl.zeros((ROWS, BLOCK_EDGE), ACC)
        for i in range(first_edge, edges):
            column, inside = edge_block(i, begin, end, classes, exists, BLOCK_EDGE)
            offsets = start[:, None] + column
            x_value = tl.load(x + offsets, inside, other=float("-inf"), eviction_policy="evict_last").to(ACC)
            v_value = tl.load(v + offsets, inside, other=0.0, eviction_policy="evict_last").to(ACC)
            peak, total, moment = online_softmax_update(x_value, v_value, peak, total, moment)
        if ROWS == 1:
            main_peak = tl.full((1, BLOCK_MAIN), lowest, ACC)
            main_total, main_moment = tl.zeros((1, BLOCK_MAIN), ACC), tl.zeros((1, BLOCK_MAIN), ACC)
            for block in tl.range(0, blocks, num_stages=STAGES):
                _, offsets = main_block(tile, classes, begin, block, BLOCK_MAIN)
                x_value = tl.load(x + offsets, eviction_policy="evict_last").to(ACC)
                v_value = tl.load(v + offsets, eviction_policy="evict_last").to(ACC)
                main_peak, main_total, main_moment = online_softmax_update(
                    x_value, v_value, main_peak, main_total, main_moment
                )
            top, total, moment = online_softmax_merge(peak, total, moment, main_peak, main_total, main_moment)
        else:
            top, total, moment = online_softmax_merge(
                peak, total, moment, peak, tl.zeros_like(total), tl.zeros_like(moment)
            )
        log_total, mean = tl.log(total), moment / total

        scale = (as_double(sign) / total_weight).to(ACC)
        curvature = tl.zeros((ROWS, BLOCK_EDGE), ACC)
        log_sum, v_sum = tl.zeros((ROWS, BLOCK_EDGE), ACC), tl.zeros((ROWS, BLOCK_EDGE), ACC)
        for i in range(first_edge, edges):
            column, inside = edge_block(i, begin, end, classes, exists, BLOCK_EDGE)
            offsets = start[:, None] + column
            x_value = tl.load(x + offsets, inside, other=float("-inf"), eviction_policy="evict_first").to(ACC)
            v_value = tl.load(v + offsets, inside, other=0.0, eviction_policy="evict_first").to(ACC)
            c_value, a, b, d = cotangent_terms(
                x_value, v_value, column, inside, weight, y, own, each, s, log_total, top, mean, scale, ACC, SMOOTH
            )
            tl.store(c + offsets, tl.where(kept[:, None], c_value, 0.0).to(c.dtype.element_ty), inside)
            curvature, log_sum, v_sum = curvature + a, log_sum + b, v_sum + d
        row_curvature, row_log, row_v = tl.sum(curvature, 1), tl.sum(log_sum, 1), tl.sum(v_sum, 1)
        if ROWS == 1:
            curvature = tl.zeros((1, BLOCK_MAIN), ACC)
            log_sum, v_sum = tl.zeros((1, BLOCK_MAIN), ACC), tl.zeros((1, BLOCK_MAIN), ACC)
            # Backwards: what was read last is the likeliest to be in the cache.
            for i in tl.range(0, blocks, num_stages=STAGES):
                column, offsets = main_block(tile, classes, begin, blocks - 1 - i, BLOCK_MAIN)
                x_value = tl.load(x + offsets, eviction_policy="evict_first").to(ACC)
                v_value = tl.load(v + offsets, eviction_policy="evict_first").to(ACC)
                c_value, a, b, d = cotangent_terms(
                    x_value, v_value, column, None, weight, y, own, each, s, log_total, top, mean, scale, ACC, SMOOTH
                )
                tl.store(c + offsets, tl.where(kept[:, None], c_value, 0.0).to(c.dtype.element_ty))
                curvature, log_sum, v_sum = curvature + a, log_sum + b, v_sum + d
            row_curvature += tl.sum(curvature, 1)
            row_log, row_v = row_log + tl.sum(log_sum, 1), row_v + tl.sum(v_sum, 1)

        x_own = tl.load(x + start + y, known, other=0.0).to(ACC)
        v_own = tl.load(v + start + y, known, other=0.0).to(ACC)
        loss = own * (top - x_own + log_total) - each * row_log
        gv = -own * (v_own - mean) - each * row_v
        loss_sum += _over_rows(loss, kept)
        gv_sum += _over_rows(gv, kept)
        vhv_sum += _over_rows(s * row_curvature, kept)
        share = (s.to(tl.float64) / total_weight).to(ACC)
        tl.store(row_stats + 3 * row, tl.where(kept, top + log_total, 0.0), exists)
        tl.store(row_stats + 3 * row + 1, tl.where(kept, mean, 0.0), exists)
        tl.store(row_stats + 3 * row + 2, tl.where(kept, share, 0.0), exists)
    tl.store(partials + program, loss_sum)
    tl.store(partials + programs + program, gv_sum)
    tl.store(partials + 2 * programs + program, vhv_sum)


@triton.jit(do_not_specialize=["n", "classes", "ignore_index"])
def products_kernel(
    x,  # [n, classes]
    v,  # [n, classes]
    u,  # [n, classes]
    target,  # [n], int64
    weight,  # [classes], of dtype ACC, or None
    row_stats,  # [n, 3], of dtype ACC
    divisors,  # [DIVISORS], float64, or None for D = 1
    divisor,  # [1], float64, written: D
    partials,  # [3, programs], float64, written: sums of g·u', v'·Hu' and u'·Hu', times D
    n,
    classes,
    ignore_index,
    smoothing: tl.float64,
    ACC: tl.constexpr,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_MAIN: tl.constexpr,
    BLOCK_EDGE: tl.constexpr,
):
    """Write the other three products: the second call of the operator."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    if program == 0:
        tl.store(divisor, _divisor(divisors))
    mass = total_mass(weight, classes, ACC, SMOOTH, BLOCK_EDGE)
    gu_sum, vhu_sum, uhu_sum = as_double(0.0), as_double(0.0), as_double(0.0)
    for tile in range(program, tl.cdiv(n, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        exists = row < n
        y, kept, known, own, each, s = targets(
            target, weight, row, n, classes, ignore_index, smoothing, mass, ACC, SMOOTH
        )
        start = row * classes
        begin, end = aligned_range(tile, classes, ROWS, BLOCK_MAIN)
        first_edge, edges = tl.where(begin == 0, 1, 0), 1 + tl.cdiv(classes - end, BLOCK_EDGE)
        blocks = (end - begin) // BLOCK_MAIN
        log_total = tl.load(row_stats + 3 * row, exists, other=0.0)
        v_mean = tl.load(row_stats + 3 * row + 1, exists, other=0.0)

        moment = tl.zeros((ROWS, BLOCK_EDGE), ACC)
        for i in range(first_edge, edges):
            column, inside = edge_block(i, begin, end, classes, exists, BLOCK_EDGE)
            offsets = start[:, None] + column
            x_value = tl.load(x + offsets, inside, other=float("-inf"), eviction_policy="evict_last").to(ACC)
            u_value = tl.load(u + offsets, inside, other=0.0, eviction_policy="evict_last").to(ACC)
            moment += tl.exp(x_value - log_total[:, None]) * u_value
        u_mean = tl.sum(moment, 1)
        if ROWS == 1:
            moment = tl.zeros((1, BLOCK_MAIN), ACC)
            for block in tl.range(0, blocks, num_stages=STAGES):
                _, offsets = main_block(tile, classes, begin, block, BLOCK_MAIN)
                x_value = tl.load(x + offsets, eviction_policy="evict_last").to(ACC)
                u_value = tl.load(u + offsets, eviction_policy="evict_last").to(ACC)
                moment += tl.exp(x_value - log_total[:, None]) * u_value
            u_mean += tl.sum(moment, 1)

        vhu = tl.zeros((ROWS, BLOCK_EDGE), ACC)
        uhu, u_sum = tl.zeros((ROWS, BLOCK_EDGE), ACC), tl.zeros((ROWS, BLOCK_EDGE), ACC)
        for i in range(first_edge, edges):
            column, inside = edge_block(i, begin, end, classes, exists, BLOCK_EDGE)
            offsets = start[:, None] + column
            a, b, d = curvature_terms(x, v, u, offsets, column, inside, weight, log_total, v_mean, u_mean, ACC, SMOOTH)
            vhu, uhu, u_sum = vhu + a, uhu + b, u_sum + d
        row_vhu, row_uhu, row_u = tl.sum(vhu, 1), tl.sum(uhu, 1), tl.sum(u_sum, 1)
        if ROWS == 1:
            vhu = tl.zeros((1, BLOCK_MAIN), ACC)
            uhu, u_sum = tl.zeros((1, BLOCK_MAIN), ACC), tl.zeros((1, BLOCK_MAIN), ACC)
            for i in tl.range(0, blocks, num_stages=STAGES):
                column, offsets = main_block(tile, classes, begin, blocks - 1 - i, BLOCK_MAIN)
                a, b, d = curvature_terms(
                    x, v, u, offsets, column, None, weight, log_total, v_mean, u_mean, ACC, SMOOTH
                )
                vhu, uhu, u_sum = vhu + a, uhu + b, u_sum + d
            row_vhu, row_uhu, row_u = row_vhu + tl.sum(vhu, 1), row_uhu + tl.sum(uhu, 1), row_u + tl.sum(u_sum, 1)

        u_own = tl.load(u + start + y, known, other=0.0).to(ACC)
        gu_sum += _over_rows(-own * (u_own - u_mean) - each * row_u, kept)
        vhu_sum += _over_rows(s * row_vhu, kept)
        uhu_sum += _over_rows(s * row_uhu, kept)
    tl.store(partials + program, gu_sum)
    tl.store(partials + programs + program, vhu_sum)
    tl.store(partials + 2 * programs + program, uhu_sum)
