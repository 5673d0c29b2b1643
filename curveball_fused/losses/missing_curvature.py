"""A curvature for losses that have none: linear in the outputs, as a mean of losses is, or piece by piece, as |x| is.

Their Gauss-Newton matrix is zero, and the step on λI alone is gradient descent at the rate 1/λ, whatever the scale of
model and loss: it may be far too long. In the place of H = 0 stands H = g gᵀ / S with S = Σ |g_i o_i|, the size of the
loss as a sum of shares of the outputs o. The first step then is -β Jᵀg with β = S / (|Jᵀg|² + λ S): no longer than 1/λ,
and not expected to take off more than S. For a loss that is a mean of losses S is the loss, and β the step size of
Polyak, as Loizou et al. 2021 take it for a batch ("Stochastic Polyak step-size for SGD", arXiv 2002.10542).

The outputs may come in parts, each with a loss of its own, and the loss be a mean of theirs. Its curvature is missing
where that of all parts is, those with closed forms too, and g and S are those of the whole. So a part tells of its own
Hessian only, with numbers whose mean over all parts says what stands in its place: `along_z`, float64[4],

    [g·Jz, S, more than zero if H Jz is not zero, more than zero if Jz is not zero].
"""

from __future__ import annotations

import torch
from torch import Tensor

from curveball_fused.backends.reference.closed_form_losses import Map, Products


class HessianProducts:
    """The products of a loss by its gradient and its Hessian, and whether the latter is zero, as seen on the device.

    Args:
        outputs: o.
        gradient: g.
        product: v ↦ H v; None for a loss whose gradient does not depend on the outputs.

    Attributes:
        size: S, 0-dim float64.
        along_z: of this part; None before Jz is known.
    """

    def __init__(self, outputs: Tensor, gradient: Tensor, product: Map | None) -> None:
        self._gradient = gradient
        self._product = product or torch.zeros_like
        self.size = _size(outputs, gradient)
        self.along_z: Tensor | None = None

    def products(self) -> Products:
        """Return the products that a step needs, with a sixth number: more than zero if H Ju is not zero."""
        return Products(lambda: self._gradient, self._at)

    def _at(self, v: Tensor) -> tuple[Tensor, Map]:
        gradient = self._gradient
        v = v.to(gradient.dtype)
        hv = self._product(v)
        first = (_dot(gradient, v), _dot(hv, v))
        self.along_z = torch.stack((first[0], self.size, _is_there(hv), _is_there(v)))

        def products_with(u: Tensor) -> Tensor:
            u = u.to(gradient.dtype)
            hu = self._product(u)
            return torch.stack((*first, _dot(gradient, u), _dot(hv, u), _dot(hu, u), _is_there(hu)))

        return gradient + hv, products_with


def along_z_of_closed_form(outputs: Tensor, gradient: Tensor, jz: Tensor, products: Tensor) -> Tensor:
    """Return the `along_z` of a loss with a closed form, whose H is positive or negative: HJz = 0 where Jz·HJz = 0.

    Args:
        outputs: o.
        gradient: g.
        jz: Jz.
        products: `[g·Jz, Jz·HJz, ...]`.
    """
    return torch.stack((products[0], _size(outputs, gradient), _is_there(products[1:2]), _is_there(jz)))


def with_sixth(products: Tensor) -> Tensor:
    """Return the five products of a loss with a closed form with the sixth number: HJu = 0 where Ju·HJu = 0."""
    return torch.cat((products, _is_there(products[4:])[None]))


def stretch(whole: Tensor) -> Tensor:
    """Return what g + H Jz, which is g where the curvature is missing, is multiplied by: 1 + g·Jz / S there, else 1.

    Args:
        whole: `along_z`, the mean of all parts.
    """
    slope, size, is_curved, _ = whole.unbind()
    return torch.where(is_curved == 0, 1 + _over(slope, size), 1.0)


def substituted(products: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Return the five products, of g gᵀ / S where the curvature is missing; and whether it is, 0-dim bool.

    All products of a step are of the same matrix. H is missing where H Jz = 0, or, if Jz = 0 says nothing, H Ju = 0.

    Args:
        products: float64[6], of the whole.
        whole: `along_z`, the mean of all parts.
    """
    _, size, is_curved, moves = whole.unbind()
    g_z, _, g_u = products[:3].unbind()
    missing = (is_curved == 0) & ((moves > 0) | (products[5] == 0))
    z, u = _over(g_z, size), _over(g_u, size)
    return torch.where(missing, torch.stack((g_z, g_z * z, g_u, g_z * u, g_u * u)), products[:5]), missing


def _over(slope: Tensor, size: Tensor) -> Tensor:
    return torch.where(size == 0, 0.0, slope / size)


def _size(outputs: Tensor, gradient: Tensor) -> Tensor:
    terms = torch.where(gradient == 0, 0, gradient * outputs)  # an output of -inf has no gradient
    return terms.abs().sum(dtype=torch.float64)


def _is_there(t: Tensor) -> Tensor:
    return (t != 0).any().double()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dtype=torch.float64)
