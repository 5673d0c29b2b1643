"""The loss operators in plain torch: the specification of the fused kernels, and what runs where there are none.

x are the model's outputs, v = Jz and u = Jr their tangents along z and r, g and H gradient and Gauss-Newton curvature
of the loss in x (see `closed_form_losses`), both multiplied by `sign`. Each `*_cotangent` gives the loss, c = Hv + g
and float64 `[g·v, v·Hv]`; each `*_products`, later, `[g·v, v·Hv, g·u, v·Hu, u·Hu]`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curveball_fused.backends.dtypes import at_least_float32

from . import closed_form_losses
from .closed_form_losses import Products


def cross_entropy_cotangent(
    x: Tensor,
    v: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    mean: bool,
    label_smoothing: float,
    sign: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, c, products, and, in place of what the fused kernels keep of every row, nothing."""
    options = dict(ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=_reduction(mean))
    loss = F.cross_entropy(at_least_float32(x), target, weight, **options)  # type: ignore[arg-type]
    return *_first(_quadratic(closed_form_losses.cross_entropy, sign, x, target, weight, **options), loss, x, v), x[:0]


def cross_entropy_products(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_stats: Tensor,
    products: Tensor,
    ignore_index: int,
    mean: bool,
    label_smoothing: float,
    sign: float,
) -> Tensor:
    """Return all five products."""
    options = dict(ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=_reduction(mean))
    return _quadratic(closed_form_losses.cross_entropy, sign, x, target, weight, **options).at(v)[1](u)


def mse_cotangent(x: Tensor, v: Tensor, target: Tensor, mean: bool, sign: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, c, products."""
    loss = F.mse_loss(at_least_float32(x), at_least_float32(target), reduction=_reduction(mean))
    return _first(_quadratic(closed_form_losses.mse_loss, sign, x, target, reduction=_reduction(mean)), loss, x, v)


def mse_products(x: Tensor, v: Tensor, u: Tensor, target: Tensor, products: Tensor, mean: bool, sign: float) -> Tensor:
    """Return all five products."""
    return _quadratic(closed_form_losses.mse_loss, sign, x, target, reduction=_reduction(mean)).at(v)[1](u)


def bce_cotangent(
    x: Tensor, v: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, mean: bool, sign: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, c, products."""
    options = dict(weight=weight, pos_weight=pos_weight, reduction=_reduction(mean))
    loss = F.binary_cross_entropy_with_logits(at_least_float32(x), at_least_float32(target), **options)  # type: ignore[arg-type]
    return _first(
        _quadratic(closed_form_losses.binary_cross_entropy_with_logits, sign, x, target, **options), loss, x, v
    )


def bce_products(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    products: Tensor,
    mean: bool,
    sign: float,
) -> Tensor:
    """Return all five products."""
    options = dict(weight=weight, pos_weight=pos_weight, reduction=_reduction(mean))
    return _quadratic(closed_form_losses.binary_cross_entropy_with_logits, sign, x, target, **options).at(v)[1](u)


def _reduction(mean: bool) -> str:
    return "mean" if mean else "sum"


def _quadratic(form: Any, sign: float, *args: Any, **kwargs: Any) -> Products:
    quadratic = form(*args, **kwargs)
    assert quadratic is not None
    return closed_form_losses.products(quadratic, sign)


def _first(products: Products, loss: Tensor, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    c, products_with = products.at(v)
    return loss.double(), c.to(x.dtype), products_with(torch.zeros_like(v))[:2]
