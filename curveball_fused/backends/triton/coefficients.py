"""The kernel of a step between solves in Triton, which `reference.coefficients` and csrc/formulas.h specify.

One program, in float64. Parameters of type float64 reach a kernel exactly (others would be rounded to float32).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scalar import as_double, is_finite
from .solve import AVERAGE_BETA, AVERAGE_RHO, BETA, BLOCK_SCALARS, COUNT, LOSS, RHO, SKIPPED_STEPS


@triton.jit(do_not_specialize_on_alignment=["loss", "slope", "room"])
def keep_coefficients_kernel(
    scalars,  # [COUNT], float64
    loss,  # [1], of any dtype
    slope,  # [1], float64
    room,  # [1], of any dtype, or None
    sign: tl.float64,
    new,  # [COUNT], float64, written
):
    """Write new scalars, by one program."""
    value, fall = as_double(sign) * tl.load(loss).to(tl.float64), tl.load(slope)
    beta, rho = tl.load(scalars + AVERAGE_BETA), tl.load(scalars + AVERAGE_RHO)
    if room is not None:
        most = tl.load(room).to(tl.float64)
        beta = tl.where(beta * fall > most, most / tl.where(fall == 0.0, 1.0, fall), beta)
    finite = is_finite(value + fall)
    nan = as_double(float("nan"))  # by which the update leaves w and z alone
    index = tl.arange(0, BLOCK_SCALARS)
    values = tl.load(scalars + index, mask=index < COUNT)
    values = tl.where(index == BETA, tl.where(finite, beta, nan), values)
    values = tl.where(index == RHO, tl.where(finite, rho, nan), values)
    values = tl.where(index == LOSS, value, values)
    values += tl.where(index == SKIPPED_STEPS, tl.where(finite, 0.0, 1.0), 0.0)
    tl.store(new + index, values, mask=index < COUNT)


@torch.no_grad()
def keep_coefficients(scalars: Tensor, loss: Tensor, slope: Tensor, room: Tensor | None, sign: float) -> Tensor:
    """Return new scalars, with β and ρ, as `reference.coefficients` does; all tensors are on one device."""
    new = torch.empty_like(scalars)
    with torch.cuda.device_of(scalars):
        keep_coefficients_kernel[(1,)](scalars, loss, slope, room, sign, new, num_warps=1, enable_fp_fusion=False)
    return new
