"""The kernels over lists of tensors in Triton: `update_` and `dots`, as `reference.parameters` specifies them.

Every program writes its sums, in float64, to slots of its own (see `launch_tables`), and one last program adds up the
slots in their order: the bits depend on neither timing nor device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from curveball_fused.backends.dtypes import compute_dtype

from .coefficients import keep_coefficients
from .damping import adapt_damping
from .launch_tables import CHUNK, Launch, device_constants, list_items, plan
from .reduce import SUM_BLOCK, TYPES, reduce_vectors, sum_partials, sum_rows_kernel, zeros
from .scalar import as_double, divide_or_zero, is_finite
from .solve import (
    BETA,
    BLOCK_SCALARS,
    COUNT,
    DIRECTION_DAMPING,
    LINEAR_TERM,
    PREDICTED_CHANGE,
    QUADRATIC_TERM,
    RHO,
    Z_DOT_Z,
    predicted_change,
    solve,
)

__all__ = ["adapt_damping", "dots", "keep_coefficients", "solve", "update_"]

BLOCK_MAIN = 2048  # elements at a time: with 8 warps, two 128-bit loads of float32 in flight an operand and thread
BLOCK_TAIL = 512  # elements at a time where accesses may be unaligned or short
WARPS = 8


@triton.jit
def main_elements(count, addresses, BLOCK_MAIN: tl.constexpr):
    """Return how many elements of a chunk are whole blocks at aligned addresses."""
    # They are accessed without a mask, which makes every access 128 bits wide.
    return tl.where(addresses % 16 == 0, count // BLOCK_MAIN * BLOCK_MAIN, 0)


@triton.jit
def at(address, begin, TYPE: tl.constexpr):
    """Return a pointer to an element, as a table holds addresses."""
    return address.to(tl.pointer_type(TYPE)) + begin


@triton.jit
def aligned(address, begin, TYPE: tl.constexpr):
    """Return the same, where that is at a multiple of 16 bytes, as the compiler is told."""
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)) + begin, 16)


@triton.jit
def _move(w, z, r, offsets, mask, keep, beta, shrink, lr, finite):
    """Update z and w, unless beta or rho is not finite, and return the squares of z; `mask` may be None."""
    # z that is nearly subnormal becomes zero, as in csrc/formulas.h.
    negligible: tl.constexpr = 2.0**-970 if z.dtype.element_ty == tl.float64 else 2.0**-103
    w_old, z_old, r_value = tl.load(w + offsets, mask), tl.load(z + offsets, mask), tl.load(r + offsets, mask)
    z_new = keep * z_old - beta * r_value.to(z_old.dtype)
    z_new = tl.where(finite, tl.where(tl.abs(z_new) < negligible, 0.0, z_new), z_old)
    w_new = tl.where(finite, (shrink * w_old.to(z_old.dtype) + lr * z_new).to(w_old.dtype), w_old)
    tl.store(w + offsets, w_new, mask)
    tl.store(z + offsets, z_new, mask)
    z_new = z_new.to(tl.float64)
    return z_new * z_new


# Not specialized on the alignment of scalars, which would only make for compiling again in the midst of a training.
@triton.jit(do_not_specialize=["tensors"], do_not_specialize_on_alignment=["lr", "weight_decay"])
def update_kernel(
    table,  # int64, see `launch_tables.Launch`
    tensors,
    scalars,  # [COUNT], float64
    lr,  # [groups], of any dtype
    weight_decay,  # [groups], float64
    partials,  # [slots], float64, written: sums of z²
    W: tl.constexpr,
    Z: tl.constexpr,
    R: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_MAIN: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    """Update a chunk: z <- (rho - beta s) z - beta r;  w <- (1 - lr weight_decay) w + lr z."""
    program = tl.program_id(0).to(tl.int64)
    entry = table + tl.load(table + 7 * tensors + program)
    w_address, z_address, r_address = tl.load(entry), tl.load(entry + tensors), tl.load(entry + 2 * tensors)
    numel, group = tl.load(entry + 3 * tensors), tl.load(entry + 4 * tensors)
    chunk = program - tl.load(entry + 5 * tensors)
    slot = tl.load(entry + 6 * tensors) + chunk

    # The factors are formed in float64 and rounded once, so that float32 does not see the cancellation in them.
    beta, rho = tl.load(scalars + BETA), tl.load(scalars + RHO)
    direction_damping = tl.load(scalars + DIRECTION_DAMPING)
    finite = is_finite(beta) & is_finite(rho)
    rate = tl.load(lr + group).to(tl.float64)
    keep, shrink = (rho - beta * direction_damping).to(Z), (1.0 - rate * tl.load(weight_decay + group)).to(Z)
    beta, rate = beta.to(Z), rate.to(Z)

    begin = chunk * CHUNK
    count = tl.minimum(numel - begin, CHUNK)
    main = main_elements(count, w_address | z_address | r_address, BLOCK_MAIN)
    squares = zeros(BLOCK_MAIN)
    for start in range(0, main, BLOCK_MAIN):
        w, z, r = aligned(w_address, begin, W), aligned(z_address, begin, Z), aligned(r_address, begin, R)
        offsets = start + tl.arange(0, BLOCK_MAIN)
        squares += _move(w, z, r, offsets, None, keep, beta, shrink, rate, finite)
    rest = zeros(BLOCK_TAIL)
    for start in range(main, count, BLOCK_TAIL):
        w, z, r = at(w_address, begin, W), at(z_address, begin, Z), at(r_address, begin, R)
        offsets = start + tl.arange(0, BLOCK_TAIL)
        more = _move(w, z, r, offsets, offsets < count, keep, beta, shrink, rate, finite)
        rest += tl.where(offsets < count, more, 0.0)
    tl.store(partials + slot, tl.sum(squares) + tl.sum(rest))


@triton.jit(do_not_specialize=["groups"], do_not_specialize_on_alignment=["lr"])
def finish_update_kernel(
    scalars,  # [COUNT], float64
    partials,  # [slots], float64
    bounds,  # [groups + 1], int64: group g has the slots from bounds[g] to bounds[g + 1]
    lr,  # [groups], of any dtype
    groups,
    new,  # [COUNT], float64, written
    BLOCK: tl.constexpr,
):
    """Write new scalars: z.z, and for groups of unequal rates the predicted change."""
    total, moved = as_double(0.0), as_double(0.0)
    first = tl.load(lr).to(tl.float64)
    unequal = 0
    for group in range(groups):
        rate = tl.load(lr + group).to(tl.float64)
        squares = sum_partials(partials, tl.load(bounds + group), tl.load(bounds + group + 1), BLOCK)
        total += squares
        moved += rate * squares
        unequal += (rate != first).to(tl.int32)
    index = tl.arange(0, BLOCK_SCALARS)
    values = tl.load(scalars + index, mask=index < COUNT)
    # The step is lr_g z in group g; its projection on z is the step of the one lr that the model sees.
    change = predicted_change(
        tl.load(scalars + LINEAR_TERM), tl.load(scalars + QUADRATIC_TERM), divide_or_zero(moved, total)
    )
    values = tl.where(index == Z_DOT_Z, total, values)
    values = tl.where((index == PREDICTED_CHANGE) & (unequal > 0), change, values)
    tl.store(new + index, values, mask=index < COUNT)


@triton.jit(do_not_specialize=["tensors", "slots"])
def dots_kernel(
    table,  # int64, see `launch_tables.Launch`
    tensors,
    partials,  # [3, slots], float64, written
    slots,
    Z: tl.constexpr,
    R: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_MAIN: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    """Write z.z, z.r and r.r of a chunk."""
    program = tl.program_id(0).to(tl.int64)
    entry = table + tl.load(table + 6 * tensors + program)
    z_address, r_address, numel = tl.load(entry), tl.load(entry + tensors), tl.load(entry + 2 * tensors)
    chunk = program - tl.load(entry + 4 * tensors)
    slot = partials + tl.load(entry + 5 * tensors) + chunk

    begin = chunk * CHUNK
    count = tl.minimum(numel - begin, CHUNK)
    main = main_elements(count, z_address | r_address, BLOCK_MAIN)
    VECTOR: tl.constexpr = 128 // Z.primitive_bitwidth
    zz, zr, rr = zeros(BLOCK_MAIN // VECTOR), zeros(BLOCK_MAIN // VECTOR), zeros(BLOCK_MAIN // VECTOR)
    for start in range(0, main, BLOCK_MAIN):
        offsets = start + tl.arange(0, BLOCK_MAIN)
        z = tl.load(aligned(z_address, begin, Z) + offsets).to(tl.float64)
        r = tl.load(aligned(r_address, begin, R) + offsets).to(tl.float64)
        zz += reduce_vectors(z * z, BLOCK_MAIN, VECTOR)
        zr += reduce_vectors(z * r, BLOCK_MAIN, VECTOR)
        rr += reduce_vectors(r * r, BLOCK_MAIN, VECTOR)
    zz_sum, zr_sum, rr_sum = tl.sum(zz), tl.sum(zr), tl.sum(rr)
    zz, zr, rr = zeros(BLOCK_TAIL), zeros(BLOCK_TAIL), zeros(BLOCK_TAIL)
    for start in range(main, count, BLOCK_TAIL):
        offsets = start + tl.arange(0, BLOCK_TAIL)
        z = tl.load(at(z_address, begin, Z) + offsets, offsets < count, other=0.0).to(tl.float64)
        r = tl.load(at(r_address, begin, R) + offsets, offsets < count, other=0.0).to(tl.float64)
        zz, zr, rr = zz + z * z, zr + z * r, rr + r * r
    tl.store(slot, zz_sum + tl.sum(zz))
    tl.store(slot + slots, zr_sum + tl.sum(zr))
    tl.store(slot + 2 * slots, rr_sum + tl.sum(rr))


@torch.no_grad()
def update_(
    params: Sequence[Tensor],
    z: Sequence[Tensor],
    r: Sequence[Tensor],
    scalars: Tensor,
    group_sizes: Sequence[int],
    lr: Sequence[float],
    weight_decay: Sequence[float],
    lr_tensor: Tensor | None = None,
) -> Tensor:
    """Update w and z as `reference.parameters.update_` does, in one launch for each combination of dtypes and one more.

    Args:
        params: w, dense.
        z: state, float64 for float64 parameters, else float32; index by index laid out as w.
        r: Jᵀc, in the dtype of w or z, laid out as w.
        scalars: float64, the values named by `SCALARS`; not changed.
        group_sizes: how many tensors belong to each group.
        lr: rate of each group.
        weight_decay: decay of each group.
        lr_tensor: rates in the place of `lr`, on the device, of any dtype, or None.

    Returns:
        New scalars.

    Raises:
        RuntimeError: dtypes do not fit together, or are none of floating point, or a tensor is on another device.
    """
    for w_i, z_i, r_i in zip(params, z, r, strict=True):
        wanted = compute_dtype(w_i.dtype)
        if z_i.dtype != wanted or r_i.dtype not in (w_i.dtype, wanted):
            raise RuntimeError(
                f"z has dtype {z_i.dtype} and r {r_i.dtype} beside a {w_i.dtype} parameter: convert z to {wanted}, and "
                "r to that or to the parameter's dtype."
            )
    with torch.cuda.device_of(scalars):
        work = plan(scalars.device, list_items(scalars.device, (params, z, r), group_sizes), len(group_sizes))
        settings = device_constants(scalars.device, *lr, *weight_decay)
        rates, decays = settings if lr_tensor is None else lr_tensor, settings[len(group_sizes) :]
        partials, new = scalars.new_empty(work.slots), torch.empty_like(scalars)
        for launch in work.launches:
            run(update_kernel, launch, scalars, rates, decays, partials)
        finish_update_kernel[(1,)](
            scalars,
            partials,
            work.bounds,
            rates,
            len(group_sizes),
            new,
            BLOCK=SUM_BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return new


@torch.no_grad()
def dots(z: Sequence[Tensor], r: Sequence[Tensor]) -> Tensor:
    """Return float64 `[z·z, z·r, r·r]`, in one launch for each combination of dtypes and one more."""
    with torch.cuda.device_of(z[0]):
        work = plan(z[0].device, list_items(z[0].device, (z, r), [len(z)]), 1)
        partials, result = (z[0].new_empty(shape, dtype=torch.float64) for shape in ((3, work.slots), (3,)))
        for launch in work.launches:
            run(dots_kernel, launch, partials, work.slots)
        sum_rows_kernel[(3,)](partials, work.slots, result, BLOCK=SUM_BLOCK, num_warps=WARPS, enable_fp_fusion=False)
    return result


def run(kernel: Any, launch: Launch, *arguments: Any, **constants: Any) -> None:
    """Run one launch of a kernel over lists."""
    types = (TYPES[dtype] for dtype in launch.dtypes)
    kernel[(launch.programs,)](
        launch.table,
        launch.tensors,
        *arguments,
        *types,
        **(dict(CHUNK=CHUNK, BLOCK_MAIN=BLOCK_MAIN, BLOCK_TAIL=BLOCK_TAIL) | constants),
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
