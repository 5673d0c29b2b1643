"""Cross-entropy in Triton: `cross_entropy_cotangent` and `cross_entropy_products`."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .cross_entropy_kernels import dots_kernel, products_kernel
from .reduce import TYPES, arithmetic, finish_dots, finish_products
from .row_blocks import DIVISORS, divisor_kernel

SHORT = 256  # classes of a row that is read in one piece
TILE = 512  # elements of a tile of short rows
PROGRAMS = 4096  # at most


def shape_of(classes: int, bytes: int) -> dict[str, int]:
    """Rows of a tile, elements of a block of the body (a 128-bit vector a thread) and of the edges, and warps."""
    if classes <= SHORT:
        edge = triton.next_power_of_2(classes)
        return dict(ROWS=TILE // edge, BODY=edge, EDGE=edge, num_warps=4)
    warps = 2 if classes <= 4096 else 4 if classes <= 16384 else 8
    return dict(ROWS=1, BODY=512 * warps // bytes, EDGE=64 * warps, num_warps=warps)


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
    """Partial sums [3, programs] and D, which the kernel computes on the way."""
    (n, classes), x = operands[0].shape, operands[0]
    sizes, types = (n, classes, ignore_index), dict(A=TYPES[arithmetic(x)], enable_fp_fusion=True)
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
    """Cross-entropy of logits x [N, C] with int64 targets [N], and its products with a tangent v [N, C].

    `weight` is None or [C], of the arithmetic's dtype: float64 for float64 x, else float32. `sign` multiplies g and H,
    not the loss. All tensors contiguous.

    Returns:
        loss, 0-dim float64; c = g + H v, like x, 0 in rows whose target is ignored; float64 `[g·v', v'·Hv']`; for the
        second call [N, 3], of the arithmetic's dtype: log Σ exp x, <p, v> and s/D. A target that is neither a class
        nor `ignore_index` makes the loss and its row of c NaN, and so does D = 0 the loss.
    """
    c, rows = torch.empty_like(x), x.new_empty((x.shape[0], 3), dtype=arithmetic(x))
    with torch.cuda.device_of(x):
        partials, divisor = _run(
            products_kernel, (x, v), target, weight, (c, rows), ignore_index, mean, label_smoothing, sign
        )
        loss, products = finish_products(partials, divisor, sign)
    return loss, c, products, rows


@torch.no_grad()
def cross_entropy_products(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    target: Tensor,
    weight: Tensor | None,
    rows: Tensor,
    products: Tensor,
    ignore_index: int,
    mean: bool,
    label_smoothing: float,
    sign: float,
) -> Tensor:
    """Return float64 `[*products, g·u', v'·Hu', u'·Hu']`; rows and products are those of `cross_entropy_cotangent`."""
    with torch.cuda.device_of(x):
        partials, divisor = _run(dots_kernel, (x, v, u), target, weight, (rows,), ignore_index, mean, label_smoothing)
        return finish_dots(partials, divisor, sign, products)
