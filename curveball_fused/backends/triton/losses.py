"""The loss operators in Triton: mean squared error and binary cross-entropy here, cross-entropy in a file of its own.

For a loss s Σ l(x, y) over independent elements, with g = s l' and H = s l'' (closed_form_losses has the formulas), the
first call gives c = g + H v and the sums of l, g v and H v²; the second those of g u, H v u and H u². Arithmetic is in
float32, or in float64 for float64. Sums are in float64, over a number of programs that follows from numel alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curveball_fused.backends.dtypes import compute_dtype

from .cross_entropy import cross_entropy_cotangent, cross_entropy_products
from .launch_tables import device_constants
from .reduce import TYPES, finish_cotangent, finish_products, reduce_vectors, zeros
from .scalar import as_double

__all__ = [
    "bce_cotangent",
    "bce_products",
    "cross_entropy_cotangent",
    "cross_entropy_products",
    "mse_cotangent",
    "mse_products",
]

BLOCK_MAIN = 2048  # elements at a time
BLOCK_TAIL = 256  # elements at a time of the rest
PROGRAMS = 1024  # at most
WARPS = 8


@triton.jit
def _derivatives(x, y, offsets, mask, weight, pos_weight, weights, pos_weights, BCE: tl.constexpr):
    """Return loss, gradient and curvature of each element."""
    if BCE:
        # k = 1 + (pos_weight - 1) y;  l = (1 - y) x + k softplus(-x),  l' = 1 - y - k σ(-x),  l'' = k σ(x) σ(-x)
        small = tl.exp(-tl.abs(x))
        larger = 1.0 / (1.0 + small)
        above, below = tl.where(x < 0.0, small * larger, larger), tl.where(x < 0.0, larger, small * larger)
        # log(1 + small), accurate for a small that 1 + small rounds: the relative error of the sum is divided out.
        rounded = 1.0 + small
        log = tl.where(rounded == 1.0, small, tl.log(rounded) * (small / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))
        k = 1.0
        if pos_weight is not None:
            k = 1.0 + (tl.load(pos_weight + offsets % pos_weights, mask) - 1.0) * y
        # softplus(-x) = max(-x, 0) + log: for y = 0 and x < 0 the maximum cancels x before the small log joins.
        loss = (1.0 - y) * x + k * tl.maximum(-x, 0.0) + k * log
        gradient, curvature = 1.0 - y - k * below, k * above * below
        if weight is not None:
            w = tl.load(weight + offsets % weights, mask)
            loss, gradient, curvature = w * loss, w * gradient, w * curvature
    else:
        difference = x - y
        loss, gradient, curvature = difference * difference, 2.0 * difference, tl.full(x.shape, 2.0, x.dtype)
    return loss, gradient, curvature


@triton.jit
def _terms(x, v, u, y, offsets, mask, weight, pos_weight, weights, pos_weights, c, scale, BCE, ACC):
    """Return l, g v and H v², and store c; or, where u is given, g u, H v u and H u². Zeros outside the mask."""
    x_value, y_value = tl.load(x + offsets, mask).to(ACC), tl.load(y + offsets, mask).to(ACC)
    v_value = tl.load(v + offsets, mask).to(ACC)
    loss, gradient, curvature = _derivatives(
        x_value, y_value, offsets, mask, weight, pos_weight, weights, pos_weights, BCE
    )
    if u is None:
        hv = curvature * v_value
        tl.store(c + offsets, (scale * (gradient + hv)).to(c.dtype.element_ty), mask)
        first, second, third = loss, gradient * v_value, hv * v_value
    else:
        u_value = tl.load(u + offsets, mask).to(ACC)
        hu = curvature * u_value
        first, second, third = gradient * u_value, hu * v_value, hu * u_value
    if mask is not None:
        first, second, third = tl.where(mask, first, 0.0), tl.where(mask, second, 0.0), tl.where(mask, third, 0.0)
    return first, second, third


@triton.jit(do_not_specialize=["n", "weights", "pos_weights"])
def loss_kernel(
    x,  # [n]
    v,  # [n]
    u,  # [n]; None in the first call
    y,  # [n]
    weight,  # [weights], of dtype ACC, or None
    pos_weight,  # [pos_weights], of dtype ACC, or None
    c,  # [n], written; None in the second call
    partials,  # [3, programs], float64, written
    divisor,  # [1], float64
    n,
    weights,
    pos_weights,
    sign: tl.float64,
    BCE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_MAIN: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Write c and sums: the first call of an operator where u is None, else the second."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    scale = (as_double(sign) / tl.load(divisor)).to(ACC)
    blocks = n // BLOCK_MAIN
    first, second, third = zeros(BLOCK_MAIN // VECTOR), zeros(BLOCK_MAIN // VECTOR), zeros(BLOCK_MAIN // VECTOR)
    for block in range(program, blocks, programs):  # without a mask, which makes every access 128 bits wide
        offsets = block * BLOCK_MAIN + tl.arange(0, BLOCK_MAIN)
        a, b, d = _terms(x, v, u, y, offsets, None, weight, pos_weight, weights, pos_weights, c, scale, BCE, ACC)
        first += reduce_vectors(a, BLOCK_MAIN, VECTOR)
        second += reduce_vectors(b, BLOCK_MAIN, VECTOR)
        third += reduce_vectors(d, BLOCK_MAIN, VECTOR)
    first_sum, second_sum, third_sum = tl.sum(first), tl.sum(second), tl.sum(third)
    first, second, third = zeros(BLOCK_TAIL), zeros(BLOCK_TAIL), zeros(BLOCK_TAIL)
    # What is left is less than a block, for the program whose turn it would be.
    for start in range(blocks * BLOCK_MAIN, tl.where(program == blocks % programs, n, 0), BLOCK_TAIL):
        offsets = start + tl.arange(0, BLOCK_TAIL).to(tl.int64)
        mask = offsets < n
        a, b, d = _terms(x, v, u, y, offsets, mask, weight, pos_weight, weights, pos_weights, c, scale, BCE, ACC)
        first, second, third = first + a.to(tl.float64), second + b.to(tl.float64), third + d.to(tl.float64)
    tl.store(partials + program, first_sum + tl.sum(first))
    tl.store(partials + programs + program, second_sum + tl.sum(second))
    tl.store(partials + 2 * programs + program, third_sum + tl.sum(third))


def _run(
    x: Tensor,
    v: Tensor,
    u: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    c: Tensor | None,
    divisor: Tensor,
    sign: float,
    bce: bool,
) -> Tensor:
    """Return partial sums [3, programs]."""
    programs = min(triton.cdiv(x.numel(), BLOCK_MAIN), PROGRAMS) or 1
    partials = x.new_empty((3, programs), dtype=torch.float64)
    loss_kernel[(programs,)](
        x,
        v,
        u,
        target,
        weight,
        pos_weight,
        c,
        partials,
        divisor,
        x.numel(),
        1 if weight is None else weight.numel(),
        1 if pos_weight is None else pos_weight.numel(),
        sign,
        BCE=bce,
        ACC=TYPES[compute_dtype(x.dtype)],
        BLOCK_MAIN=BLOCK_MAIN,
        BLOCK_TAIL=BLOCK_TAIL,
        VECTOR=16 // x.element_size(),
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return partials


def _divisor(x: Tensor, mean: bool) -> Tensor:
    return device_constants(x.device, float(x.numel()) if mean else 1.0)


@torch.no_grad()
def bce_cotangent(
    x: Tensor,
    v: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    mean: bool,
    sign: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, c = g + H v and `[g·v, v·Hv]` of binary cross-entropy with logits x; all tensors are contiguous.

    Args:
        x: logits.
        v: tangent of x, like it.
        target: like x.
        weight: None or of the arithmetic's dtype, its numel a divisor of x's: element i uses entry i % numel.
        pos_weight: likewise.
        mean: whether the loss is a mean, else a sum.
        sign: multiplies g and H, not the loss.

    Returns:
        Loss, 0-dim float64; c, like x; products, float64.
    """
    c = torch.empty_like(x)
    with torch.cuda.device_of(x):
        divisor = _divisor(x, mean)
        partials = _run(x, v, None, target, weight, pos_weight, c, divisor, sign, bce=True)
        loss, products = finish_cotangent(partials, divisor, sign)
    return loss, c, products


@torch.no_grad()
def bce_products(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    products: Tensor,
    mean: bool,
    sign: float,
) -> Tensor:
    """Return float64 `[*products, g·u, v·Hu, u·Hu]` for the arguments of `bce_cotangent`."""
    with torch.cuda.device_of(x):
        divisor = _divisor(x, mean)
        partials = _run(x, v, u, target, weight, pos_weight, None, divisor, sign, bce=True)
        return finish_products(partials, divisor, sign, products)


@torch.no_grad()
def mse_cotangent(x: Tensor, v: Tensor, target: Tensor, mean: bool, sign: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, c = g + H v and `[g·v, v·Hv]` of the squared error of x.

    Args:
        x: outputs, contiguous, as all tensors.
        v: tangent of x, like it.
        target: like x.
        mean: whether the loss is a mean, else a sum.
        sign: multiplies g and H, not the loss.

    Returns:
        Loss, 0-dim float64; c, like x; products, float64.
    """
    c = torch.empty_like(x)
    with torch.cuda.device_of(x):
        divisor = _divisor(x, mean)
        partials = _run(x, v, None, target, None, None, c, divisor, sign, bce=False)
        loss, products = finish_cotangent(partials, divisor, sign)
    return loss, c, products


@torch.no_grad()
def mse_products(x: Tensor, v: Tensor, u: Tensor, target: Tensor, products: Tensor, mean: bool, sign: float) -> Tensor:
    """Return float64 `[*products, g·u, v·Hu, u·Hu]` for the arguments of `mse_cotangent`."""
    with torch.cuda.device_of(x):
        divisor = _divisor(x, mean)
        partials = _run(x, v, u, target, None, None, None, divisor, sign, bce=False)
        return finish_products(partials, divisor, sign, products)
