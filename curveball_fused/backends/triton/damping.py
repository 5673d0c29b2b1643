"""The kernel that adapts the damping in Triton, which `reference.damping` and csrc/formulas.h specify.

One program, in float64. Parameters of type float64 reach a kernel exactly (others would be rounded to float32).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scalar import as_double, is_finite
from .solve import BETA, BLOCK_SCALARS, COUNT, LAMBD, LOSS, PREDICTED_CHANGE, RATIO


@triton.jit(do_not_specialize_on_alignment=["new_loss"])
def adapt_damping_kernel(
    scalars,  # [COUNT], float64
    new_loss,  # [1], of any dtype
    low: tl.float64,
    high: tl.float64,
    factor: tl.float64,
    minimum: tl.float64,
    maximum: tl.float64,
    new,  # [COUNT], float64, written
):
    """Write new scalars, by one program."""
    lambd, change = tl.load(scalars + LAMBD), tl.load(scalars + PREDICTED_CHANGE)
    value = tl.load(new_loss).to(tl.float64)
    ratio = (value - tl.load(scalars + LOSS)) / tl.where(change == 0.0, 1.0, change)
    # A ratio that is not a number counts as too low, and so does a step that the model itself expected to climb.
    good = is_finite(value) & (ratio >= as_double(low)) & (change <= 0.0)
    lowered = tl.where(ratio > as_double(high), lambd * as_double(factor), lambd)
    adapted = tl.where(good, lowered, lambd / as_double(factor))
    adapted = tl.where(adapted < as_double(minimum), as_double(minimum), adapted)
    adapted = tl.where(adapted > as_double(maximum), as_double(maximum), adapted)
    # A skipped step, or one that predicts nothing, teaches nothing.
    valid = is_finite(tl.load(scalars + BETA)) & (change != 0.0)
    index = tl.arange(0, BLOCK_SCALARS)
    values = tl.load(scalars + index, mask=index < COUNT)
    values = tl.where(index == LAMBD, tl.where(valid, adapted, lambd), values)
    values = tl.where(index == RATIO, tl.where(valid, ratio, tl.load(scalars + RATIO)), values)
    tl.store(new + index, values, mask=index < COUNT)


@torch.no_grad()
def adapt_damping(
    scalars: Tensor, new_loss: Tensor, low: float, high: float, factor: float, minimum: float, maximum: float
) -> Tensor:
    """Return new scalars, with λ and γ, as `reference.damping.adapt_damping` does; all tensors are on one device."""
    new = torch.empty_like(scalars)
    with torch.cuda.device_of(scalars):
        adapt_damping_kernel[(1,)](
            scalars, new_loss, low, high, factor, minimum, maximum, new, num_warps=1, enable_fp_fusion=False
        )
    return new
