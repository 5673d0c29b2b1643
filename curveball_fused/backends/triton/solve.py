"""The closed-form solve for β and ρ in Triton, which `reference.solve` and csrc/formulas.h specify.

One program, in float64. Parameters of type float64 reach a kernel exactly (others would be rounded to float32).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curveball_fused.backends import scalars as layout

from .scalar import as_double, divide_or_zero, is_finite

# The layout of the scalars, as kernels see it.
BETA = tl.constexpr(layout.BETA)
RHO = tl.constexpr(layout.RHO)
LAMBD = tl.constexpr(layout.LAMBD)
Z_DOT_Z = tl.constexpr(layout.Z_DOT_Z)
LINEAR_TERM = tl.constexpr(layout.LINEAR_TERM)
QUADRATIC_TERM = tl.constexpr(layout.QUADRATIC_TERM)
PREDICTED_CHANGE = tl.constexpr(layout.PREDICTED_CHANGE)
RATIO = tl.constexpr(layout.RATIO)
LOSS = tl.constexpr(layout.LOSS)
SKIPPED_STEPS = tl.constexpr(layout.SKIPPED_STEPS)
SAFE_STEPS = tl.constexpr(layout.SAFE_STEPS)
DIRECTION_DAMPING = tl.constexpr(layout.DIRECTION_DAMPING)
AVERAGE_BETA = tl.constexpr(layout.AVERAGE_BETA)
AVERAGE_RHO = tl.constexpr(layout.AVERAGE_RHO)
SOLVES = tl.constexpr(layout.SOLVES)
COUNT = tl.constexpr(len(layout.SCALARS))
BLOCK_SCALARS = tl.constexpr(triton.next_power_of_2(len(layout.SCALARS)))
RANK_TOLERANCE = tl.constexpr(layout.RANK_TOLERANCE)
CONVEX_TOLERANCE = tl.constexpr(layout.CONVEX_TOLERANCE)


@triton.jit
def predicted_change(linear_term, quadratic_term, lr):
    """Return M = -lr x.b + lr^2 x'Ax / 2."""
    return -lr * linear_term + 0.5 * lr * lr * quadratic_term


@triton.jit
def _in_bounds(x2):
    """Return the x2 = -rho nearest to the given one with rho in [0, 1]; NaN stays NaN."""
    return tl.where(x2 > 0.0, 0.0, tl.where(x2 < -1.0, -1.0, x2))


@triton.jit
def _averaged(keep, average, now):
    """Return the average with a new value in it; the value itself, bit for bit, if nothing of the old one is kept."""
    return tl.where(keep == 0.0, now, keep * average + (1.0 - keep) * now)


@triton.jit
def _solve_both(a11, a12, a22, b1, b2):
    """Solve x = A^+ b, after scaling A to unit diagonal; a zero on the diagonal leaves the other equation alone."""
    s1, s2 = tl.sqrt(tl.maximum(a11, 0.0)), tl.sqrt(tl.maximum(a22, 0.0))
    c = divide_or_zero(divide_or_zero(a12, s1), s2)
    y1, y2 = divide_or_zero(b1, s1), divide_or_zero(b2, s2)
    determinant = (1.0 - c) * (1.0 + c)
    parallel = determinant <= RANK_TOLERANCE
    t = tl.where(c < 0.0, -1.0, 1.0)  # rank one, [[1, t], [t, 1]]: its pseudo-inverse is a quarter of itself
    x1 = tl.where(parallel, 0.25 * (y1 + t * y2), divide_or_zero(y1 - c * y2, determinant))
    x2 = tl.where(parallel, 0.25 * (t * y1 + y2), divide_or_zero(y2 - c * y1, determinant))
    return divide_or_zero(x1, s1), divide_or_zero(x2, s2)


@triton.jit(do_not_specialize_on_alignment=["loss", "lr_tensor"])
def solve_kernel(
    scalars,  # [COUNT], float64
    loss,  # [1], of any dtype
    products,  # [5], float64
    dots,  # [3], float64, or None
    beta: tl.float64,
    rho: tl.float64,
    lr: tl.float64,
    lr_tensor,  # [1], of any dtype, or None
    theta: tl.float64,
    average: tl.float64,
    new,  # [COUNT], float64, written
    BETA_FIXED: tl.constexpr,
    RHO_FIXED: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """Write new scalars, by one program."""
    gz, zhz, gu = tl.load(products), tl.load(products + 1), tl.load(products + 2)
    zhu, uhu = tl.load(products + 3), tl.load(products + 4)
    lambd = tl.load(scalars + LAMBD)
    s = as_double(theta) * lambd  # Delta = u + s z
    zz = tl.load(scalars + Z_DOT_Z) if dots is None else tl.load(dots)
    # z = 0, as in the first step: Jz is zero, whatever rounding has made of it.
    moving = tl.where(zz == 0.0, 0.0, 1.0)
    gz, zhz, zhu = gz * moving, zhz * moving, zhu * moving
    if dots is None:
        zu, uu = gz + as_double(theta) * zhz, gu + as_double(theta) * zhu  # z.r = Jz.c, r.r = Jr.c
    else:
        zu, uu = tl.load(dots + 1), tl.load(dots + 2)
    rate = as_double(lr) if lr_tensor is None else tl.load(lr_tensor).to(tl.float64)

    delta_delta, delta_z = uu + 2.0 * s * zu + s * s * zz, zu + s * zz
    a11 = uhu + 2.0 * s * zhu + s * s * zhz + lambd * delta_delta
    a12 = zhu + s * zhz + lambd * delta_z
    a22 = zhz + lambd * zz
    b1, b2 = gu + s * gz, gz
    # A - lambda Gram / 2 is positive semi-definite for a loss that is convex in the outputs, with room for rounding.
    n11, n12, n22 = a11 - 0.5 * lambd * delta_delta, a12 - 0.5 * lambd * delta_z, a22 - 0.5 * lambd * zz
    steepest = divide_or_zero(b1, tl.maximum(tl.abs(a11), lambd * delta_delta))
    if BETA_FIXED and RHO_FIXED:
        x1, x2 = as_double(beta), -as_double(rho)
        safe = a11 != a11
    elif BETA_FIXED:
        x1, safe = as_double(beta), n22 < 0.0
        x2 = tl.where(safe, 0.0, divide_or_zero(b2 - a12 * x1, a22))
        if BOUNDED:
            x2 = _in_bounds(x2)
    elif RHO_FIXED:
        x2, safe = -as_double(rho), n11 < 0.0
        x1 = tl.where(safe, steepest, divide_or_zero(b1 - a12 * x2, a11))
    else:
        x1, x2 = _solve_both(a11, a12, a22, b1, b2)
        if BOUNDED:  # at a bound of rho the first row gives beta
            inside = _in_bounds(x2)
            x1, x2 = tl.where(x2 == inside, x1, divide_or_zero(b1 - a12 * inside, a11)), inside
        safe = (n11 < 0.0) | (n22 < 0.0) | (n12 * n12 > (1.0 + CONVEX_TOLERANCE) * n11 * n22)
        x1, x2 = tl.where(safe, steepest, x1), tl.where(safe, 0.0, x2)

    value = tl.load(loss).to(tl.float64)
    finite = is_finite(rate) & is_finite(value) & is_finite(x1) & is_finite(x2) & is_finite(zz) & is_finite(zu)
    finite = finite & is_finite(uu) & is_finite(gz) & is_finite(zhz) & is_finite(gu) & is_finite(zhu) & is_finite(uhu)

    # At most 1 - 1/n after n solves is kept, so that the start at zero is no bias.
    average_beta, average_rho = tl.load(scalars + AVERAGE_BETA), tl.load(scalars + AVERAGE_RHO)
    keep = tl.minimum(as_double(average), 1.0 - 1.0 / (tl.load(scalars + SOLVES) + 1.0))
    if not BETA_FIXED:
        x1 = _averaged(keep, average_beta, x1)
    if not RHO_FIXED:
        x2 = -_averaged(keep, average_rho, -x2)
    linear_term = x1 * b1 + x2 * b2
    # A safe step does not believe the curvature: it predicts as if its length were the minimizer's.
    quadratic_term = tl.where(safe, linear_term, x1 * x1 * a11 + 2.0 * x1 * x2 * a12 + x2 * x2 * a22)
    mean1, mean2 = x1, x2
    if not BETA_FIXED and not RHO_FIXED:  # where this batch's model climbs along averages, to its minimum on the way
        climbs = (keep > 0.0) & (safe == 0) & (quadratic_term > 2.0 * linear_term)
        factor = tl.where(climbs, divide_or_zero(tl.maximum(linear_term, 0.0), quadratic_term), 1.0)
        x1, x2, linear_term = factor * x1, factor * x2, factor * linear_term
        quadratic_term = factor * factor * quadratic_term

    index = tl.arange(0, BLOCK_SCALARS)
    values = tl.load(scalars + index, mask=index < COUNT)
    nan = as_double(float("nan"))  # by which the update leaves w and z alone
    values = tl.where(index == BETA, tl.where(finite, x1, nan), values)
    values = tl.where(index == RHO, tl.where(finite, -x2, nan), values)
    values = tl.where(index == LINEAR_TERM, tl.where(finite, linear_term, 0.0), values)
    values = tl.where(index == QUADRATIC_TERM, tl.where(finite, quadratic_term, 0.0), values)
    change = tl.where(finite, predicted_change(linear_term, quadratic_term, rate), 0.0)
    values = tl.where(index == PREDICTED_CHANGE, change, values)
    values = tl.where(index == LOSS, value, values)
    values += tl.where(index == SKIPPED_STEPS, tl.where(finite, 0.0, 1.0), 0.0)
    values += tl.where(index == SAFE_STEPS, tl.where(finite & safe, 1.0, 0.0), 0.0)
    values = tl.where(index == DIRECTION_DAMPING, s, values)
    values = tl.where(index == AVERAGE_BETA, tl.where(finite, mean1, average_beta), values)
    values = tl.where(index == AVERAGE_RHO, tl.where(finite, -mean2, average_rho), values)
    values += tl.where(index == SOLVES, tl.where(finite, 1.0, 0.0), 0.0)
    tl.store(new + index, values, mask=index < COUNT)


@torch.no_grad()
def solve(
    scalars: Tensor,
    loss: Tensor,
    products: Tensor,
    dots: Tensor | None,
    beta: float | None,
    rho: float | None,
    lr: float,
    lr_tensor: Tensor | None = None,
    theta: float = 1.0,
    average: float = 0.0,
    bounded: bool = False,
) -> Tensor:
    """Return new scalars, with β and ρ, as `reference.solve.solve` does; all tensors are on one device."""
    new = torch.empty_like(scalars)
    constants = dict(BETA_FIXED=beta is not None, RHO_FIXED=rho is not None, BOUNDED=bounded)
    with torch.cuda.device_of(scalars):
        solve_kernel[(1,)](
            scalars,
            loss,
            products,
            dots,
            beta or 0.0,
            rho or 0.0,
            lr,
            lr_tensor,
            theta,
            average,
            new,
            **constants,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return new
