"""The closed-form solve for β and ρ in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from curveball_fused.backends.scalars import (
    AVERAGE_BETA,
    AVERAGE_RHO,
    BETA,
    CONVEX_TOLERANCE,
    DIRECTION_DAMPING,
    LAMBD,
    LINEAR_TERM,
    LOSS,
    PREDICTED_CHANGE,
    QUADRATIC_TERM,
    RANK_TOLERANCE,
    RHO,
    SAFE_STEPS,
    SKIPPED_STEPS,
    SOLVES,
    Z_DOT_Z,
)


def solve(
    scalars: Tensor,
    loss: Tensor,
    products: Tensor,
    dots: Tensor | None,
    beta: float | None,
    rho: float | None,
    lr: float,
    lr_tensor: Tensor | None,
    theta: float = 1.0,
    average: float = 0.0,
    bounded: bool = False,
) -> Tensor:
    """Solve for [β, -ρ] = A⁺ b, the minimizer x of ½ xᵀA x - x·b, in the plane of Δ = u + s z and z, with s = θλ.

    Equation (7) of docs/method.md: Henriques et al. 2019; the idea is that of Martens and Grosse 2015, section 7.
    A = Gauss-Newton + λ·Gram, so A ⪰ λ·Gram for a loss that is convex in the outputs. Where the curvature is so
    negative that A ⪰ ½λ·Gram fails, A⁺ b could climb or leap; a safe step goes down along Δ alone, no further than 1/λ:
    ρ = 0, β = b₁ / max(|A₁₁|, λ Δ·PΔ).

    Args:
        scalars: the values named by `SCALARS`; not changed.
        loss: 0-dim.
        products: `[g·Jz, Jz·HJz, g·Ju, Jz·HJu, Ju·HJu]`.
        dots: `[z·Pz, z·Pu, u·Pu]`; or None where P = 1, u = r and the adjoint identities z·r = Jz·c and r·r = Jr·c
            hold, with c = g + θ HJz.
        beta: value that is kept, or None; the other minimizes what is left.
        rho: likewise.
        lr: rate of the step.
        lr_tensor: the rate in the place of `lr`, or None.
        theta: θ, the share of z's own residual in Δ.
        average: how much of their averages over the solves β and ρ keep, below 1; what is fixed is not averaged.
        bounded: whether a ρ that is solved for stays in [0, 1].

    Returns:
        New scalars.

    Raises:
        ValueError: `products` or `dots` has another shape.
    """
    for name, given, size in (("products", products, 5), ("dots", dots, 3)):
        if given is not None and given.shape != (size,):
            raise ValueError(f"{name} must have the shape [{size}]; it has {list(given.shape)}.")
    gz, z_hz, gu, z_hu, u_hu = products.unbind()
    lambd = scalars[LAMBD]
    s = theta * lambd
    zz = scalars[Z_DOT_Z] if dots is None else dots[0]
    moving = (zz != 0).to(zz.dtype)  # where z = 0, as in the first step, Jz is zero, whatever rounding has made of it
    gz, z_hz, z_hu = gz * moving, z_hz * moving, z_hu * moving
    zu, uu = (gz + theta * z_hz, gu + theta * z_hu) if dots is None else dots[1:].unbind()
    dd, dz = uu + 2 * s * zu + s**2 * zz, zu + s * zz  # Δ·PΔ and z·PΔ
    a11 = u_hu + 2 * s * z_hu + s**2 * z_hz + lambd * dd
    a12 = z_hu + s * z_hz + lambd * dz
    a22 = z_hz + lambd * zz
    b1, b2 = gu + s * gz, gz
    n11, n12, n22 = a11 - 0.5 * lambd * dd, a12 - 0.5 * lambd * dz, a22 - 0.5 * lambd * zz
    zero, nan = torch.zeros_like(a11), torch.full_like(a11, torch.nan)

    steepest = divide_or_zero(b1, torch.maximum(a11.abs(), lambd * dd))
    if beta is None and rho is None:
        x1, x2 = _solve_both(a11, a12, a22, b1, b2)
        if bounded:  # at a bound of ρ the first row gives β
            inside = x2.clamp(-1, 0)
            x1, x2 = torch.where(x2 == inside, x1, divide_or_zero(b1 - a12 * inside, a11)), inside
        safe = (n11 < 0) | (n22 < 0) | (n12 * n12 > (1 + CONVEX_TOLERANCE) * n11 * n22)
        x1, x2 = torch.where(safe, steepest, x1), torch.where(safe, zero, x2)
    elif beta is None:
        assert rho is not None
        x2, safe = torch.full_like(a11, -rho), n11 < 0
        x1 = torch.where(safe, steepest, divide_or_zero(b1 - a12 * x2, a11))
    elif rho is None:
        x1, safe = torch.full_like(a11, beta), n22 < 0
        x2 = torch.where(safe, zero, divide_or_zero(b2 - a12 * x1, a22))
        x2 = x2.clamp(-1, 0) if bounded else x2
    else:
        x1, x2, safe = (
            torch.full_like(a11, beta),
            torch.full_like(a11, -rho),
            torch.zeros_like(a11, dtype=torch.bool),
        )

    rate = scalars.new_full((), lr) if lr_tensor is None else lr_tensor.reshape(()).to(scalars)
    finite = torch.isfinite(torch.stack((loss.to(products), *products.unbind(), zz, zu, uu, x1, x2, rate))).all()
    keep = (1 - 1 / (scalars[SOLVES] + 1)).clamp(max=average)  # so that the start at zero is no bias
    x1 = x1 if beta is not None else _averaged(keep, scalars[AVERAGE_BETA], x1)
    x2 = x2 if rho is not None else -_averaged(keep, scalars[AVERAGE_RHO], -x2)

    linear_term = x1 * b1 + x2 * b2
    quadratic_term = torch.where(safe, linear_term, x1 * (a11 * x1 + 2 * a12 * x2) + x2 * a22 * x2)
    mean1, mean2 = x1, x2
    if beta is None and rho is None:
        # Where this batch's model climbs along averages, which are of others, to its minimum on the way.
        climbs = (keep > 0) & ~safe & (2 * linear_term < quadratic_term)
        factor = torch.where(climbs, linear_term.clamp(min=0) / quadratic_term, 1)
        x1, x2, linear_term = x1 * factor, x2 * factor, linear_term * factor
        quadratic_term = quadratic_term * factor**2
    new = scalars.clone()
    new[BETA], new[RHO] = torch.where(finite, x1, nan), torch.where(finite, -x2, nan)
    new[LINEAR_TERM], new[QUADRATIC_TERM] = (
        torch.where(finite, linear_term, zero),
        torch.where(finite, quadratic_term, zero),
    )
    new[PREDICTED_CHANGE] = torch.where(finite, predicted_change(new, rate), zero)
    new[LOSS] = loss
    new[SKIPPED_STEPS] += (~finite).to(new.dtype)
    new[SAFE_STEPS] += (finite & safe).to(new.dtype)
    new[DIRECTION_DAMPING] = s
    new[AVERAGE_BETA] = torch.where(finite, mean1, scalars[AVERAGE_BETA])
    new[AVERAGE_RHO] = torch.where(finite, -mean2, scalars[AVERAGE_RHO])
    new[SOLVES] += finite.to(new.dtype)
    return new


def predicted_change(scalars: Tensor, lr: Tensor) -> Tensor:
    """Return M = -lr x·b + ½ lr² xᵀA x, which is -½ lr (2 - lr) x·b at the minimizer x."""
    return lr * (0.5 * lr * scalars[QUADRATIC_TERM] - scalars[LINEAR_TERM])


def _averaged(keep: Tensor, average: Tensor, now: Tensor) -> Tensor:
    """Return the average with a new value in it; the value itself, bit for bit, if nothing of the old one is kept."""
    return torch.where(keep == 0, now, keep * average + (1 - keep) * now)


def _solve_both(a11: Tensor, a12: Tensor, a22: Tensor, b1: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """Solve x = A⁺ b, after scaling A to unit diagonal."""
    s1, s2 = a11.clamp(min=0).sqrt(), a22.clamp(min=0).sqrt()
    cos, y1, y2 = divide_or_zero(a12, s1 * s2), divide_or_zero(b1, s1), divide_or_zero(b2, s2)
    gap = (1 - cos) * (1 + cos)
    full = torch.stack((divide_or_zero(y1 - cos * y2, gap), divide_or_zero(y2 - cos * y1, gap)))
    sign = torch.sign(cos)
    parallel = torch.stack((y1 + sign * y2, sign * y1 + y2)) / 4  # the pseudo-inverse of [[1, ±1], [±1, 1]]
    # A zero diagonal entry leaves the other equation alone, as cos is zero then.
    x = torch.where(gap <= RANK_TOLERANCE, parallel, full)
    return divide_or_zero(x[0], s1), divide_or_zero(x[1], s2)


def divide_or_zero(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, and zero where b is zero."""
    return torch.where(b == 0, torch.zeros_like(a), a / torch.where(b == 0, torch.ones_like(b), b))
