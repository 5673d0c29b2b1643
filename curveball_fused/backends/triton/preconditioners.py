"""Adam's diagonal in Triton: `precondition_`, as `reference.preconditioners` specifies it, in the manner of `dots`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_tables import list_items, plan
from .parameters import WARPS, aligned, at, main_elements, run
from .reduce import SUM_BLOCK, reduce_vectors, sum_rows_kernel, zeros
from .scalar import as_double, is_finite
from .solve import BETA, RHO

THREADS = tl.constexpr(32 * WARPS)


def block_main(v: torch.dtype, r: torch.dtype) -> int:
    """Return how many elements a program works on at a time: 16 bytes of the narrower operand for each thread.

    No more than two float64 numbers, though: their arithmetic takes many registers.
    """
    return 32 * WARPS * 16 // (8 if v == torch.float64 else r.itemsize)


@triton.jit
def _precondition(u, v, r, z, offsets, mask, keep, take, scale, eps, moves, HAS_Z: tl.constexpr):
    """Write u and, if `moves`, v; return the terms of z·Pz, z·r and r·u, float64. `mask` and `moves` may be None."""
    # What is nearly subnormal becomes zero, as in csrc/formulas.h.
    tiny: tl.constexpr = 2.0**-1022 if v.dtype.element_ty == tl.float64 else 2.0**-126
    negligible: tl.constexpr = 2.0**-970 if v.dtype.element_ty == tl.float64 else 2.0**-103
    v_old = tl.load(v + offsets, mask)
    r_value = tl.load(r + offsets, mask).to(v_old.dtype)
    v_new = keep * v_old + take * (r_value * r_value)
    v_new = tl.where(v_new < tiny, 0.0, v_new)
    p = scale * tl.sqrt(v_new) + eps
    # v - v is NaN where v is not finite: u would be zero there.
    u_new = r_value / p + (v_new - v_new)
    u_new = tl.where(tl.abs(u_new) < negligible, 0.0, u_new)
    r_double = r_value.to(tl.float64)
    ru = r_double * u_new.to(tl.float64)
    zpz, zr = ru, ru
    if HAS_Z:
        z_value = tl.load(z + offsets, mask).to(tl.float64)
        zpz, zr = z_value * z_value * p.to(tl.float64), z_value * r_double
    tl.store(u + offsets, u_new, mask)
    if moves is not None:
        tl.store(v + offsets, tl.where(moves, v_new, v_old), mask)
    return zpz, zr, ru


# As for update_kernel: nothing about scalars is worth compiling again for.
@triton.jit(do_not_specialize=["tensors", "slots"], do_not_specialize_on_alignment=["weight", "scalars"])
def precondition_kernel(
    table,  # int64, see `launch_tables.Launch`
    tensors,
    weight,  # [1], float64
    decay: tl.float64,
    eps: tl.float64,
    scalars,  # float64, β and ρ first, or None
    partials,  # [3, slots], float64, written
    slots,
    U: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    Z: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_MAIN: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    HAS_Z: tl.constexpr,
):
    """Do a chunk: v' = decay v + (1 - decay) r²;  p = sqrt(v' / weight) + eps;  u <- r / p;  and write its sums."""
    program = tl.program_id(0).to(tl.int64)
    entry = table + tl.load(table + 8 * tensors + program)
    u_address, v_address = tl.load(entry), tl.load(entry + tensors)
    r_address, z_address = tl.load(entry + 2 * tensors), tl.load(entry + 3 * tensors)
    numel = tl.load(entry + 4 * tensors)
    chunk = program - tl.load(entry + 6 * tensors)
    slot = partials + tl.load(entry + 7 * tensors) + chunk

    # Formed in float64 and rounded once.
    keep, take = as_double(decay).to(V), (1.0 - as_double(decay)).to(V)
    scale, epsilon = (1.0 / tl.sqrt(tl.load(weight))).to(V), as_double(eps).to(V)
    moves = None if scalars is None else is_finite(tl.load(scalars + BETA)) & is_finite(tl.load(scalars + RHO))

    begin = chunk * CHUNK
    count = tl.minimum(numel - begin, CHUNK)
    main = main_elements(count, u_address | v_address | r_address | z_address, BLOCK_MAIN)
    VECTOR: tl.constexpr = BLOCK_MAIN // THREADS
    zpz, zr, ru = zeros(BLOCK_MAIN // VECTOR), zeros(BLOCK_MAIN // VECTOR), zeros(BLOCK_MAIN // VECTOR)
    for start in range(0, main, BLOCK_MAIN):
        u, v = aligned(u_address, begin, U), aligned(v_address, begin, V)
        r, z = aligned(r_address, begin, R), aligned(z_address, begin, Z)
        offsets = start + tl.arange(0, BLOCK_MAIN)
        a, b, c = _precondition(u, v, r, z, offsets, None, keep, take, scale, epsilon, moves, HAS_Z)
        if HAS_Z:
            zpz += reduce_vectors(a, BLOCK_MAIN, VECTOR)
            zr += reduce_vectors(b, BLOCK_MAIN, VECTOR)
        ru += reduce_vectors(c, BLOCK_MAIN, VECTOR)
    zpz_sum, zr_sum, ru_sum = tl.sum(zpz), tl.sum(zr), tl.sum(ru)
    zpz, zr, ru = zeros(BLOCK_TAIL), zeros(BLOCK_TAIL), zeros(BLOCK_TAIL)
    for start in range(main, count, BLOCK_TAIL):
        u, v, r, z = at(u_address, begin, U), at(v_address, begin, V), at(r_address, begin, R), at(z_address, begin, Z)
        offsets = start + tl.arange(0, BLOCK_TAIL)
        mask = offsets < count
        a, b, c = _precondition(u, v, r, z, offsets, mask, keep, take, scale, epsilon, moves, HAS_Z)
        if HAS_Z:
            zpz += tl.where(mask, a, 0.0)
            zr += tl.where(mask, b, 0.0)
        ru += tl.where(mask, c, 0.0)
    tl.store(slot, zpz_sum + tl.sum(zpz))
    tl.store(slot + slots, zr_sum + tl.sum(zr))
    tl.store(slot + 2 * slots, ru_sum + tl.sum(ru))


@torch.no_grad()
def precondition_(
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    r: Sequence[Tensor],
    z: Sequence[Tensor],
    weight: Tensor,
    decay: float,
    eps: float,
    scalars: Tensor | None = None,
) -> Tensor:
    """Do what `reference.preconditioners` says, in one launch for each combination of dtypes and one more.

    Args:
        u: written, laid out as v, in its dtype; may be r itself.
        v: float32 or float64, dense; written only with `scalars`.
        r: in the dtype of v, float16 or bfloat16, laid out as v.
        z: as u; or none.
        weight: 1 - decayᵗ, 0-dim float64.
        decay: of the average v.
        eps: ε.
        scalars: float64, β and ρ first, on the device, or None.

    Returns:
        Float64 `[z·Pz, z·r, r·u]`.

    Raises:
        RuntimeError: dtypes do not fit together, or a tensor is on another device.
    """
    for u_i, v_i, r_i, z_i in zip(u, v, r, z or u, strict=True):
        fits = v_i.dtype in (torch.float32, torch.float64) and u_i.dtype == z_i.dtype == v_i.dtype
        if not fits or r_i.dtype not in (v_i.dtype, torch.float16, torch.bfloat16):
            raise RuntimeError(
                f"u has dtype {u_i.dtype}, r {r_i.dtype} and z {z_i.dtype} beside a v of {v_i.dtype}: convert v to "
                "float32 or float64, u and z to the same, and r to that, float16 or bfloat16."
            )
    with torch.cuda.device_of(weight):
        # v in the place of a z that is not there: its address is not read.
        work = plan(weight.device, list_items(weight.device, (u, v, r, z or v), [len(v)]), 1)
        partials, result = weight.new_empty((3, work.slots)), weight.new_empty(3)
        for launch in work.launches:
            _, v_dtype, r_dtype, _ = launch.dtypes
            constants = dict(BLOCK_MAIN=block_main(v_dtype, r_dtype), HAS_Z=len(z) > 0)
            run(precondition_kernel, launch, weight, decay, eps, scalars, partials, work.slots, **constants)
        sum_rows_kernel[(3,)](partials, work.slots, result, BLOCK=SUM_BLOCK, num_warps=WARPS, enable_fp_fusion=False)
    return result
