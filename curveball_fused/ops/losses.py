"""The typed face of the fused loss kernels: for each loss two calls, before and after the pull-back.

x are the model's outputs, v = Jz and u = Jr their tangents along z and r. The first call reads x and v and gives the
loss, the cotangent c = Hv + g and `[g·v, v·Hv]`; the second reads x, v and u and gives `[g·v, v·Hv, g·u, v·Hu, u·Hu]`,
all that the 2x2 system needs. `reference_losses` says in plain torch what they compute.

All tensors lie contiguous on one device. x is float16, bfloat16, float32 or float64; v, u, c share its shape and dtype.
Arithmetic is in float64 for float64, else in float32, sums are float64. `mean` says whether the loss is a mean or a
sum; `sign` = -1 stands for a loss that is maximized: it turns g and H, not the loss. A tensor that does not fit the
others raises ValueError, as does an unknown backend; a named one that cannot run raises RuntimeError.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curveball_fused import backends


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
    """Cross-entropy of logits x, `[N, C]`, with class indices `target`, int64 `[N]`, and class weights `[C]`.

    Returns:
        loss, 0-dim float64; c, `[N, C]`; products, float64 `[g·v, v·Hv]`; rows, which the second call wants back.
    """
    _check_classes(x, target, weight)
    _check_like(x, v=v)
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
    rows: Tensor,
    products: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    mean: bool = True,
    label_smoothing: float = 0.0,
    sign: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """All five products of `cross_entropy_cotangent`' loss, float64; `rows` and `products` are what it returned."""
    _check_classes(x, target, weight)
    _check_like(x, v=v, u=u)
    result: Tensor = _kernels(backend, x).cross_entropy_products(
        x, v, u, target, weight, rows, products, ignore_index, mean, label_smoothing, sign
    )
    return result


@torch.no_grad()
def mse_cotangent(
    x: Tensor, v: Tensor, target: Tensor, *, mean: bool = True, sign: float = 1.0, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error of x and `target`, of the same shape and dtype. Returns loss, c, products as for cross-entropy."""
    _check_like(x, v=v, target=target)
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
    """All five products of `mse_cotangent`' loss, float64."""
    _check_like(x, v=v, u=u, target=target)
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
    """Binary cross-entropy with logits x and `target` of the same shape and dtype; loss, c, products as above.

    `weight` and `pos_weight` are of x's trailing dimensions and of the dtype of the arithmetic.
    """
    _check_like(x, v=v, target=target)
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
    """All five products of `bce_cotangent`' loss, float64."""
    _check_like(x, v=v, u=u, target=target)
    result: Tensor = _kernels(backend, x).bce_products(x, v, u, target, weight, pos_weight, products, mean, sign)
    return result


def _check_like(x: Tensor, **others: Tensor) -> None:
    for name, t in others.items():
        if t.shape != x.shape or t.dtype != x.dtype or t.device != x.device:
            raise ValueError(
                f"{name} is {t.dtype}{list(t.shape)} on {t.device}, x is {x.dtype}{list(x.shape)} on {x.device}: they "
                "must agree."
            )
    for name, t in dict(x=x, **others).items():
        if not t.is_contiguous():
            raise ValueError(f"{name} is not contiguous: call .contiguous() on it first.")


def _check_classes(x: Tensor, target: Tensor, weight: Tensor | None) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be [rows, classes]; it has shape {list(x.shape)}.")
    if target.dtype != torch.int64 or target.shape != x.shape[:1] or target.device != x.device:
        raise ValueError(
            f"target must be int64[{x.shape[0]}] on {x.device}, a class for each row of x; it is "
            f"{target.dtype}{list(target.shape)} on {target.device}."
        )
    if weight is not None and (weight.shape != x.shape[1:] or weight.device != x.device):
        raise ValueError(
            f"weight must have one element for each of the {x.shape[1]} classes, on {x.device}; it has shape "
            f"{list(weight.shape)} on {weight.device}."
        )
    if not target.is_contiguous():
        raise ValueError("target is not contiguous: call .contiguous() on it first.")


def _kernels(backend: str, x: Tensor) -> Any:
    return backends.loss_kernels(backends.choose(backend, x.device))


if backends.has_operators():

    @torch.library.register_fake("curveball_fused::cross_entropy_cotangent")
    def _(x, v, target, weight, ignore_index, mean, label_smoothing, sign):  # type: ignore[no-untyped-def]
        arithmetic = torch.float64 if x.dtype == torch.float64 else torch.float32
        return *_fake_products(x), x.new_empty((x.shape[0], 3), dtype=arithmetic)

    @torch.library.register_fake("curveball_fused::mse_cotangent")
    def _(x, v, target, mean, sign):  # type: ignore[no-untyped-def]
        return _fake_products(x)

    @torch.library.register_fake("curveball_fused::bce_cotangent")
    def _(x, v, target, weight, pos_weight, mean, sign):  # type: ignore[no-untyped-def]
        return _fake_products(x)

    for name in ("cross_entropy_products", "mse_products", "bce_products"):
        torch.library.register_fake(f"curveball_fused::{name}", lambda x, *_: x.new_empty(5, dtype=torch.float64))


def _fake_products(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, c and products by their shapes."""
    return x.new_empty((), dtype=torch.float64), torch.empty_like(x), x.new_empty(2, dtype=torch.float64)
