"""Rules of the tape for the functions in which a model spends its time.

A rule is given the places of its arguments' tangents (None for a constant) and the arguments, which are ordinary
tensors that autograd follows. It returns the result and the map from all tangents to the result's, which reads detached
values only; or `NotImplemented` for a case that it leaves to torch's dual numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dual_rules import additive_mask

Places = dict[int, int | None]
Tangents = list[Tensor | None]
Map = Callable[[Tangents], Tensor]
Recorded = tuple[Tensor, Map]


def linear(places: Places, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """y = x Wᵀ + b;  ẏ = ẋ Wᵀ + ḃ + x Ẇᵀ."""
    if weight.dim() != 2 or input.numel() == 0:
        return NotImplemented
    at_x, at_w, at_b = (_at(places, t) for t in (input, weight, bias))
    x, w = input.detach(), weight.detach()

    def tangent_map(tangents: Tangents) -> Tensor:
        dx, dw, db = (_of(tangents, place) for place in (at_x, at_w, at_b))
        if dx is None and dw is None:
            assert db is not None
            return db.expand(*x.shape[:-1], w.shape[0])
        if dx is None:
            return F.linear(x, dw, db)  # type: ignore[arg-type]
        tangent = F.linear(dx, w, db)
        if dw is not None:
            tangent.view(-1, w.shape[0]).addmm_(x.reshape(-1, w.shape[1]), dw.t())
        return tangent

    return F.linear(input, weight, bias), tangent_map


def convolution(
    function: Callable[..., Tensor],
    places: Places,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """y = x * W + b;  ẏ = ẋ * W + x * Ẇ + ḃ."""
    at_x, at_w, at_b = (_at(places, t) for t in (input, weight, bias))
    if at_w is None:
        return NotImplemented
    x, w = input.detach(), weight.detach()

    def tangent_map(tangents: Tangents) -> Tensor:
        tangent = function(x, tangents[at_w], _of(tangents, at_b), *args, **kwargs)
        return tangent if at_x is None else tangent.add_(function(tangents[at_x], w, None, *args, **kwargs))

    return function(input, weight, bias, *args, **kwargs), tangent_map


def relu(places: Places, input: Tensor, inplace: bool = False) -> Any:
    """y = max(x, 0);  ẏ = ẋ where y > 0."""
    at = places[id(input)]
    output = torch.relu_(input) if inplace else torch.relu(input)
    y = output.detach()
    return output, lambda tangents: torch.ops.aten.threshold_backward(tangents[at], y, 0)


def gelu(places: Places, input: Tensor, *, approximate: str = "none") -> Any:
    """The derivative is a factor for each element, so the backward kernel is the map."""
    at, x = places[id(input)], input.detach()
    output = F.gelu(input, approximate=approximate)
    return output, lambda tangents: torch.ops.aten.gelu_backward(tangents[at], x, approximate=approximate)


def tanh(places: Places, input: Tensor) -> Any:
    """As for gelu."""
    at, output = places[id(input)], torch.tanh(input)
    y = output.detach()
    return output, lambda tangents: torch.ops.aten.tanh_backward(tangents[at], y)


def dropout(places: Places, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """y = m x, with a mask m that is drawn once;  ẏ = m ẋ."""
    if not training or p in (0, 1) or inplace:  # at 0 and 1 torch draws nothing
        return NotImplemented
    at = places[id(input)]
    output, mask = torch.native_dropout(input, p, True)
    return output, lambda tangents: torch.ops.aten.native_dropout_backward(tangents[at], mask, 1 / (1 - p))


def batch_norm(
    places: Places,
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
    at_x, at_w, at_b = (_at(places, t) for t in (input, weight, bias))
    if weight is None or at_x is None or at_w is None or at_b is None:
        return NotImplemented
    if input.device.type != "cpu" or input.dtype != weight.dtype:
        return NotImplemented
    output, mean, inverse = torch.native_batch_norm(
        input, weight, bias, running_mean, running_var, training, momentum, eps
    )
    x, w, mean, inverse = input.detach(), weight.detach(), mean.detach(), inverse.detach()
    statistics = (mean, inverse.pow(-2).sub_(eps)) if training else (running_mean, running_var)

    def tangent_map(tangents: Tangents) -> Tensor:
        tangent, _, _ = torch.ops.aten.native_batch_norm_backward(
            tangents[at_x], x, w, running_mean, running_var, mean, inverse, training, eps, [True, False, False]
        )
        # γ̇ x̂ + β̇ is a batch norm with given statistics.
        affine, _, _ = torch.native_batch_norm(x, tangents[at_w], tangents[at_b], *statistics, False, momentum, eps)
        return tangent.add_(affine)  # type: ignore[no-any-return]

    return output, tangent_map


def layer_norm(
    places: Places,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """y = γ x̂ + β;  ẏ = γ ∂x̂/∂x ẋ + γ̇ x̂ + β̇, with ∂x̂/∂x symmetric as for batch norm."""
    at_x, at_w, at_b = (_at(places, t) for t in (input, weight, bias))
    if weight is None or at_x is None or at_w is None or input.dtype != weight.dtype:
        return NotImplemented
    shape = list(normalized_shape)
    output, mean, inverse = torch.native_layer_norm(input, shape, weight, bias, eps)
    x, w, mean, inverse = input.detach(), weight.detach(), mean.detach(), inverse.detach()

    def tangent_map(tangents: Tangents) -> Tensor:
        normalised, _, _ = torch.ops.aten.native_layer_norm_backward(
            tangents[at_x], x, shape, mean, inverse, None, None, [True, False, False]
        )
        return F.layer_norm(x, shape, tangents[at_w], _of(tangents, at_b), eps).addcmul_(normalised, w)

    return output, tangent_map


def softmax(
    places: Places, input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Any:
    """p = softmax(x);  ṗ = p (ẋ - <p, ẋ>), symmetric."""
    if dim is None or dtype is not None:
        return NotImplemented
    at, output = places[id(input)], torch.softmax(input, dim)
    p = output.detach()
    return output, lambda tangents: torch._softmax_backward_data(tangents[at], p, dim, p.dtype)


def embedding(
    places: Places,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """y = W[i];  ẏ = Ẇ[i], but zero at the padding index, whose gradient torch's backward pass takes for zero."""
    at = places[id(weight)]
    if at is None or max_norm is not None or scale_grad_by_freq or sparse:
        return NotImplemented
    padded = None if padding_idx is None else (input == padding_idx % weight.shape[0]).unsqueeze(-1)

    def tangent_map(tangents: Tangents) -> Tensor:
        tangent = F.embedding(input, tangents[at])  # type: ignore[arg-type]
        return tangent if padded is None else tangent.masked_fill_(padded, 0)

    return F.embedding(input, weight, padding_idx), tangent_map


def max_pool2d(
    places: Places,
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """y = x[argmax];  ẏ = ẋ[argmax]."""
    if input.dim() != 4 or return_indices:
        return NotImplemented
    at = places[id(input)]
    output, index = torch.ops.aten.max_pool2d_with_indices(
        input, kernel_size, stride or [], padding, dilation, ceil_mode
    )
    return output, lambda tangents: tangents[at].flatten(2).gather(2, index.flatten(2)).view(index.shape)


def scaled_dot_product_attention(
    places: Places,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """S = s Q Kᵀ + mask, P = softmax(S), O = P V;  Ṡ = s (Q̇ Kᵀ + Q K̇ᵀ), Ṗ = P (Ṡ - <P, Ṡ>), Ȯ = Ṗ V + P V̇.

    P is computed anew by each map: it is larger than all else that the map reads.
    """
    at_q, at_k, at_v = (places[id(t)] for t in (query, key, value))
    if (
        at_q is None
        or at_k is None
        or at_v is None
        or dropout_p > 0
        or enable_gqa
        or _at(places, attn_mask) is not None
    ):
        return NotImplemented
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return NotImplemented
    s = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    q, k, v = (t.detach() for t in (query, key, value))

    def tangent_map(tangents: Tangents) -> Tensor:
        dq, dk, dv = tangents[at_q], tangents[at_k], tangents[at_v]
        q3, dq3, k3, dk3, v3, dv3 = (t.reshape(-1, *t.shape[-2:]) for t in (q, dq, k, dk, v, dv))  # type: ignore[union-attr]
        scores = torch.baddbmm(additive_mask(q, k, attn_mask, is_causal), q3, k3.mT, alpha=s)
        p = torch.softmax(scores, -1) if attn_mask is None else torch._safe_softmax(scores, -1)
        d_scores = torch.baddbmm(scores, dq3, k3.mT, beta=0, alpha=s, out=scores).baddbmm_(q3, dk3.mT, alpha=s)
        dp = torch._softmax_backward_data(d_scores, p, -1, p.dtype)
        return torch.bmm(dp, v3).baddbmm_(p, dv3).view(*q.shape[:-1], v.shape[-1])

    output = F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale=scale)
    return output, tangent_map


def add(places: Places, input: Any, other: Any) -> Any:
    """y = a + b;  ẏ = ȧ + ḃ."""
    if not isinstance(input, Tensor) or not isinstance(other, Tensor) or input.shape != other.shape:
        return NotImplemented
    if input.dtype != other.dtype:
        return NotImplemented
    at_a, at_b = places[id(input)], places[id(other)]

    def tangent_map(tangents: Tangents) -> Tensor:
        a, b = _of(tangents, at_a), _of(tangents, at_b)
        if a is None or b is None:
            return b if a is None else a  # type: ignore[return-value]
        return a + b

    return input + other, tangent_map


def rearrangement(function: Callable[..., Tensor], places: Places, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Linear, and without other tensors: the map is the function."""
    at = places[id(input)]
    output = function(input, *args, **kwargs)
    return output, lambda tangents: function(tangents[at], *args, **kwargs)


def _at(places: Places, tensor: Tensor | None) -> int | None:
    return None if tensor is None else places[id(tensor)]


def _of(tangents: Tangents, place: int | None) -> Tensor | None:
    return None if place is None else tangents[place]


_REARRANGEMENTS = (
    torch.Tensor.reshape, torch.Tensor.flatten, torch.flatten, torch.Tensor.view, torch.Tensor.transpose,
    torch.transpose, torch.Tensor.permute, torch.permute, torch.Tensor.mean, torch.mean, torch.Tensor.sum, torch.sum,
    F.avg_pool2d, F.adaptive_avg_pool2d, torch.Tensor.unsqueeze, torch.Tensor.squeeze, torch.Tensor.expand,
)  # fmt: skip
RULES: dict[Any, Callable[..., Any]] = {
    F.linear: linear,
    F.relu: relu,
    torch.relu: relu,
    F.gelu: gelu,
    torch.tanh: tanh,
    F.dropout: dropout,
    F.batch_norm: batch_norm,
    F.layer_norm: layer_norm,
    F.softmax: softmax,
    F.embedding: embedding,
    F.max_pool2d: max_pool2d,
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    torch.add: add,
    torch.Tensor.add: add,
    torch.Tensor.__add__: add,
}
RULES |= {function: partial(convolution, function) for function in (torch.conv1d, torch.conv2d, torch.conv3d)}
RULES |= {function: partial(rearrangement, function) for function in _REARRANGEMENTS}
