"""The β and ρ of a step between solves in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from curveball_fused.backends.scalars import AVERAGE_BETA, AVERAGE_RHO, BETA, LOSS, RHO, SKIPPED_STEPS


def keep_coefficients(scalars: Tensor, loss: Tensor, slope: Tensor, room: Tensor | None, sign: float) -> Tensor:
    """Take the averages of β and ρ over the last solves, with β ≤ room / slope.

    Args:
        scalars: the values named by `SCALARS`; not changed.
        loss: of this step, 0-dim.
        slope: r·u, by how much the minimized loss falls along -βu for each unit of β, 0-dim float64; finite if all of r
            is.
        room: how far it can fall, 0-dim, or None.
        sign: 1 or -1, by which the loss is multiplied to be minimized.

    Returns:
        New scalars; β = ρ = NaN, and one more skipped step, where loss or slope is not finite.
    """
    loss = sign * loss.to(scalars)
    finite = torch.isfinite(loss + slope)
    kept = torch.where(finite, scalars[AVERAGE_BETA : AVERAGE_RHO + 1], torch.nan)
    new = scalars.clone()
    new[BETA : RHO + 1] = kept
    if room is not None:
        new[BETA] = torch.where(kept[0] * slope > room, room / slope, kept[0])
    new[LOSS] = loss
    new[SKIPPED_STEPS] += ~finite
    return new
