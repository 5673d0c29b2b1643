"""A step on trial: one that raises the loss of its own batch is taken back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curveball_fused.backends.reference.preconditioners import is_taken
from curveball_fused.backends.scalars import LAMBD, LOSS, Z_DOT_Z

PENALTY = 2  # how many times more λ grows by its factor after a step that was taken back


class Trial:
    """The weights before a step, which is taken without weight decay, as that has no part in the model of the loss.

    Args:
        params: w.
        z: the state.
        decays: by what share of itself each parameter shrinks in the step.
    """

    def __init__(self, params: Sequence[Tensor], z: Sequence[Tensor], decays: Sequence[float | Tensor]) -> None:
        self._params, self._z, self._decays = params, z, decays
        self._before = [p.detach().clone() for p in params]

    @torch.no_grad()
    def end(self, scalars: Tensor, new_loss: Tensor, *, factor: float, maximum: float) -> Tensor:
        """Put back the weights, with z = 0 and a larger λ, where the loss has become larger; then let them decay.

        Args:
            scalars: after the adaptation of λ.
            new_loss: at the new weights, of the objective that is minimized.
            factor: by which λ changes.
            maximum: of λ.

        Returns:
            The scalars for that.
        """
        taken = is_taken(scalars)
        worse = taken & ~(new_loss.to(scalars) <= scalars[LOSS])
        for p, before, z, decay in zip(self._params, self._before, self._z, self._decays, strict=True):
            kept = torch.where(worse, before, p)
            if isinstance(decay, Tensor) or decay:
                kept = kept - torch.where(taken, scalars.new_ones(()) * decay, 0.0).to(p.dtype) * before
            p.copy_(kept)
            z.copy_(torch.where(worse, 0, z))
        scalars = scalars.clone()
        scalars[Z_DOT_Z] = torch.where(worse, 0.0, scalars[Z_DOT_Z])
        raised = (scalars[LAMBD] / factor**PENALTY).clamp(max=maximum)
        scalars[LAMBD] = torch.where(worse, raised, scalars[LAMBD])
        return scalars
