"""The adaptation of the damping λ."""

from __future__ import annotations

import torch
from torch import Tensor

from curveball_fused import backends

from ._checks import check_scalars


def adapt_damping(
    scalars: Tensor,
    new_loss: Tensor,
    *,
    low: float,
    high: float,
    factor: float,
    minimum: float,
    maximum: float,
    backend: str = "auto",
) -> Tensor:
    """Adapt λ by the ratio γ = (new loss - loss) / M of the actual to the predicted change of the loss.

    The Levenberg-Marquardt rule, as in Martens 2010 and Henriques et al. 2019: λ/factor where γ < low, or γ is not
    finite, or M > 0; λ·factor where γ > high; and then λ within the bounds.

    Args:
        scalars: float64, the values named by `backends.scalars.SCALARS`; not changed.
        new_loss: 0-dim, the loss after the step, on the same batch.
        low: γ below which the model was too bold; 0 < low < high.
        high: γ above which it was too cautious.
        factor: between 0 and 1.
        minimum: lower bound of λ.
        maximum: upper bound of λ.
        backend: "auto" (default), "cuda", "triton", "cpu" or "torch"; one that cannot run here raises RuntimeError.

    Returns:
        New scalars, with λ and γ; as they were where the step was skipped or predicted no change.

    Raises:
        ValueError: `scalars` has another dtype or shape, or `backend` is unknown.

    Example::

        rule = dict(low=0.5, high=1.5, factor=0.995, minimum=1e-6, maximum=1e6)
        scalars = ops.adapt_damping(scalars, new_loss, **rule)
    """
    check_scalars(scalars)
    kernels = backends.kernels(backends.choose(backend, scalars.device))
    result: Tensor = kernels.adapt_damping(scalars, new_loss, low, high, factor, minimum, maximum)
    return result


if backends.has_operators():

    @torch.library.register_fake("curveball_fused::adapt_damping")
    def _(scalars, new_loss, low, high, factor, minimum, maximum):  # type: ignore[no-untyped-def]
        return torch.empty_like(scalars)
