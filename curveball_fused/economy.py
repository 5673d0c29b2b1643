"""Cheaper steps and steadier ones: a 2x2 system averaged over steps, rebuilt between complete solves, or of a part.

With Δ = r + λz, all that β and ρ depend on are eight numbers: the products `[g·Jz, Jz·HJz, g·Jr, Jz·HJr, Jr·HJr]` and
the dot products `[z·z, z·r, r·r]`. Everything here makes those eight numbers out of less, or out of more than one step,
on the device, and leaves the solve and the update as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .curvature import _checked, _dense, _independent, _own, run_plain
from .loss_scale import at_least_float32
from .reference import RHO, Z_DOT_Z, _divide
from .replay import Replay

SYSTEM_SIZE = 9  # products, dots, and the weight that the average has gathered
DIFFERENCE = 0.1  # of z, for its tangent: enough to stand out of rounding, also of reduced-precision multiplication
RHO_MAX = 1.0  # the heavy ball gains energy beyond it, which one batch's model can't see


class Backward:
    """Jᵀu alone: one run of the model and an ordinary backward pass.

    Attributes:
        outputs: the model's predictions, detached.
    """

    def __init__(self, model_fn: Callable[[], Tensor], params: Sequence[Tensor], replay: Replay) -> None:
        self._params = params
        with torch.enable_grad():
            self._outputs = _checked(replay.first(model_fn))
        if not self._outputs.requires_grad:
            raise _independent()
        self.outputs = _own(self._outputs.detach(), params)

    def vjp(self, cotangent: Tensor) -> list[Tensor]:
        """`Jᵀ u`, in the parameters' shapes and dtypes; once."""
        return _dense(self._params, torch.autograd.grad(self._outputs, self._params, cotangent, allow_unused=True))


def difference(
    model_fn: Callable[[], Tensor], params: Sequence[Tensor], z: Sequence[Tensor], replay: Replay
) -> tuple[Backward, Tensor]:
    """The model's `Backward`, and Jz ≈ (f(w + εz) - f(w)) / ε, of the outputs' shape.

    One forward pass for Jz, where dual numbers or a tape take the work of two. Both runs see the same dropout masks; of
    the second nothing is left in generators and buffers. w itself is put aside and back, so that it is exactly as it
    was.
    """
    aside = Replay(params, params[0].device)
    try:
        with _moved(params, z):
            nearby = aside.first(lambda: run_plain(model_fn))
    finally:
        aside.rewind()
    linear = Backward(model_fn, params, replay)
    return linear, (at_least_float32(nearby) - at_least_float32(linear.outputs)) / DIFFERENCE


def unknown(device: torch.device) -> Tensor:
    """The average before the first step: float64, no weight."""
    return torch.zeros(SYSTEM_SIZE, dtype=torch.float64, device=device)


def average(
    system: Tensor, loss: Tensor, products: Tensor, dots: Tensor, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The exponential average with this step in it, and the products and dots that it stands for.

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
    shared: dict[str, Any],
    loss: Tensor,
    products: Tensor,
    dots: Tensor | None,
    decay: float,
    rho: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The average with this step in it, and the scalars of its solve, with ρ of at most `RHO_MAX`."""
    if dots is None:
        zz, (gz, z_hz, gr, z_hr, _) = shared["scalars"][Z_DOT_Z], products
        dots = torch.stack((zz, gz + z_hz, gr + z_hr))
    system, products, dots = average(shared["system"], loss, products, dots, decay)
    scalars = solve(products, dots, rho=rho, backend=backend)
    bounded = solve(products, dots, rho=RHO_MAX, backend=backend)
    return system, torch.where(scalars[RHO] > RHO_MAX, bounded, scalars)


def lagged(system: Tensor, products: Tensor, dots: Tensor) -> Tensor:
    """Products of a step without Jr: the curvature along r by ratios of the last complete systems, which vary slowly.

    κ = Jr·HJr / r·r and σ = Jz·HJr / √(Jz·HJz · Jr·HJr) have no scale. |σ| ≤ 1, as an average of positive semi-definite
    matrices is one, so the rebuilt A is positive semi-definite too. Before the first complete system κ is NaN, and the
    step is skipped.
    """
    mean_zhz, mean_zhr, mean_rhr, mean_rr = system[1], system[3], system[4], system[7]
    z_hz = products[1]
    r_hr = mean_rhr / mean_rr * dots[2]
    sigma = _divide(mean_zhr, (mean_zhz * mean_rhr).clamp(min=0).sqrt())
    return torch.stack((products[0], z_hz, products[2], sigma * (z_hz * r_hr).clamp(min=0).sqrt(), r_hr))


def consistent(products: Tensor, dots: Tensor) -> Tensor:
    """`products` with the g·Jz and g·Jr that belong to r = Jᵀg + JᵀHJz, whatever batch the curvature is of.

    By adjointness z·Jᵀg = z·r - Jz·HJz and r·Jᵀg = r·r - Jz·HJr: so gradient, direction and A are of one model,
    m(d) = g·d + ½ d·(JᵀHJ + λI) d, which decreases along the solution.
    """
    z_hz, z_hr, r_hr = products[1], products[3], products[4]
    return torch.stack((dots[1] - z_hz, z_hz, dots[2] - z_hr, z_hr, r_hr))


@contextmanager
def _moved(params: Sequence[Tensor], tangents: Sequence[Tensor]) -> Iterator[None]:
    """Puts the parameters at w + εv, without a gradient, so that no graph of this run is kept; then back, exactly."""
    weights = [p.data for p in params]
    try:
        for p, weight, tangent in zip(params, weights, tangents, strict=True):
            p.data = weight + DIFFERENCE * tangent
            p.requires_grad_(False)
        yield
    finally:
        for p, weight in zip(params, weights, strict=True):
            p.data = weight
            p.requires_grad_(True)
