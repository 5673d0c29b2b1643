"""Cross-entropy in Triton: the operators; `cross_entropy_kernels` has the formulas."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from curveball_fused.backends.dtypes import compute_dtype

from .cross_entropy_kernels import cotangent_kernel, products_kernel
from .reduce import TYPES, finish_cotangent, finish_products
from .row_blocks import DIVISORS, divisor_kernel

SHORT = 256  # classes of a row that is read in one piece
BLOCK_TILE = 512  # elements of a tile of short rows
PROGRAMS = 4096  # at most


def shape_of(classes: int, bytes: int) -> dict[str, int]:
    """Return rows of a tile, elements of a main block (a 128-bit vector a thread) and of an edge block, and warps."""
    if classes <= SHORT:
        edge = triton.next_power_of_2(classes)
        return dict(ROWS=BLOCK_TILE // edge, BLOCK_MAIN=edge, BLOCK_EDGE=edge, num_warps=4)
    warps = 2 if classes <= 4096 else 4 if classes <= 16384 else 8
    return dict(ROWS=1, BLOCK_MAIN=512 * warps // bytes, BLOCK_EDGE=64 * warps, num_warps=warps)


def _run(
    kernel: Any,
    operands: tuple[Tensor, ...],
    target: Tensor,
    weight: Tensor | None,
    outputs: tuple[Tensor, ...],
    ignore_index: int,
    mean: bool,
    label_smoothing: float,
    *sign: float,
) -> tuple[Tensor, Tensor]:
    """Return partial sums [3, programs] and D, which the kernel computes on the way."""
    (n, classes), x = operands[0].shape, operands[0]
    sizes, types = (n, classes, ignore_index), dict(ACC=TYPES[compute_dtype(x.dtype)], enable_fp_fusion=True)
    shape = shape_of(classes, x.element_size())
    programs = min(triton.cdiv(n, shape["ROWS"]), PROGRAMS) or 1
    partials = x.new_empty((3, programs), dtype=torch.float64)
    divisor, divisors = partials.new_empty(()), partials.new_empty(DIVISORS.value) if mean else None
    if mean:
        divisor_kernel[(DIVISORS.value,)](target, weight, divisors, *sizes, BLOCK=1024, num_warps=4, **types)
    kernel[(programs,)](
        *operands,
        target,
        weight,
        *outputs,
        divisors,
        divisor,
        partials,
        *sizes,
        label_smoothing,
        *sign,
        SMOOTH=label_smoothing != 0,
        **shape,
        **types,
    )
    return partials, divisor


@torch.no_grad()
def cross_entropy_cotangent(
    x: Tensor,
    v: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    mean: bool,
    label_smoothing: float,
    sign: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, c = g + H v and `[g·v', v'·Hv']` of the cross-entropy of logits x; all tensors are contiguous.

    Args:
        x: logits, `[N, C]`.
        v: tangent of x, like it.
        target: classes, int64 `[N]`.
        weight: of the classes, `[C]`, of the arithmetic's dtype, or None for ones.
        ignore_index: the target of rows that do not count.
        mean: whether the loss is divided by D, the sum of the targets' weights.
        label_smoothing: ε.
        sign: multiplies g and H, not the loss.

    Returns:
        Loss, 0-dim float64; c, like x, 0 in rows whose target is ignored; products, float64; row_stats for the second
        call, `[N, 3]`, of the arithmetic's dtype: log Σ exp x, <p, v> and s/D. A target that is neither a class nor
        `ignore_index` makes the loss and its row of c NaN, and so does D = 0 the loss.
    """
    c, row_stats = torch.empty_like(x), x.new_empty((x.shape[0], 3), dtype=compute_dtype(x.dtype))
    with torch.cuda.device_of(x):
        partials, divisor = _run(
            cotangent_kernel, (x, v), target, weight, (c, row_stats), ignore_index, mean, label_smoothing, sign
        )
        loss, products = finish_cotangent(partials, divisor, sign)
    return loss, c, products, row_stats


@torch.no_grad()
def cross_entropy_products(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_stats: Tensor,
    products: Tensor,
    ignore_index: int,
    mean: bool,
    label_smoothing: float,
    sign: float,
) -> Tensor:
    """Return float64 `[*products, g·u', v'·Hu', u'·Hu']`; row_stats and products are `cross_entropy_cotangent`'s."""
    with torch.cuda.device_of(x):
        partials, divisor = _run(
            products_kernel, (x, v, u), target, weight, (row_stats,), ignore_index, mean, label_smoothing
        )
        return finish_products(partials, divisor, sign, products)
