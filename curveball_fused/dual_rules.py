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


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """y = x Wᵀ + b;  ẏ = ẋ Wᵀ + ḃ + x Ẇᵀ, the last product added in place."""
    (x, dx), (w, dw), (b, db) = _pair(input), _pair(weight), _pair(bias)
    if (dx is None and dw is None) or w.dim() != 2 or x.numel() == 0:
        return NotImplemented
    output, rows = F.linear(x, w, b), x.reshape(-1, x.shape[-1])
    if dx is None:
        return fwAD.make_dual(output, F.linear(x, dw, db))  # type: ignore[arg-type]
    tangent = F.linear(dx.reshape(rows.shape), w, db)
    if dw is not None:
        tangent.addmm_(rows, dw.t())
    return fwAD.make_dual(output, tangent.view(output.shape))


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """y = W[i];  ẏ = Ẇ[i], but zero at the padding index, whose gradient torch's backward pass takes for zero."""
    w, dw = _pair(weight)
    if padding_idx is None or dw is None or max_norm is not None or scale_grad_by_freq or sparse:
        return NotImplemented
    padding = padding_idx % w.shape[0]
    tangent = F.embedding(input, dw).masked_fill_((input == padding).unsqueeze(-1), 0)
    return fwAD.make_dual(F.embedding(input, w), tangent)


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


def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """y = x[argmax];  ẏ = ẋ[argmax]. On a CPU torch pools four times faster with the channels innermost."""
    x, dx = _pair(input)
    if dx is None or x.dim() != 4 or x.device.type != "cpu" or return_indices:
        return NotImplemented
    inner = x.contiguous(memory_format=torch.channels_last)
    output, index = torch.ops.aten.max_pool2d_with_indices(
        inner, kernel_size, stride or [], padding, dilation, ceil_mode
    )
    if x.is_contiguous():
        output, index = output.contiguous(), index.contiguous()
    tangent = dx.flatten(2).gather(2, index.flatten(2)).view(output.shape)
    return fwAD.make_dual(output, tangent)


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
    """S = s Q Kᵀ + mask, P = softmax(S), O = P V;  Ṡ = s (Q̇ Kᵀ + Q K̇ᵀ), Ṗ = P (Ṡ - <P, Ṡ>), Ȯ = Ṗ V + P V̇."""
    (q, dq), (k, dk), (v, dv) = _pair(query), _pair(key), _pair(value)
    if dq is None or dk is None or dv is None or dropout_p > 0 or enable_gqa or _tangent(attn_mask) is not None:
        return NotImplemented
    if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        return NotImplemented
    s = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    batch, rows = q.shape[:-2], q.shape[-2]
    mask = additive_mask(q, k, attn_mask, is_causal)
    q, dq, k, dk, v, dv = (t.reshape(-1, *t.shape[-2:]) for t in (q, dq, k, dk, v, dv))

    scores = torch.baddbmm(mask, q, k.mT, alpha=s)
    # torch's kernels give zero for a row that is masked throughout, which only a given mask can bring about.
    p = torch.softmax(scores, -1) if attn_mask is None else torch._safe_softmax(scores, -1)
    d_scores = torch.baddbmm(scores, dq, k.mT, beta=0, alpha=s, out=scores).baddbmm_(q, dk.mT, alpha=s)
    dp = torch._softmax_backward_data(d_scores, p, -1, p.dtype)
    tangent = torch.bmm(dp, v).baddbmm_(p, dv)
    shape = (*batch, rows, v.shape[-1])
    return fwAD.make_dual(torch.bmm(p, v).view(shape), tangent.view(shape))


def additive_mask(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """What is added to the scores, broadcast to (batch, rows, columns)."""
    shape = (*q.shape[:-1], k.shape[-2])
    if is_causal:
        mask = torch.full(shape[-2:], -math.inf, dtype=q.dtype, device=q.device).triu_(1)
    elif mask is None:
        mask = q.new_zeros(())
    elif mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
    return mask.expand(shape).reshape(-1, *shape[-2:])


def _pair(tensor: Tensor | None) -> tuple[Any, Tensor | None]:
    return (None, None) if tensor is None else tuple(fwAD.unpack_dual(tensor))


def _tangent(tensor: Tensor | None) -> Tensor | None:
    return _pair(tensor)[1]


def _guarded(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Rules are plain kernels.

    Autocast, which chooses dtypes call by call, is left to torch, and so are the transforms of torch.func and graphs
    that the model itself needs.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            return NotImplemented
        if torch._C._are_functorch_transforms_active():
            return NotImplemented
        if any(isinstance(a, Tensor) and a.requires_grad for a in (*args, *kwargs.values())):
            return NotImplemented
        with torch.no_grad():
            return rule(*args, **kwargs)

    return call


RULES: dict[Any, Callable[..., Any]] = {
    F.linear: _guarded(linear),
    F.embedding: _guarded(embedding),
    F.batch_norm: _guarded(batch_norm),
    F.layer_norm: _guarded(layer_norm),
    F.softmax: _guarded(softmax),
    F.max_pool2d: _guarded(max_pool2d),
    F.scaled_dot_product_attention: _guarded(scaled_dot_product_attention),
}
