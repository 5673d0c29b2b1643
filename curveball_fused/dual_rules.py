"""Our own forward-mode rules for the functions in which a model spends its time.

torch builds the tangent of these functions from many elementwise calls, each a pass over memory. Each rule here
computes output and tangent with the fewest passes, using that the derivatives of the normalisations and of softmax
with respect to their input are symmetric: their fused backward kernels are also their Jacobian-vector products.

A rule takes the arguments of its function, any of which may be dual, and returns the dual result, or `NotImplemented`
for a case that it leaves to torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[Tensor, "Tensor | None"]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """y = x Wᵀ + b;  ẏ = ẋ Wᵀ + ḃ + x Ẇᵀ, the last product added in place."""
    (x, dx), (w, dw), (b, db) = _pair(input), _pair(weight), _pair(bias)
    if dx is None and dw is None:
        return NotImplemented
    output, rows = F.linear(x, w, b), x.reshape(-1, x.shape[-1])
    if dx is None:
        return fwAD.make_dual(output, F.linear(x, dw, db))  # type: ignore[arg-type]
    tangent = F.linear(dx.reshape(rows.shape), w, db)
    if dw is not None:
        tangent.addmm_(rows, dw.t())
    return fwAD.make_dual(output, tangent.view(output.shape))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """y = γ x̂ + β;  ẏ = γ ∂x̂/∂x ẋ + γ̇ x̂ + β̇. ∂x̂/∂x is symmetric, so the first term is the backward kernel's."""
    (x, dx), (w, dw), (b, db) = _pair(input), _pair(weight), _pair(bias)
    if dx is None or w is None or dw is None or db is None or x.device.type != "cpu" or x.dtype != w.dtype:
        return NotImplemented
    output, mean, inverse = torch.native_batch_norm(x, w, b, running_mean, running_var, training, momentum, eps)
    tangent, _, _ = torch.ops.aten.native_batch_norm_backward(
        dx, x, w, running_mean, running_var, mean, inverse, training, eps, [True, False, False]
    )
    # γ̇ x̂ + β̇ is a batch norm with given statistics.
    statistics = (mean, inverse.pow(-2).sub_(eps)) if training else (running_mean, running_var)
    affine, _, _ = torch.native_batch_norm(x, dw, db, *statistics, False, momentum, eps)
    return fwAD.make_dual(output, tangent.add_(affine))


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """y = γ x̂ + β;  ẏ = γ ∂x̂/∂x ẋ + γ̇ x̂ + β̇, with ∂x̂/∂x symmetric as for batch norm."""
    (x, dx), (w, dw), (b, db) = _pair(input), _pair(weight), _pair(bias)
    if dx is None or w is None or dw is None or x.dtype != w.dtype:
        return NotImplemented
    shape = list(normalized_shape)
    output, mean, inverse = torch.native_layer_norm(x, shape, w, b, eps)
    normalised, _, _ = torch.ops.aten.native_layer_norm_backward(
        dx, x, shape, mean, inverse, None, None, [True, False, False]
    )
    tangent = F.layer_norm(x, shape, dw, db, eps).addcmul_(normalised, w)
    return fwAD.make_dual(output, tangent)


def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Any:
    """p = softmax(x);  ṗ = p (ẋ - <p, ẋ>), symmetric."""
    x, dx = _pair(input)
    if dx is None or dim is None or dtype is not None:
        return NotImplemented
    p = torch.softmax(x, dim)
    return fwAD.make_dual(p, torch._softmax_backward_data(dx, p, dim, p.dtype))


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """S = s Q Kᵀ + mask, P = softmax(S), O = P V;  Ṡ = s (Q̇ Kᵀ + Q K̇ᵀ), Ȯ = Ṗ V + P V̇."""
    (q, dq), (k, dk), (v, dv) = _pair(query), _pair(key), _pair(value)
    if dq is None or dk is None or dv is None or dropout_p > 0 or enable_gqa or _tangent(attn_mask) is not None:
        return NotImplemented
    s = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    q, keys = q * s, k.transpose(-2, -1)
    scores = q @ keys
    if is_causal:
        scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1), -math.inf)
    elif attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    p = torch._safe_softmax(scores, -1)  # zero, as torch's kernels give, for a row that is masked throughout
    del scores
    d_scores = (dq * s) @ keys
    d_scores += q @ dk.transpose(-2, -1)
    dp = torch._softmax_backward_data(d_scores, p, -1, p.dtype)
    del d_scores
    tangent = dp @ v
    tangent += p @ dv
    return fwAD.make_dual(p @ v, tangent)


def _pair(tensor: Tensor | None) -> tuple[Any, Tensor | None]:
    return (None, None) if tensor is None else tuple(fwAD.unpack_dual(tensor))


def _tangent(tensor: Tensor | None) -> Tensor | None:
    return _pair(tensor)[1]


def _guarded(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Rules are plain kernels: they record no graph, and autocast, which chooses dtypes call by call, is torch's."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            return NotImplemented
        with torch.no_grad():
            return rule(*args, **kwargs)

    return call


RULES: dict[Any, Callable[..., Any]] = {
    F.linear: _guarded(linear),
    F.batch_norm: _guarded(batch_norm),
    F.layer_norm: _guarded(layer_norm),
    F.softmax: _guarded(softmax),
    F.scaled_dot_product_attention: _guarded(scaled_dot_product_attention),
}
