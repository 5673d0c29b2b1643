"""Cheaper and steadier steps: a 2x2 system averaged over steps, rebuilt between full solves, or of a part of the batch.

With Δ = r + λz, all that β and ρ depend on are eight numbers: the products `[g·Jz, Jz·HJz, g·Jr, Jz·HJr, Jr·HJr]` and
the dot products `[z·z, z·r, r·r]`. Everything here makes those eight numbers out of less, or out of more than one step,
on the device, and leaves the solve and the update as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curveball_fused.backends.reference.solve import divide_or_zero
from curveball_fused.backends.scalars import RHO, Z_DOT_Z

RHO_MAX = 1.0  # the heavy ball gains energy beyond it, which one batch's model can't see


def average(
    system: Tensor, loss: Tensor, products: Tensor, dots: Tensor, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the exponential average with this step in it, and the products and dots that it stands for.

    s ← a s + (1 - a) [products, dots, 1]; the last element divides the others, so that the start at zero is no bias. A
    step that is not finite leaves the average as it is and gets its own values back, by which the solve skips it.
    """
    now = torch.cat((products, dots, dots.new_ones(1)))
    finite = torch.isfinite(now).all() & torch.isfinite(loss)
    system = torch.where(finite, decay * system + (1 - decay) * now, system)
    used = torch.where(finite, system / system[-1], now)
    return system, used[:5], used[5:8]


def averaged_solve(
    solve: Callable[..., Tensor],
    scalars: Tensor,
    system: Tensor,
    loss: Tensor,
    products: Tensor,
    dots: Tensor | None,
    *,
    decay: float,
    rho: float | None,
) -> tuple[Tensor, Tensor]:
    """Return the average with this step in it, and the scalars of its solve, with ρ of at most `RHO_MAX`.

    Args:
        solve: `ops.solve`, of products, dots and `rho=`.
        scalars: of the last step.
        system: the average of the last step.
        loss: of this step, as the products and the dots; None for the dots where the adjoint identities give them.
        products: see above.
        dots: see above.
        decay: how much is kept of the old average.
        rho: the user's own, or None.
    """
    if dots is None:
        zz, (gz, z_hz, gr, z_hr, _) = scalars[Z_DOT_Z], products
        dots = torch.stack((zz, gz + z_hz, gr + z_hr))
    system, products, dots = average(system, loss, products, dots, decay)
    solved = solve(products, dots, rho=rho)
    bounded = solve(products, dots, rho=RHO_MAX)
    return system, torch.where(solved[RHO] > RHO_MAX, bounded, solved)


def products_from_previous_system(system: Tensor, products: Tensor, dots: Tensor) -> Tensor:
    """Return the products of a step without Jr: the curvature along r by ratios of the last full systems.

    κ = Jr·HJr / r·r and σ = Jz·HJr / √(Jz·HJz · Jr·HJr) have no scale and vary slowly. |σ| ≤ 1, as an average of
    positive semi-definite matrices is one, so the rebuilt A is positive semi-definite too. Before the first full system
    κ is NaN, and the step is skipped.
    """
    mean_zhz, mean_zhr, mean_rhr, mean_rr = system[1], system[3], system[4], system[7]
    z_hz = products[1]
    r_hr = mean_rhr / mean_rr * dots[2]
    sigma = divide_or_zero(mean_zhr, (mean_zhz * mean_rhr).clamp(min=0).sqrt())
    return torch.stack((products[0], z_hz, products[2], sigma * (z_hz * r_hr).clamp(min=0).sqrt(), r_hr))


def consistent(products: Tensor, dots: Tensor) -> Tensor:
    """Return `products` with the g·Jz and g·Jr that belong to r = Jᵀg + JᵀHJz, whatever batch the curvature is of.

    By adjointness z·Jᵀg = z·r - Jz·HJz and r·Jᵀg = r·r - Jz·HJr: so gradient, direction and A are of one model,
    m(d) = g·d + ½ d·(JᵀHJ + λI) d, which decreases along the solution.
    """
    z_hz, z_hr, r_hr = products[1], products[3], products[4]
    return torch.stack((dots[1] - z_hz, z_hz, dots[2] - z_hr, z_hr, r_hr))
