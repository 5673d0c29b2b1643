"""A curvature for losses that have none: linear in the outputs, as a mean of losses is, or piece by piece, as |x| is.

Their Gauss-Newton matrix is zero, and the step on λI alone is gradient descent at the rate 1/λ, whatever the scale of
model and loss: it may be far too long. In the place of H = 0 stands H = g gᵀ / S with S = Σ |g_i o_i|, the size of the
loss as a sum of shares of the outputs o. The first step then is -β Jᵀg with β = S / (|Jᵀg|² + λ S): no longer than 1/λ,
and not expected to take off more than S. For a loss that is a mean of losses S is the loss, and β the step size of
Polyak, as Loizou et al. 2021 take it for a batch ("Stochastic Polyak step-size for SGD", arXiv 2002.10542).
"""

from __future__ import annotations

import torch
from torch import Tensor

from curveball_fused.backends.reference.closed_form_losses import Map, Products


class MissingCurvature:
    """The products of a loss by its gradient and Hessian, with g gᵀ / S where the Hessian is found to be zero.

    It is found on the device: H Jz = 0, or, where z = 0, H Jr = 0. All products of a step are of the same matrix.

    Args:
        outputs: o.
        gradient: g.
        product: v ↦ H v; None for a loss whose gradient does not depend on the outputs.

    Attributes:
        size: S, 0-dim float64.
        is_linear: whether there is no `product`.
        is_missing: whether the Hessian was zero, 0-dim bool; None before all products are known.
    """

    def __init__(self, outputs: Tensor, gradient: Tensor, product: Map | None) -> None:
        self.is_linear = product is None
        self.is_missing: Tensor | None = None
        self._gradient = gradient
        self._product = product or torch.zeros_like
        self.size = (gradient * outputs).abs().sum(dtype=torch.float64)

    def products(self) -> Products:
        """Return the products that a step needs; bit for bit those of the Hessian where that is not zero."""
        return Products(lambda: self._gradient, self._at)

    def _at(self, v: Tensor) -> tuple[Tensor, Map]:
        gradient = self._gradient
        v = v.to(gradient.dtype)
        hv = self._product(v)
        missing_along_v = (hv == 0).all()
        hv = self._substituted(hv, v, missing_along_v)
        first = (_dot(gradient, v), _dot(hv, v))

        def products_with(u: Tensor) -> Tensor:
            u = u.to(gradient.dtype)
            hu = self._product(u)
            self.is_missing = missing_along_v & ((v != 0).any() | (hu == 0).all())
            hu = self._substituted(hu, u, self.is_missing)
            return torch.stack((*first, _dot(gradient, u), _dot(hv, u), _dot(hu, u)))

        return gradient + hv, products_with

    def _substituted(self, hv: Tensor, v: Tensor, missing: Tensor) -> Tensor:
        """Return g <g, v> / S where the curvature is missing, else H v."""
        along = torch.where(self.size == 0, 0.0, _dot(self._gradient, v) / self.size)
        return torch.where(missing, self._gradient * along.to(v.dtype), hv)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dtype=torch.float64)
