"""The adaptation of the damping λ in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from curveball_fused.backends.scalars import BETA, LAMBD, LOSS, PREDICTED_CHANGE, RATIO


def adapt_damping(
    scalars: Tensor, new_loss: Tensor, low: float, high: float, factor: float, minimum: float, maximum: float
) -> Tensor:
    """Adapt λ by γ = (new loss - loss) / M, by the Levenberg-Marquardt rule (Martens 2010).

    λ/factor where γ < low or γ is NaN or M > 0, λ·factor where γ > high, within the bounds. (M > 0, a step that the
    model itself expects to climb, can come of fixed β and ρ or of lr > 2.)

    Args:
        scalars: the values named by `SCALARS`; not changed.
        new_loss: 0-dim, after the step.
        low: bound of γ.
        high: bound of γ.
        factor: between 0 and 1.
        minimum: bound of λ.
        maximum: bound of λ.

    Returns:
        New scalars; as they were where the step was skipped or M is zero.
    """
    lambd, change = scalars[LAMBD], scalars[PREDICTED_CHANGE]
    ratio = (new_loss.to(scalars) - scalars[LOSS]) / change
    poor = ~torch.isfinite(new_loss) | ~(ratio >= low) | (change > 0)
    adapted = torch.where(poor, lambd / factor, torch.where(ratio > high, lambd * factor, lambd))
    new = scalars.clone()
    new[LAMBD], new[RATIO] = adapted.clamp(minimum, maximum), ratio
    return torch.where(torch.isfinite(scalars[BETA]) & (change != 0), new, scalars)
