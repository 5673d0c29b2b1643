"""The operators on parameters in plain torch: the specification, and the backend that works everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curveball_fused.backends.scalars import BETA, DIRECTION_DAMPING, PREDICTED_CHANGE, RHO, Z_DOT_Z

from .coefficients import keep_coefficients
from .damping import adapt_damping
from .solve import divide_or_zero, predicted_change, solve

__all__ = ["adapt_damping", "dots", "keep_coefficients", "solve", "update_"]


def update_(
    params: Sequence[Tensor],
    z: Sequence[Tensor],
    r: Sequence[Tensor],
    scalars: Tensor,
    group_sizes: Sequence[int],
    lr: Sequence[float],
    weight_decay: Sequence[float],
    lr_tensor: Tensor | None,
) -> Tensor:
    """Do z ← (ρ - βs) z - β r;  w ← (1 - lr·weight_decay) w + lr z, with the group's own lr and weight decay.

    s is the direction damping, so that this is z ← ρ z - β Δ with Δ = r + s z.
    z that is nearly subnormal, as where r has been zero for long, becomes zero: CPUs multiply such numbers slowly.
    w and z stay untouched where β or ρ is not finite.

    Args:
        params: w; written.
        z: state; written.
        r: Jᵀc.
        scalars: the values named by `SCALARS`; not changed.
        group_sizes: how many tensors of each list belong to each group.
        lr: rate of each group.
        weight_decay: decay of each group.
        lr_tensor: one rate for each group, in the place of `lr`, or None.

    Returns:
        New scalars, with z·z and, for groups of unequal lr, with M.

    Raises:
        ValueError: not every tensor has its group, or not every group its rate and decay.
    """
    rates_there = len(lr) if lr_tensor is None else lr_tensor.numel()
    if not len(group_sizes) == rates_there == len(weight_decay) or sum(group_sizes) != len(params):
        raise ValueError(
            f"group_sizes {list(group_sizes)}, {rates_there} rates and {len(weight_decay)} decays do not fit the "
            f"{len(params)} params: give every tensor's group, and each group's rate and decay."
        )
    beta, rho, damping = scalars[BETA], scalars[RHO], scalars[DIRECTION_DAMPING]
    rates = _filled(scalars, lr) if lr_tensor is None else lr_tensor.to(scalars)
    finite, momentum = torch.isfinite(beta) & torch.isfinite(rho), rho - beta * damping
    squares = scalars.new_zeros(len(group_sizes))
    groups = [g for g, size in enumerate(group_sizes) for _ in range(size)]
    for g, w_i, z_i, r_i in zip(groups, params, z, r, strict=True):
        decay = 1 - rates[g] * weight_decay[g]
        b, m, d, s = (c.to(z_i.dtype) for c in (beta, momentum, decay, rates[g]))
        z_new = m * z_i - b * r_i.to(z_i.dtype)
        z_new = z_new.masked_fill(z_new.abs() < torch.finfo(z_i.dtype).tiny / torch.finfo(z_i.dtype).eps, 0)
        w_new = d * w_i.to(z_i.dtype) + s * z_new
        z_i.copy_(torch.where(finite, z_new, z_i))
        w_i.copy_(torch.where(finite, w_new.to(w_i.dtype), w_i))
        squares[g] += z_i.double().square().sum()
    new = scalars.clone()
    new[Z_DOT_Z] = squares.sum()
    # The step is lr_g z in group g; its projection on z is the step of the one lr that the model sees.
    mean = divide_or_zero((rates * squares).sum(), new[Z_DOT_Z])
    new[PREDICTED_CHANGE] = torch.where(
        (rates == rates[:1]).all(), scalars[PREDICTED_CHANGE], predicted_change(scalars, mean)
    )
    return new


def dots(z: Sequence[Tensor], r: Sequence[Tensor]) -> Tensor:
    """Return float64 `[z·z, z·r, r·r]`."""
    total = torch.zeros(3, dtype=torch.float64, device=z[0].device)
    for z_i, r_i in zip(z, r, strict=True):
        a, b = z_i.double(), r_i.double()
        total += torch.stack(((a * a).sum(), (a * b).sum(), (b * b).sum()))
    return total


def _filled(scalars: Tensor, values: Sequence[float]) -> Tensor:
    """Return a vector of `values` where `scalars` are, without a copy that the host would wait for."""
    return torch.stack([scalars.new_full((), value) for value in values])
