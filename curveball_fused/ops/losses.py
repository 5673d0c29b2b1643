"""The operators on a model's outputs: for each loss two calls, before and after the vector-Jacobian product.

x are the model's outputs, v = Jz and u = Jr their tangents along z and r, g and H the loss's gradient and Hessian in x.
The first call reads x and v and gives the loss, the cotangent c = Hv + g and `[g·v, v·Hv]`; the second reads x, v and u
and gives `[g·v, v·Hv, g·u, v·Hu, u·Hu]`, all that the 2x2 system needs. Together with J and Jᵀ these are products with
the Gauss-Newton matrix JᵀHJ (Schraudolph 2002). `backends.reference.losses` says in plain torch what they compute.

All tensors lie contiguous on one device. Arithmetic is in float64 for float64, else in float32; sums are float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curveball_fused import backends
from curveball_fused.backends.dtypes import compute_dtype

from ._checks import check_classes, check_contiguous, check_like


@torch.no_grad()
def cross_entropy_cotangent(
    x: Tensor,
    v: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    mean: bool = True,
    label_smoothing: float = 0.0,
    sign: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, cotangent c = Hv + g and `[g·v, v·Hv]` of the cross-entropy of logits with class indices.

    A tensor that does not fit the others raises ValueError, as does an unknown backend.

    Args:
        x: logits, `[N, C]`, float16, bfloat16, float32 or float64, contiguous.
        v: tangent Jz of x, like x.
        target: classes, int64 `[N]`, contiguous.
        weight: of the classes, `[C]`, float64 for float64 x, else float32; None (default) for ones.
        ignore_index: the target of rows that do not count (default: -100).
        mean: whether the loss is divided by the sum of the targets' weights (default), else a sum.
        label_smoothing: from 0 (default) to 1.
        sign: 1 (default), or -1 for a loss that is maximized: multiplies g and H, not the loss.
        backend: "auto" (default), "cuda", "triton", "cpu" or "torch"; one that cannot run here raises RuntimeError.

    Returns:
        The loss, 0-dim float64; c, `[N, C]`, like x; products, float64 `[g·v, v·Hv]`; row_stats, numbers of each row
        that the second call wants back.

    Example::

        loss, c, products, row_stats = ops.losses.cross_entropy_cotangent(x, v, target)
        u = jvp(vjp(c))
        products = ops.losses.cross_entropy_products(x, v, u, target, row_stats, products)
    """
    check_classes(x, target, weight)
    check_like(x, v=v)
    check_contiguous(x=x, v=v)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _kernels(backend, x).cross_entropy_cotangent(
        x, v, target, weight, ignore_index, mean, label_smoothing, sign
    )
    return result


@torch.no_grad()
def cross_entropy_products(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    target: Tensor,
    row_stats: Tensor,
    products: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    mean: bool = True,
    label_smoothing: float = 0.0,
    sign: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Return all five products of the loss of `cross_entropy_cotangent`, where there is an example.

    A tensor that does not fit the others raises ValueError, as does an unknown backend.

    Args:
        x: logits, `[N, C]`, float16, bfloat16, float32 or float64, contiguous.
        v: tangent Jz of x, like x.
        u: tangent Jr of x, like x.
        target: classes, int64 `[N]`, contiguous.
        row_stats: what `cross_entropy_cotangent` returned for the same arguments.
        products: likewise.
        weight: of the classes, `[C]`, float64 for float64 x, else float32; None (default) for ones.
        ignore_index: the target of rows that do not count (default: -100).
        mean: whether the loss is divided by the sum of the targets' weights (default), else a sum.
        label_smoothing: from 0 (default) to 1.
        sign: 1 (default), or -1 for a loss that is maximized: multiplies g and H, not the loss.
        backend: "auto" (default), "cuda", "triton", "cpu" or "torch"; one that cannot run here raises RuntimeError.

    Returns:
        Float64 `[g·v, v·Hv, g·u, v·Hu, u·Hu]`.
    """
    check_classes(x, target, weight)
    check_like(x, v=v, u=u)
    check_contiguous(x=x, v=v, u=u)
    result: Tensor = _kernels(backend, x).cross_entropy_products(
        x, v, u, target, weight, row_stats, products, ignore_index, mean, label_smoothing, sign
    )
    return result


@torch.no_grad()
def mse_cotangent(
    x: Tensor, v: Tensor, target: Tensor, *, mean: bool = True, sign: float = 1.0, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, cotangent c = Hv + g and `[g·v, v·Hv]` of the squared error of outputs.

    A tensor that does not fit the others raises ValueError, as does an unknown backend.

    Args:
        x: outputs of the model, float16, bfloat16, float32 or float64, of any shape, contiguous.
        v: tangent Jz of x, like x.
        target: like x.
        mean: whether the loss is the mean over elements (default), else a sum.
        sign: 1 (default), or -1 for a loss that is maximized: multiplies g and H, not the loss.
        backend: "auto" (default), "cuda", "triton", "cpu" or "torch"; one that cannot run here raises RuntimeError.

    Returns:
        The loss, 0-dim float64; c, like x; products, float64 `[g·v, v·Hv]`.

    Example::

        loss, c, products = ops.losses.mse_cotangent(x, v, target)
        u = jvp(vjp(c))
        products = ops.losses.mse_products(x, v, u, target, products)
    """
    check_like(x, v=v, target=target)
    check_contiguous(x=x, v=v, target=target)
    result: tuple[Tensor, Tensor, Tensor] = _kernels(backend, x).mse_cotangent(x, v, target, mean, sign)
    return result


@torch.no_grad()
def mse_products(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    target: Tensor,
    products: Tensor,
    *,
    mean: bool = True,
    sign: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Return all five products of the loss of `mse_cotangent`, where there is an example.

    A tensor that does not fit the others raises ValueError, as does an unknown backend.

    Args:
        x: outputs of the model, float16, bfloat16, float32 or float64, of any shape, contiguous.
        v: tangent Jz of x, like x.
        u: tangent Jr of x, like x.
        target: like x.
        products: what `mse_cotangent` returned for the same arguments.
        mean: whether the loss is the mean over elements (default), else a sum.
        sign: 1 (default), or -1 for a loss that is maximized: multiplies g and H, not the loss.
        backend: "auto" (default), "cuda", "triton", "cpu" or "torch"; one that cannot run here raises RuntimeError.

    Returns:
        Float64 `[g·v, v·Hv, g·u, v·Hu, u·Hu]`.
    """
    check_like(x, v=v, u=u, target=target)
    check_contiguous(x=x, v=v, u=u, target=target)
    result: Tensor = _kernels(backend, x).mse_products(x, v, u, target, products, mean, sign)
    return result


@torch.no_grad()
def bce_cotangent(
    x: Tensor,
    v: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    *,
    mean: bool = True,
    sign: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, cotangent c = Hv + g and `[g·v, v·Hv]` of the binary cross-entropy of logits.

    A tensor that does not fit the others raises ValueError, as does an unknown backend.

    Args:
        x: logits, float16, bfloat16, float32 or float64, of any shape, contiguous.
        v: tangent Jz of x, like x.
        target: probabilities, like x.
        weight: of the elements, of x's trailing dimensions, contiguous, float64 for float64 x, else float32; None
            (default) for ones.
        pos_weight: of the positive targets, likewise.
        mean: whether the loss is the mean over elements (default), else a sum.
        sign: 1 (default), or -1 for a loss that is maximized: multiplies g and H, not the loss.
        backend: "auto" (default), "cuda", "triton", "cpu" or "torch"; one that cannot run here raises RuntimeError.

    Returns:
        The loss, 0-dim float64; c, like x; products, float64 `[g·v, v·Hv]`.

    Example::

        loss, c, products = ops.losses.bce_cotangent(x, v, target, pos_weight=weight)
        u = jvp(vjp(c))
        products = ops.losses.bce_products(x, v, u, target, products, pos_weight=weight)
    """
    check_like(x, v=v, target=target)
    check_contiguous(x=x, v=v, target=target)
    result: tuple[Tensor, Tensor, Tensor] = _kernels(backend, x).bce_cotangent(
        x, v, target, weight, pos_weight, mean, sign
    )
    return result


@torch.no_grad()
def bce_products(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    target: Tensor,
    products: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    *,
    mean: bool = True,
    sign: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Return all five products of the loss of `bce_cotangent`, where there is an example.

    A tensor that does not fit the others raises ValueError, as does an unknown backend.

    Args:
        x: logits, float16, bfloat16, float32 or float64, of any shape, contiguous.
        v: tangent Jz of x, like x.
        u: tangent Jr of x, like x.
        target: probabilities, like x.
        products: what `bce_cotangent` returned for the same arguments.
        weight: of the elements, of x's trailing dimensions, contiguous, float64 for float64 x, else float32; None
            (default) for ones.
        pos_weight: of the positive targets, likewise.
        mean: whether the loss is the mean over elements (default), else a sum.
        sign: 1 (default), or -1 for a loss that is maximized: multiplies g and H, not the loss.
        backend: "auto" (default), "cuda", "triton", "cpu" or "torch"; one that cannot run here raises RuntimeError.

    Returns:
        Float64 `[g·v, v·Hv, g·u, v·Hu, u·Hu]`.
    """
    check_like(x, v=v, u=u, target=target)
    check_contiguous(x=x, v=v, u=u, target=target)
    result: Tensor = _kernels(backend, x).bce_products(x, v, u, target, weight, pos_weight, products, mean, sign)
    return result


def _kernels(backend: str, x: Tensor) -> Any:
    return backends.loss_kernels(backends.choose(backend, x.device))


if backends.has_operators():

    @torch.library.register_fake("curveball_fused::cross_entropy_cotangent")
    def _(x, v, target, weight, ignore_index, mean, label_smoothing, sign):  # type: ignore[no-untyped-def]
        return *_fake_cotangent(x), x.new_empty((x.shape[0], 3), dtype=compute_dtype(x.dtype))

    @torch.library.register_fake("curveball_fused::mse_cotangent")
    def _(x, v, target, mean, sign):  # type: ignore[no-untyped-def]
        return _fake_cotangent(x)

    @torch.library.register_fake("curveball_fused::bce_cotangent")
    def _(x, v, target, weight, pos_weight, mean, sign):  # type: ignore[no-untyped-def]
        return _fake_cotangent(x)

    for _name in ("cross_entropy_products", "mse_products", "bce_products"):
        torch.library.register_fake(f"curveball_fused::{_name}", lambda x, *_: x.new_empty(5, dtype=torch.float64))


def _fake_cotangent(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, c and products by their shapes."""
    return x.new_empty((), dtype=torch.float64), torch.empty_like(x), x.new_empty(2, dtype=torch.float64)
