"""Conjugate gradients on (G + λ) z = -Jᵀg, from where the solve in the plane of Δ and z has led."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curveball_fused import ops
from curveball_fused.backends.reference.solve import predicted_change
from curveball_fused.backends.scalars import (
    BETA,
    DIRECTION_DAMPING,
    LAMBD,
    LINEAR_TERM,
    PREDICTED_CHANGE,
    QUADRATIC_TERM,
    RHO,
)
from curveball_fused.quadratic_model import Linearization

from .curvature_factors import CurvatureFactors, probes


def improved(
    model: Linearization,
    z: Sequence[Tensor],
    u: Sequence[Tensor],
    scalars: Tensor,
    factors: CurvatureFactors,
    *,
    is_safe: Tensor,
    iterations: int,
    lr: float | Tensor,
    step: int,
) -> tuple[list[Tensor], Tensor]:
    """Do the other iterations of a step, of which the solve for β and ρ was the first.

    Args:
        model: what the first iteration has measured.
        z: before the step.
        u: Jᵀ(g + HJz).
        scalars: with the β and ρ of the solve.
        factors: the preconditioner, which sees probes of this step.
        is_safe: whether the curvature has turned out not to be trusted, 0-dim bool: then z stays where the first
            iteration has led.
        iterations: all of them, the first included.
        lr: of the first group.
        step: its number, counted from zero.

    Returns:
        z after the step; and scalars with the terms of the quadratic model for it.
    """
    beta = scalars[BETA]
    keep = scalars[RHO] - beta * scalars[DIRECTION_DAMPING]
    z = [_times(keep, a) - _times(beta, b.to(a.dtype)) for a, b in zip(z, u, strict=True)]  # ρz - βΔ
    jz = _times(keep, model.jz) - _times(beta, model.ju)
    factors.see(probes(model.curvature_times, model.linear.vjp, model.jz, step))
    going = ~is_safe if model.missing is None else ~(is_safe | model.missing)
    z, jz = _conjugate_gradients(model, z, jz, scalars, factors, going, iterations - 1)
    return z, _with_terms(scalars, model.products(jz), ops.dots(z, z)[0], lr)


def _conjugate_gradients(
    model: Linearization,
    z: list[Tensor],
    jz: Tensor,
    scalars: Tensor,
    factors: CurvatureFactors,
    going: Tensor,
    iterations: int,
) -> tuple[list[Tensor], Tensor]:
    """Return z and Jz after so many iterations, each of which takes one product with J and one with Jᵀ.

    z stays where it is from the first iteration on in which the curvature along the direction is not positive, or which
    takes no more off the model of the loss than rounding does: beyond that the iterations would grow. All of them are
    computed all the same, as the host does not know.
    """
    lambd = scalars[LAMBD]
    gained = scalars[LINEAR_TERM] - 0.5 * scalars[QUADRATIC_TERM]
    rounding = max(torch.finfo(t.dtype).eps for t in (jz, *z))
    p: list[Tensor] = []
    slope = torch.zeros_like(lambd)
    for _ in range(iterations):
        r = [a.to(b.dtype) + _times(lambd, b) for a, b in zip(model.residual(jz), z, strict=True)]
        y = factors.solve(r, scalars)
        before, slope = slope, ops.dots(y, r)[1]
        conjugate = torch.where(before > 0, slope / before, 0.0)
        p = [_times(conjugate, a) - b for a, b in zip(p, y, strict=True)] if p else [-b for b in y]
        jp = model.linear.jvp(p)
        curvature = model.products(jp)[1] + lambd * ops.dots(p, p)[0]
        gain = 0.5 * slope * slope / curvature
        going = going & (curvature > 0) & (gain > rounding * gained)
        alpha, gained = slope / curvature, gained + torch.where(going, gain, 0.0)
        z = [torch.where(going, a + _times(alpha, b), a) for a, b in zip(z, p, strict=True)]
        jz = torch.where(going, jz + _times(alpha, jp), jz)
    return z, jz


def _with_terms(scalars: Tensor, products: Tensor, z_dot_z: Tensor, lr: float | Tensor) -> Tensor:
    """Return scalars with -g·Jz, z·(G + λ)z and what the step lr z changes in the model of the loss.

    Args:
        scalars: of the first iteration.
        products: `[g·Jz, Jz·HJz, ...]`.
        z_dot_z: z·z.
        lr: of the first group.
    """
    scalars = scalars.clone()
    scalars[LINEAR_TERM], scalars[QUADRATIC_TERM] = -products[0], products[1] + scalars[LAMBD] * z_dot_z
    scalars[PREDICTED_CHANGE] = predicted_change(scalars, lr)
    return scalars


def _times(factor: Tensor, t: Tensor) -> Tensor:
    return factor.to(t.dtype) * t
