"""The closed-form solve for the step size β on the linear system and the momentum ρ."""

from __future__ import annotations

import torch
from torch import Tensor

from curveball_fused import backends

from ._checks import check_scalars
from ._rates import rates_on_device


def solve(
    scalars: Tensor,
    loss: Tensor,
    products: Tensor,
    dots: Tensor | None = None,
    *,
    beta: float | None = None,
    rho: float | None = None,
    lr: float | Tensor = 1.0,
    theta: float = 1.0,
    average: float = 0.0,
    bounded: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Solve for β and ρ of this step: [β, -ρ] = A⁺ b minimizes the quadratic model in the plane of Δ = u + θλz and z.

    With the damped Gauss-Newton matrix Ĥ = JᵀHJ + λP, A = [[Δ·ĤΔ, Δ·Ĥz], [Δ·Ĥz, z·Ĥz]] and b = [Jᵀg·Δ, Jᵀg·z]:
    equation (7) of docs/method.md (Henriques et al. 2019, after Martens and Grosse 2015, section 7). P is the metric
    that damps, u = P⁻¹r and r = Jᵀ(θHJz + g); the paper has P = 1 and θ = 1. Where the curvature is so negative that
    A⁺ b could climb or leap, the step goes along Δ alone, no further than 1/λ, and is counted in `safe_steps`.

    Args:
        scalars: float64, the values named by `backends.scalars.SCALARS`, of which λ and z·z are read; not changed.
        loss: 0-dim, the minimized objective.
        products: float64 `[g·Jz, Jz·HJz, g·Ju, Jz·HJu, Ju·HJu]`, as the operators in `ops.losses` give them.
        dots: float64 `[z·Pz, z·Pu, u·Pu]`, or None (default) for P = 1 and u = r, to take them from z·z of the last
            step and the adjoint identities z·r = Jz·c and r·r = Jr·c, with c = θHJz + g.
        beta: value to keep for β; None (default) to solve for it.
        rho: value to keep for ρ; None (default) to solve for it.
        lr: number (default: 1) or 0-dim tensor, by which the change of the loss is predicted.
        theta: θ, the share of z's own residual in Δ (default: 1): with 0, r is the gradient.
        average: what β and ρ keep of their averages over the solves, from 0 (default: no average) to below 1; these
            averages are then used in their places, or, where the model climbs along them, as much of both as leads to
            its minimum on the way. What is fixed is not averaged.
        bounded: whether to solve for the best ρ in [0, 1] (default: False, for any ρ). A fixed one is left alone.
        backend: "auto" (default), "cuda", "triton", "cpu" or "torch"; one that cannot run here raises RuntimeError.

    Returns:
        New scalars: β, ρ, the loss, the model's two terms and the predicted change M = -lr x·b + ½ lr² xᵀA x, with
        x = [β, -ρ], and θλ, by which `update_groups_` forms Δ. A loss, product or rate that is not finite gives
        β = ρ = NaN, by which `update_groups_` leaves all as it is, and is counted in `skipped_steps`.

    Raises:
        ValueError: `scalars` has another dtype or shape, or `backend` is unknown.

    Example::

        scalars = torch.zeros(len(SCALARS), dtype=torch.float64)
        scalars[LAMBD] = 1.0
        loss, c, products = ops.losses.mse_cotangent(outputs, jz, target)  # r = Jᵀc, jr = Jr
        products = ops.losses.mse_products(outputs, jz, jr, target, products)
        scalars = ops.solve(scalars, loss, products)
    """
    check_scalars(scalars)
    kernels = backends.kernels(backends.choose(backend, scalars.device))
    (rate,), tensor = rates_on_device([lr], scalars.device)
    result: Tensor = kernels.solve(scalars, loss, products, dots, beta, rho, rate, tensor, theta, average, bounded)
    return result


if backends.has_operators():

    @torch.library.register_fake("curveball_fused::solve")
    def _(  # type: ignore[no-untyped-def]
        scalars, loss, products, dots, beta, rho, lr, lr_tensor=None, theta=1.0, average=0.0, bounded=False
    ):
        return torch.empty_like(scalars)
