"""Gradient and Gauss-Newton product of torch's usual losses in closed form, with all their options.

Each function takes the arguments of the loss that it stands for, and returns None for a variant without a closed form.
JᵀHJ with these H is the Gauss-Newton matrix (Schraudolph 2002).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from curveball_fused.backends.dtypes import at_least_float32

Map = Callable[[Tensor], Tensor]
# Gradient g; a map v ↦ v' that takes off what H and g do not see; and the product v' ↦ H v'. With v' for v,
# v'·H v' is a sum of terms that are not negative, so that rounding can't make a convex loss look concave.
Quadratic = tuple[Tensor, Map, Map]


class Products(NamedTuple):
    """The products that a step needs of a loss at the outputs.

    Attributes:
        gradient: returns g.
        at: a function of v = Jz that returns the cotangent c = H v + g and a function of u = Jr, which returns the
            products of the 2x2 system, float64 [g·v, v·Hv, g·u, v·Hu, u·Hu], perhaps with more behind them.
    """

    gradient: Callable[[], Tensor]
    at: Callable[[Tensor], tuple[Tensor, Map]]


def products(quadratic: Quadratic, sign: float) -> Products:
    """Return the products of a loss, or, where `sign` is -1, of a loss that is to be maximized."""
    gradient, center, product = quadratic
    if sign < 0:
        gradient, product_of_loss = -gradient, product
        product = lambda v: -product_of_loss(v)  # noqa: E731

    def centered(v: Tensor) -> Tensor:
        return center(v.to(gradient.dtype))

    def at(v: Tensor) -> tuple[Tensor, Map]:
        v = centered(v)
        hv = product(v)
        first = (_dot(gradient, v), _dot(hv, v))

        def products_with(u: Tensor) -> Tensor:
            u = centered(u)
            return torch.stack((*first, _dot(gradient, u), _dot(hv, u), _dot(product(u), u)))

        return gradient + hv, products_with

    return Products(lambda: gradient, at)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dtype=torch.float64)


def itself(v: Tensor) -> Tensor:
    """Return v."""
    return v


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Quadratic | None:
    """Return the closed form of L = -1/D Σ_nc t_nc log p_nc, with p = softmax(input).

    With t = weight · ((1-ε) target + ε/C) and s_n = Σ_c t_nc:
    g = (s p - t)/D;  v' = v - <p, v>;  H v = s/D p v', positive semi-definite as s ≥ 0.

    Args:
        input: logits, `[C]` or `[N, C, ...]`.
        target: classes or probabilities.
        weight: of the classes, `[C]`, or None.
        size_average: torch's former option; a value has no closed form.
        ignore_index: the target of rows that do not count.
        reduce: torch's former option; a value has no closed form.
        reduction: "mean" or "sum"; "none" has no closed form.
        label_smoothing: ε.

    Returns:
        g, v ↦ v' and v' ↦ H v', or None.
    """
    if size_average is not None or reduce is not None or reduction not in ("mean", "sum"):
        return None
    dim = 0 if input.dim() == 1 else 1
    x, classes = at_least_float32(input.detach()), input.shape[dim]
    p = torch.softmax(x, dim)
    shape = [1] * x.dim()
    shape[dim] = classes
    w = x.new_ones(shape) if weight is None else weight.detach().to(x.dtype).view(shape)
    if target.is_floating_point():
        t = w * ((1 - label_smoothing) * target.detach().to(x.dtype) + label_smoothing / classes)
        s, scale = t.sum(dim, keepdim=True), float(classes) / max(x.numel(), 1)
        denominator = None
        g = p * s - t
    else:
        index, kept, own = _counted(target, weight, ignore_index, x, dim)
        denominator, scale = own.sum(), 1.0
        s, smooth = own, torch.zeros_like(own)
        if label_smoothing:
            own, smooth = (1 - label_smoothing) * own, label_smoothing / classes * (w * kept)
            s = own + label_smoothing / classes * (w.sum() * kept)
        g = (p * s).sub_(smooth).scatter_add_(dim, index, -own)
    if reduction == "mean":
        s = s * scale if denominator is None else s / denominator
        g = g.mul_(scale) if denominator is None else g.div_(denominator)
    h = p * s
    return g, lambda v: v - (p * v).sum(dim, keepdim=True), lambda v: h * v


def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Quadratic | None:
    """Return the closed form of L = -1/D Σ_n s_n input_n,target, for inputs that are log-probabilities.

    As such they are logits of themselves, for which the same loss is `cross_entropy`, whose curvature this is: with
    p = softmax(input), H v = s/D p (v - <p, v>). JᵀHJ is the same as for the logits that they were made of. The
    gradient, g = -s/D at the targets, is this loss's own, so that it is right for any other input, too.

    Args:
        input: log-probabilities, `[C]` or `[N, C, ...]`.
        target: classes.
        weight: of the classes, `[C]`, or None.
        size_average: torch's former option; a value has no closed form.
        ignore_index: the target of rows that do not count.
        reduce: torch's former option; a value has no closed form.
        reduction: "mean" or "sum"; "none" has no closed form.

    Returns:
        g, the identity, as <p, v> is zero of log-probabilities' tangents but for rounding, and v ↦ H v; or None.
    """
    if size_average is not None or reduce is not None or reduction not in ("mean", "sum"):
        return None
    dim = 0 if input.dim() == 1 else 1
    x = at_least_float32(input.detach())
    index, _, s = _counted(target, weight, ignore_index, x, dim)
    if reduction == "mean":
        s = s / s.sum()
    p = torch.softmax(x, dim)
    h = p * s
    g = torch.zeros_like(x).scatter_(dim, index, -s)
    return g, itself, lambda v: h * (v - (p * v).sum(dim, keepdim=True))


def _counted(
    target: Tensor, weight: Tensor | None, ignore_index: int, x: Tensor, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the targets as indices along `dim`, which of them are not ignored, and the weights of their classes.

    An ignored target has index and weight 0.
    """
    index = target.long().unsqueeze(dim)
    kept = index != ignore_index
    index = index.where(kept, 0)
    own = kept.to(x.dtype) if weight is None else weight.detach().to(x.dtype)[index] * kept
    return index, kept, own


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Quadratic | None:
    """Return the closed form of L = s Σ (input - target)², s = 1/n for the mean: g = 2 s (input - target), H = 2 s."""
    plain = size_average is None and reduce is None and weight is None and input.shape == target.shape
    if not plain or reduction not in ("mean", "sum"):
        return None
    x = at_least_float32(input.detach())
    scale = 2.0 / (max(x.numel(), 1) if reduction == "mean" else 1)
    return (x - target.detach()).mul_(scale), itself, lambda v: scale * v


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Quadratic | None:
    """Return the closed form of L = s Σ w [(1-y) x + k softplus(-x)], k = 1 + (pos_weight - 1) y.

    g = s w (1 - y - k σ(-x));  H = s w k σ(x) σ(-x).

    Args:
        input: logits x.
        target: probabilities y.
        weight: w, which broadcasts to x, or None.
        size_average: torch's former option; a value has no closed form.
        reduce: torch's former option; a value has no closed form.
        reduction: "mean" or "sum"; "none" has no closed form.
        pos_weight: broadcasts to x, or None.

    Returns:
        g, the identity and v ↦ H v, or None.
    """
    if size_average is not None or reduce is not None or reduction not in ("mean", "sum"):
        return None
    x = at_least_float32(input.detach())
    y = target.detach().to(x.dtype)
    scale = (x.numel() and 1.0 / x.numel()) if reduction == "mean" else 1.0
    w = scale if weight is None else scale * weight.detach().to(x.dtype)
    k = 1.0 if pos_weight is None else 1 + (pos_weight.detach().to(x.dtype) - 1) * y
    below = torch.sigmoid(-x)
    h = w * k * below * torch.sigmoid(x)
    return w * (1 - y - k * below), itself, lambda v: h * v


CLOSED_FORMS: dict[Any, Callable[..., Quadratic | None]] = {
    F.cross_entropy: cross_entropy,
    F.nll_loss: nll_loss,
    F.mse_loss: mse_loss,
    F.binary_cross_entropy_with_logits: binary_cross_entropy_with_logits,
}
