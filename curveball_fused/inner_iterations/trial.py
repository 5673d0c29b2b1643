"""A step on trial: one that raises the loss of its own batch is taken back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curveball_fused.backends.scalars import BETA, LAMBD, LOSS, Z_DOT_Z

PENALTY = 2  # how many times more λ grows by its factor after a step that was taken back


class Trial:
    """The weights before a step.

    Args:
        params: w.
        z: the state.
    """

    def __init__(self, params: Sequence[Tensor], z: Sequence[Tensor]) -> None:
        self._params, self._z = params, z
        self._before = [p.detach().clone() for p in params]

    @torch.no_grad()
    def judge(self, scalars: Tensor, new_loss: Tensor, *, factor: float, maximum: float) -> Tensor:
        """Put back the weights where the loss has become larger, and z to zero, and let λ grow more.

        Args:
            scalars: after the adaptation of λ.
            new_loss: at the new weights, of the objective that is minimized.
            factor: by which λ changes.
            maximum: of λ.

        Returns:
            The scalars for that.
        """
        worse = torch.isfinite(scalars[BETA]) & ~(new_loss.to(scalars) <= scalars[LOSS])
        for p, before, z in zip(self._params, self._before, self._z, strict=True):
            p.copy_(torch.where(worse, before, p))
            z.copy_(torch.where(worse, 0, z))
        scalars = scalars.clone()
        scalars[Z_DOT_Z] = torch.where(worse, 0.0, scalars[Z_DOT_Z])
        raised = (scalars[LAMBD] / factor**PENALTY).clamp(max=maximum)
        scalars[LAMBD] = torch.where(worse, raised, scalars[LAMBD])
        return scalars
