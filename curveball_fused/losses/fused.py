"""Which calls of torch's losses the fused kernels serve, and how they are put to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curveball_fused import backends
from curveball_fused.backends.reference.closed_forms import Map, Products
from curveball_fused.ops import losses as loss_ops


def fused(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], sign: float, backend: str) -> Products | None:
    """Return the products of the loss `function(*args, **kwargs)` by kernels; None where none serves device or call.

    Raises:
        RuntimeError: `backend` names one that cannot run here.
    """
    x = args[0]
    if not backends.has_fused_losses(backends.choose(backend, x.device)):
        return None
    return _FUSED[function](sign, backend, *args, **kwargs)


def _cross_entropy(
    sign: float,
    backend: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Products | None:
    if _is_old_style(size_average, reduce, reduction) or input.dim() != 2 or target.is_floating_point():
        return None
    x, y, w = input.detach().contiguous(), target.long().contiguous(), _constant(weight, input)
    options: dict[str, Any] = dict(ignore_index=ignore_index, mean=reduction == "mean", label_smoothing=label_smoothing)
    options |= dict(sign=sign, backend=backend)

    def at(v: Tensor) -> tuple[Tensor, Map]:
        v = v.contiguous()
        _, c, products, rows = loss_ops.cross_entropy_cotangent(x, v, y, w, **options)
        return c, lambda u: loss_ops.cross_entropy_products(x, v, u.contiguous(), y, rows, products, w, **options)

    return Products(lambda: at(torch.zeros_like(x))[0], at)  # the kernels give c = H v + g at once


def _mse_loss(
    sign: float,
    backend: str,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Products | None:
    if _is_old_style(size_average, reduce, reduction) or weight is not None or not _fits(target, input):
        return None
    x, y = input.detach().contiguous(), target.detach().to(input.dtype).contiguous()
    options: dict[str, Any] = dict(mean=reduction == "mean", sign=sign, backend=backend)

    def at(v: Tensor) -> tuple[Tensor, Map]:
        v = v.contiguous()
        _, c, products = loss_ops.mse_cotangent(x, v, y, **options)
        return c, lambda u: loss_ops.mse_products(x, v, u.contiguous(), y, products, **options)

    return Products(lambda: at(torch.zeros_like(x))[0], at)  # the kernels give c = H v + g at once


def _binary_cross_entropy_with_logits(
    sign: float,
    backend: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Products | None:
    if _is_old_style(size_average, reduce, reduction) or not _fits(target, input):
        return None
    if not (_trails(weight, input) and _trails(pos_weight, input)):
        return None
    x, y = input.detach().contiguous(), target.detach().to(input.dtype).contiguous()
    w, k = _constant(weight, input), _constant(pos_weight, input)
    options: dict[str, Any] = dict(mean=reduction == "mean", sign=sign, backend=backend)

    def at(v: Tensor) -> tuple[Tensor, Map]:
        v = v.contiguous()
        _, c, products = loss_ops.bce_cotangent(x, v, y, w, k, **options)
        return c, lambda u: loss_ops.bce_products(x, v, u.contiguous(), y, products, w, k, **options)

    return Products(lambda: at(torch.zeros_like(x))[0], at)  # the kernels give c = H v + g at once


def _is_old_style(size_average: bool | None, reduce: bool | None, reduction: str) -> bool:
    return size_average is not None or reduce is not None or reduction not in ("mean", "sum")


def _fits(target: Tensor, x: Tensor) -> bool:
    """Whether the target is of x's shape and can be put in x's dtype without rounding."""
    return target.shape == x.shape and torch.promote_types(target.dtype, x.dtype) == x.dtype


def _trails(weight: Tensor | None, x: Tensor) -> bool:
    """Whether `weight` is laid out as the trailing dimensions of x, so that element i of x meets entry i % numel."""
    return weight is None or weight.shape == x.shape[x.dim() - weight.dim() :]


def _constant(weight: Tensor | None, x: Tensor) -> Tensor | None:
    """In the dtype of the arithmetic."""
    if weight is None:
        return None
    return weight.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()


_FUSED: dict[Any, Callable[..., Products | None]] = {
    F.cross_entropy: _cross_entropy,
    F.mse_loss: _mse_loss,
    F.binary_cross_entropy_with_logits: _binary_cross_entropy_with_logits,
}
