"""What the other iterations of a step make, and how the pass over the parameters takes it over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from curveball_fused import checks
from curveball_fused.backends.scalars import BETA, DIRECTION_DAMPING, LAMBD, RHO, SAFE_STEPS
from curveball_fused.quadratic_model import QuadraticTerms, StepContext

from .conjugate_gradients import improved
from .curvature_factors import CurvatureFactors


class Iterated(NamedTuple):
    """What the other iterations have made: z after the step, the scalars for it, and their preconditioner."""

    z: list[Tensor]
    scalars: Tensor
    factors: CurvatureFactors

    def moved_by(self, update: Callable[[list[Tensor], Tensor], Tensor]) -> Tensor:
        """Move z and w by the pass of a single iteration, and write the factors.

        Args:
            update: of u and scalars, z ← (ρ - βs) z - β u: with β = -1 and zeros it takes u for z.

        Returns:
            The scalars after it.
        """
        folded = self.scalars.clone()
        folded[BETA].mul_(0).sub_(1)  # no number in a step to be skipped
        folded[RHO].mul_(0)
        folded[DIRECTION_DAMPING].fill_(0)
        updated = update(self.z, folded)
        kept = self.scalars[: LAMBD + 1], updated[LAMBD + 1 : DIRECTION_DAMPING], self.scalars[DIRECTION_DAMPING:]
        return self.factors.write(torch.cat(kept))


def iterated(
    context: StepContext,
    terms: QuadraticTerms,
    scalars: Tensor,
    before: Tensor,
    states: Sequence[Mapping[str, Tensor]],
    step: int,
) -> Iterated:
    """Do the other iterations of a step.

    Args:
        context: where the step begins.
        terms: what the first iteration has measured.
        scalars: with the β and ρ of its solve.
        before: the scalars before the step.
        states: of the parameters.
        step: its number, counted from zero.

    Returns:
        What they have made; nothing has been changed.

    Raises:
        RuntimeError: the model computes in half precision.
    """
    settings = context.settings
    assert terms.linearization is not None
    checks.full_precision(settings.iterations, terms.compute_dtype)
    factors = CurvatureFactors(states, scalars)
    is_safe = scalars[SAFE_STEPS] > before[SAFE_STEPS]
    z, scalars = improved(
        terms.linearization,
        context.z,
        terms.u,
        scalars,
        factors,
        is_safe=is_safe,
        iterations=settings.iterations,
        lr=settings.lr[0],
        step=step,
    )
    return Iterated(z, scalars, factors)
