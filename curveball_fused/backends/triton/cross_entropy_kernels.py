"""The kernels of `triton_cross_entropy`.

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

from .reduce import add_up
from .row_blocks import DIVISORS, absorb, bend_of, body_at, curve, edge_at, join, pieces, targets, total_mass
from .scalar import as_double

STAGES = tl.constexpr(3)  # blocks of a long row under way: in registers alone there is no room for enough of them


@triton.jit
def _divisor(divisors):
    """D."""
    total = as_double(1.0)
    if divisors is not None:
        total = add_up(divisors, 0, DIVISORS, DIVISORS)
    return total


@triton.jit
def _over_rows(terms, kept):
    return tl.sum(tl.where(kept, terms, 0.0).to(tl.float64))


@triton.jit(do_not_specialize=["n", "classes", "ignore_index"])
def products_kernel(
    x,
    v,
    target,
    weight,
    c,
    rows,
    divisors,
    divisor,
    partials,
    n,
    classes,
    ignore_index,
    smoothing: tl.float64,
    sign: tl.float64,
    A: tl.constexpr,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
    BODY: tl.constexpr,
    EDGE: tl.constexpr,
):
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    total_weight = _divisor(divisors)
    if program == 0:
        tl.store(divisor, total_weight)
    mass = total_mass(weight, classes, A, SMOOTH, EDGE)
    lowest: tl.constexpr = -3.4e38 if tl.float32 == A else -1.7e308  # not infinite, as inf - inf is NaN
    loss_sum, gv_sum, vhv_sum = as_double(0.0), as_double(0.0), as_double(0.0)
    for tile in range(program, tl.cdiv(n, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        exists = row < n
        y, kept, known, own, each, s = targets(
            target, weight, row, n, classes, ignore_index, smoothing, mass, A, SMOOTH
        )
        start = row * classes
        begin, end = pieces(tile, classes, ROWS, BODY)
        first_edge, edges, blocks = tl.where(begin == 0, 1, 0), 1 + tl.cdiv(classes - end, EDGE), (end - begin) // BODY

        peak, total, moment = tl.full((ROWS, EDGE), lowest, A), tl.zeros((ROWS, EDGE), A), tl.zeros((ROWS, EDGE), A)
        for i in range(first_edge, edges):
            column, inside = edge_at(i, begin, end, classes, exists, EDGE)
            offsets = start[:, None] + column
            x_value = tl.load(x + offsets, inside, other=float("-inf"), eviction_policy="evict_last").to(A)
            v_value = tl.load(v + offsets, inside, other=0.0, eviction_policy="evict_last").to(A)
            peak, total, moment = absorb(x_value, v_value, peak, total, moment)
        if ROWS == 1:
            body_peak = tl.full((1, BODY), lowest, A)
            body_total, body_moment = tl.zeros((1, BODY), A), tl.zeros((1, BODY), A)
            for block in tl.range(0, blocks, num_stages=STAGES):
                _, offsets = body_at(tile, classes, begin, block, BODY)
                x_value = tl.load(x + offsets, eviction_policy="evict_last").to(A)
                v_value = tl.load(v + offsets, eviction_policy="evict_last").to(A)
                body_peak, body_total, body_moment = absorb(x_value, v_value, body_peak, body_total, body_moment)
            top, total, moment = join(peak, total, moment, body_peak, body_total, body_moment)
        else:
            top, total, moment = join(peak, total, moment, peak, tl.zeros_like(total), tl.zeros_like(moment))
        log_total, mean = tl.log(total), moment / total

        scale = (as_double(sign) / total_weight).to(A)
        bend, log_sum, v_sum = tl.zeros((ROWS, EDGE), A), tl.zeros((ROWS, EDGE), A), tl.zeros((ROWS, EDGE), A)
        for i in range(first_edge, edges):
            column, inside = edge_at(i, begin, end, classes, exists, EDGE)
            offsets = start[:, None] + column
            x_value = tl.load(x + offsets, inside, other=float("-inf"), eviction_policy="evict_first").to(A)
            v_value = tl.load(v + offsets, inside, other=0.0, eviction_policy="evict_first").to(A)
            c_value, a, b, d = curve(
                x_value, v_value, column, inside, weight, y, own, each, s, log_total, top, mean, scale, A, SMOOTH
            )
            tl.store(c + offsets, tl.where(kept[:, None], c_value, 0.0).to(c.dtype.element_ty), inside)
            bend, log_sum, v_sum = bend + a, log_sum + b, v_sum + d
        row_bend, row_log, row_v = tl.sum(bend, 1), tl.sum(log_sum, 1), tl.sum(v_sum, 1)
        if ROWS == 1:
            bend, log_sum, v_sum = tl.zeros((1, BODY), A), tl.zeros((1, BODY), A), tl.zeros((1, BODY), A)
            for i in tl.range(
                0, blocks, num_stages=STAGES
            ):  # backwards: what was read last is the likeliest to be in the cache
                column, offsets = body_at(tile, classes, begin, blocks - 1 - i, BODY)
                x_value = tl.load(x + offsets, eviction_policy="evict_first").to(A)
                v_value = tl.load(v + offsets, eviction_policy="evict_first").to(A)
                c_value, a, b, d = curve(
                    x_value, v_value, column, None, weight, y, own, each, s, log_total, top, mean, scale, A, SMOOTH
                )
                tl.store(c + offsets, tl.where(kept[:, None], c_value, 0.0).to(c.dtype.element_ty))
                bend, log_sum, v_sum = bend + a, log_sum + b, v_sum + d
            row_bend, row_log, row_v = (
                row_bend + tl.sum(bend, 1),
                row_log + tl.sum(log_sum, 1),
                row_v + tl.sum(v_sum, 1),
            )

        x_own = tl.load(x + start + y, known, other=0.0).to(A)
        v_own = tl.load(v + start + y, known, other=0.0).to(A)
        loss = own * (top - x_own + log_total) - each * row_log
        gv = -own * (v_own - mean) - each * row_v
        loss_sum += _over_rows(loss, kept)
        gv_sum += _over_rows(gv, kept)
        vhv_sum += _over_rows(s * row_bend, kept)
        share = (s.to(tl.float64) / total_weight).to(A)
        tl.store(rows + 3 * row, tl.where(kept, top + log_total, 0.0), exists)
        tl.store(rows + 3 * row + 1, tl.where(kept, mean, 0.0), exists)
        tl.store(rows + 3 * row + 2, tl.where(kept, share, 0.0), exists)
    tl.store(partials + program, loss_sum)
    tl.store(partials + programs + program, gv_sum)
    tl.store(partials + 2 * programs + program, vhv_sum)


@triton.jit(do_not_specialize=["n", "classes", "ignore_index"])
def dots_kernel(
    x,
    v,
    u,
    target,
    weight,
    rows,
    divisors,
    divisor,
    partials,
    n,
    classes,
    ignore_index,
    smoothing: tl.float64,
    A: tl.constexpr,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
    BODY: tl.constexpr,
    EDGE: tl.constexpr,
):
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    if program == 0:
        tl.store(divisor, _divisor(divisors))
    mass = total_mass(weight, classes, A, SMOOTH, EDGE)
    gu_sum, vhu_sum, uhu_sum = as_double(0.0), as_double(0.0), as_double(0.0)
    for tile in range(program, tl.cdiv(n, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        exists = row < n
        y, kept, known, own, each, s = targets(
            target, weight, row, n, classes, ignore_index, smoothing, mass, A, SMOOTH
        )
        start = row * classes
        begin, end = pieces(tile, classes, ROWS, BODY)
        first_edge, edges, blocks = tl.where(begin == 0, 1, 0), 1 + tl.cdiv(classes - end, EDGE), (end - begin) // BODY
        log_total = tl.load(rows + 3 * row, exists, other=0.0)
        v_mean = tl.load(rows + 3 * row + 1, exists, other=0.0)

        moment = tl.zeros((ROWS, EDGE), A)
        for i in range(first_edge, edges):
            column, inside = edge_at(i, begin, end, classes, exists, EDGE)
            offsets = start[:, None] + column
            x_value = tl.load(x + offsets, inside, other=float("-inf"), eviction_policy="evict_last").to(A)
            u_value = tl.load(u + offsets, inside, other=0.0, eviction_policy="evict_last").to(A)
            moment += tl.exp(x_value - log_total[:, None]) * u_value
        u_mean = tl.sum(moment, 1)
        if ROWS == 1:
            moment = tl.zeros((1, BODY), A)
            for block in tl.range(0, blocks, num_stages=STAGES):
                _, offsets = body_at(tile, classes, begin, block, BODY)
                x_value = tl.load(x + offsets, eviction_policy="evict_last").to(A)
                u_value = tl.load(u + offsets, eviction_policy="evict_last").to(A)
                moment += tl.exp(x_value - log_total[:, None]) * u_value
            u_mean += tl.sum(moment, 1)

        vhu, uhu, u_sum = tl.zeros((ROWS, EDGE), A), tl.zeros((ROWS, EDGE), A), tl.zeros((ROWS, EDGE), A)
        for i in range(first_edge, edges):
            column, inside = edge_at(i, begin, end, classes, exists, EDGE)
            offsets = start[:, None] + column
            a, b, d = bend_of(x, v, u, offsets, column, inside, weight, log_total, v_mean, u_mean, A, SMOOTH)
            vhu, uhu, u_sum = vhu + a, uhu + b, u_sum + d
        row_vhu, row_uhu, row_u = tl.sum(vhu, 1), tl.sum(uhu, 1), tl.sum(u_sum, 1)
        if ROWS == 1:
            vhu, uhu, u_sum = tl.zeros((1, BODY), A), tl.zeros((1, BODY), A), tl.zeros((1, BODY), A)
            for i in tl.range(0, blocks, num_stages=STAGES):
                column, offsets = body_at(tile, classes, begin, blocks - 1 - i, BODY)
                a, b, d = bend_of(x, v, u, offsets, column, None, weight, log_total, v_mean, u_mean, A, SMOOTH)
                vhu, uhu, u_sum = vhu + a, uhu + b, u_sum + d
            row_vhu, row_uhu, row_u = row_vhu + tl.sum(vhu, 1), row_uhu + tl.sum(uhu, 1), row_u + tl.sum(u_sum, 1)

        u_own = tl.load(u + start + y, known, other=0.0).to(A)
        gu_sum += _over_rows(-own * (u_own - u_mean) - each * row_u, kept)
        vhu_sum += _over_rows(s * row_vhu, kept)
        uhu_sum += _over_rows(s * row_uhu, kept)
    tl.store(partials + program, gu_sum)
    tl.store(partials + programs + program, vhu_sum)
    tl.store(partials + 2 * programs + program, uhu_sum)
