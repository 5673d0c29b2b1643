"""The preconditioners in plain torch: the specification, and the backend that works everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curveball_fused.backends.scalars import BETA, RHO


def is_taken(scalars: Tensor) -> Tensor:
    """Return whether a step with these scalars moves anything, 0-dim bool: one to be skipped has no β or no ρ."""
    return torch.isfinite(scalars[BETA]) & torch.isfinite(scalars[RHO])


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
    """Do u ← r / p with p = √(v' / weight) + ε, v' = decay v + (1 - decay) r²; and v ← v', if the step is taken.

    v' that is subnormal and u that is nearly so become zero, as CPUs multiply such numbers slowly. (v' is a square, and
    multiplied by nothing small: its bound is lower.) u is NaN where r or r² is not finite.

    Args:
        u: written; may be r itself.
        v: the average of r²; written only with `scalars`.
        r: Jᵀc, or that in another basis.
        z: the state in the basis of r; or none.
        weight: 1 - decayᵗ in the t-th step, 0-dim float64.
        decay: of the average.
        eps: ε.
        scalars: its first two are β and ρ, and v stays untouched where one of them is not finite; or None: v stays.

    Returns:
        Float64 `[z·Pz, z·r, r·u]`; without z, the first two are zero.
    """
    total = torch.zeros(3, dtype=torch.float64, device=weight.device)
    root_weight = weight.sqrt()
    for i, (u_i, v_i, r_i) in enumerate(zip(u, v, r, strict=True)):
        info = torch.finfo(v_i.dtype)
        r_c = r_i.to(v_i.dtype)
        v_new = decay * v_i + (1 - decay) * r_c.square()
        v_new = v_new.masked_fill(v_new < info.tiny, 0)
        p = v_new.sqrt() * (1 / root_weight).to(v_i.dtype) + eps
        u_new = r_c / p + (v_new - v_new)  # of a v' that is infinite, NaN rather than zero
        u_new = u_new.masked_fill(u_new.abs() < info.tiny / info.eps, 0)
        total[2] += (r_c.double() * u_new.double()).sum()
        if z:
            z_i = z[i].double()
            total[0] += (z_i * z_i * p.double()).sum()
            total[1] += (z_i * r_c.double()).sum()
        u_i.copy_(u_new)
        if scalars is not None:
            v_i.copy_(torch.where(is_taken(scalars), v_new, v_i))
    return total
