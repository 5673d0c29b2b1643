"""Which calls of torch's losses the fused kernels serve, and how they are put to them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curveball_fused import backends
from curveball_fused.backends.dtypes import compute_dtype
from curveball_fused.backends.reference.closed_form_losses import Map, Products
from curveball_fused.ops import losses as loss_ops


@functools.cache
def _defaults(function: Any) -> dict[str, Any]:
    """Return the names of a loss's arguments, in their order, with their defaults."""
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def fused(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], sign: float, backend: str) -> Products | None:
    """Return the products of the loss `function(*args, **kwargs)` by kernels; None where none serves device or call.

    Raises:
        RuntimeError: `backend` names one that cannot run here.
    """
    if function not in _FUSED or not backends.has_fused_losses(backends.choose(backend, args[0].device)):
        return None
    defaults = _defaults(function)
    given = defaults | dict(zip(defaults, args, strict=False)) | kwargs  # the loss itself has taken them already
    if given["size_average"] is not None or given["reduce"] is not None or given["reduction"] not in ("mean", "sum"):
        return None
    return _FUSED[function](given, dict(mean=given["reduction"] == "mean", sign=sign, backend=backend))


def _cross_entropy(given: dict[str, Any], options: dict[str, Any]) -> Products | None:
    input, target = given["input"], given["target"]
    if input.dim() != 2 or target.is_floating_point():
        return None
    x, y, w = input.detach().contiguous(), target.long().contiguous(), _constant(given["weight"], input)
    options |= dict(ignore_index=given["ignore_index"], label_smoothing=given["label_smoothing"])

    def at(v: Tensor) -> tuple[Tensor, Map]:
        v = v.contiguous()
        _, c, products, row_stats = loss_ops.cross_entropy_cotangent(x, v, y, w, **options)
        return c, lambda u: loss_ops.cross_entropy_products(x, v, u.contiguous(), y, row_stats, products, w, **options)

    return _products(x, at)


def _mse_loss(given: dict[str, Any], options: dict[str, Any]) -> Products | None:
    input, target = given["input"], given["target"]
    if given["weight"] is not None or not _fits(target, input):
        return None
    x, y = input.detach().contiguous(), target.detach().to(input.dtype).contiguous()

    def at(v: Tensor) -> tuple[Tensor, Map]:
        v = v.contiguous()
        _, c, products = loss_ops.mse_cotangent(x, v, y, **options)
        return c, lambda u: loss_ops.mse_products(x, v, u.contiguous(), y, products, **options)

    return _products(x, at)


def _binary_cross_entropy_with_logits(given: dict[str, Any], options: dict[str, Any]) -> Products | None:
    input, target, weight, pos_weight = (given[name] for name in ("input", "target", "weight", "pos_weight"))
    if not (_fits(target, input) and _trails(weight, input) and _trails(pos_weight, input)):
        return None
    x, y = input.detach().contiguous(), target.detach().to(input.dtype).contiguous()
    w, k = _constant(weight, input), _constant(pos_weight, input)

    def at(v: Tensor) -> tuple[Tensor, Map]:
        v = v.contiguous()
        _, c, products = loss_ops.bce_cotangent(x, v, y, w, k, **options)
        return c, lambda u: loss_ops.bce_products(x, v, u.contiguous(), y, products, w, k, **options)

    return _products(x, at)


def _products(x: Tensor, at: Callable[[Tensor], tuple[Tensor, Map]]) -> Products:
    """Return `at` with the gradient beside it, which the kernels give as c = H v + g of v = 0."""
    return Products(lambda: at(torch.zeros_like(x))[0], at)


def _fits(target: Tensor, x: Tensor) -> bool:
    """Return whether the target is of x's shape and can be put in x's dtype without rounding."""
    return target.shape == x.shape and torch.promote_types(target.dtype, x.dtype) == x.dtype


def _trails(weight: Tensor | None, x: Tensor) -> bool:
    """Return whether `weight` has x's trailing dimensions, so that element i of x meets entry i % numel."""
    return weight is None or weight.shape == x.shape[x.dim() - weight.dim() :]


def _constant(weight: Tensor | None, x: Tensor) -> Tensor | None:
    """Return `weight` in the dtype of the arithmetic."""
    return None if weight is None else weight.detach().to(compute_dtype(x.dtype)).contiguous()


_FUSED: dict[Any, Callable[[dict[str, Any], dict[str, Any]], Products | None]] = {
    F.cross_entropy: _cross_entropy,
    F.mse_loss: _mse_loss,
    F.binary_cross_entropy_with_logits: _binary_cross_entropy_with_logits,
}
