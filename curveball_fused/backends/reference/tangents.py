"""The tangent operators in plain torch: the specification, and what runs where no kernel does. Any device and dtype.

Arithmetic is in float32 at least; results have the dtype of the arguments.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curveball_fused import _torch_private
from curveball_fused.backends.dtypes import at_least_float32


def layer_norm_tangent(
    dx: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> Tensor:
    """Return ẏ = γ r (ẋ - <ẋ> - x̂ <x̂ẋ>) + γ̇ x̂ + β̇, x̂ = r (x - mean), with means over a row; RMS norm without `mean`."""
    rstd = rstd.unsqueeze(1)
    dx_, x_ = at_least_float32(dx), at_least_float32(x)
    x_hat = (x_ if mean is None else x_ - mean.unsqueeze(1)) * rstd
    centered = dx_ if mean is None else dx_ - dx_.mean(1, keepdim=True)
    normal = rstd * (centered - x_hat * (x_hat * dx_).mean(1, keepdim=True))
    return _affine(normal, x_hat, weight, dweight, dbias).to(x.dtype)


def batch_norm_tangent(
    dx: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    training: bool,
) -> Tensor:
    """Return the same with means over a channel; ẏ = γ r ẋ + γ̇ x̂ + β̇ for constant statistics, if not `training`."""
    shape = (-1, *(1,) * (x.dim() - 2))
    dims = [d for d in range(x.dim()) if d != 1]
    mean, rstd = mean.view(shape), rstd.view(shape)
    weight, dweight, dbias = (None if t is None else t.view(shape) for t in (weight, dweight, dbias))
    dx_, x_hat = at_least_float32(dx), (at_least_float32(x) - mean) * rstd
    normal = rstd * dx_
    if training:
        products = (x_hat * dx_).mean(dims, keepdim=True)
        normal = rstd * (dx_ - dx_.mean(dims, keepdim=True) - x_hat * products)
    return torch.empty_like(x).copy_(_affine(normal, x_hat, weight, dweight, dbias))


def attention_tangent(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """Return Ȯ = (P∘Ṡ) v + P v̇ - <P, Ṡ> O, with S = s q kᵀ + mask, P = softmax(S) and Ṡ = s (q̇ kᵀ + q k̇ᵀ)."""
    dtype = q.dtype
    dq, dk, dv, q, k, v, out = (at_least_float32(t) for t in (dq, dk, dv, q, k, v, out))
    scores = scale * (q @ k.mT)
    if mask is not None:
        scores = scores + mask
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    # A row that is masked throughout becomes zero.
    p = _torch_private.safe_softmax(scores, -1) if scores.numel() else scores
    p_ds = p * (scale * (dq @ k.mT + q @ dk.mT))
    tangent = p_ds @ v + p @ dv - p_ds.sum(-1, keepdim=True) * out
    return tangent.new_empty(tangent.transpose(1, 2).shape, dtype=dtype).transpose(1, 2).copy_(tangent)


def activation(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return f(x) and f'(x), for "gelu", "gelu_tanh" and "silu"."""
    x_ = at_least_float32(x)
    if name == "gelu":
        below = 0.5 * torch.special.erfc(-x_ / math.sqrt(2))
        y, derivative = x_ * below, below + x_ * torch.exp(-0.5 * x_ * x_) / math.sqrt(2 * math.pi)
    else:
        a, slope = x_, torch.ones_like(x_)
        if name == "gelu_tanh":  # ½ (1 + tanh(a/2)) is the logistic function of a
            a, slope = (2 * math.sqrt(2 / math.pi) * f for f in (x_ + 0.044715 * x_**3, 1 + 0.134145 * x_**2))
        below = torch.sigmoid(a)
        y = x_ * below
        derivative = below + y * torch.sigmoid(-a) * slope
    return y.to(x.dtype), derivative.to(x.dtype)


def _affine(
    normal: Tensor, x_hat: Tensor, weight: Tensor | None, dweight: Tensor | None, dbias: Tensor | None
) -> Tensor:
    """Return γ normal + γ̇ x̂ + β̇."""
    tangent = normal if weight is None else weight * normal
    if dweight is not None:
        tangent = tangent + dweight * x_hat
    return tangent if dbias is None else tangent + dbias
