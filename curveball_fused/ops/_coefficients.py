"""The β and ρ of a step between solves."""

from __future__ import annotations

import torch
from torch import Tensor

from curveball_fused import backends

from ._checks import check_scalars


def keep_coefficients(
    scalars: Tensor,
    loss: Tensor,
    slope: Tensor,
    room: Tensor | None = None,
    *,
    sign: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Keep the β and ρ of the last solves for a step that does not solve, with β no more than room / slope.

    What the step promises by its gradient, β r·u, is then no more than the loss has to give, as in Polyak's rate
    (1987).

    Args:
        scalars: float64, the values named by `backends.scalars.SCALARS`, of which the averages of β and ρ are read; not
            changed.
        loss: 0-dim, float16, bfloat16, float32 or float64.
        slope: r·u, 0-dim float64: by how much the minimized loss falls along -βu for each unit of β. It may be the last
            element of what `dots` or `precondition_` returns, in place.
        room: how far the minimized loss can fall, 0-dim of any of these dtypes, at least zero; None (default): β stays.
        sign: 1 (default), or -1 for a loss that is maximized.
        backend: "auto" (default), "cuda", "triton", "cpu" or "torch"; one that cannot run here raises RuntimeError.

    Returns:
        New scalars: β, ρ, and sign·loss in the place of the loss. A loss or slope that is not finite gives β = ρ = NaN,
        by which `update_groups_` leaves all as it is, and is counted in `skipped_steps`.

    Raises:
        ValueError: `scalars` has another dtype or shape, `sign` is neither 1 nor -1, or `backend` is unknown.

    Example::

        loss = F.mse_loss(outputs, target)  # never negative: it can fall to zero
        slope = ops.dots(z, r)[2]  # where u = r
        scalars = ops.keep_coefficients(scalars, loss.detach(), slope, loss.detach())
        scalars = ops.update_groups_(params, z, r, scalars, group_sizes=[len(z)], lr=[1.0], weight_decay=[0.0])
    """
    check_scalars(scalars)
    if sign not in (1, -1):
        raise ValueError(f"sign must be 1, or -1 for a loss that is maximized; got {sign}.")
    kernels = backends.kernels(backends.choose(backend, scalars.device))
    result: Tensor = kernels.keep_coefficients(scalars, loss, slope, room, sign)
    return result


if backends.has_operators():

    @torch.library.register_fake("curveball_fused::keep_coefficients")
    def _(scalars, loss, slope, room, sign):  # type: ignore[no-untyped-def]
        return torch.empty_like(scalars)
