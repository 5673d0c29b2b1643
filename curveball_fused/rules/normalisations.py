"""Rules for the normalisations y = γ x̂ + β: ẏ = γ ∂x̂/∂x ẋ + γ̇ x̂ + β̇.

∂x̂/∂x is symmetric, so its product with ẋ is what the backward kernel computes; γ̇ x̂ + β̇ is the normalisation itself,
with other weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Call, Rule, Tangents, tangent_at


def batch_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Over all but the second dimension, by the statistics of the batch (training) or by given ones."""
    if (weight is not None and input.dtype != weight.dtype) or input.numel() == 0:
        return NotImplemented
    at_x, at_w, at_b = call.at(input), call.at(weight), call.at(bias)
    output, mean, inverse = torch.native_batch_norm(
        input, weight, bias, running_mean, running_var, training, momentum, eps
    )
    x, w = call.keep(input), _kept(call, weight)
    mean, inverse = mean.detach(), inverse.detach()
    given = (None, None) if training else (_kept(call, running_mean), _kept(call, running_var))
    statistics = (mean, inverse.pow(-2).sub_(eps)) if training else given

    def tangent_map(tangents: Tangents) -> Tensor:
        dx, dw, db = (tangent_at(tangents, place) for place in (at_x, at_w, at_b))
        tangent = None
        if dx is not None:
            # A weight is one factor for each channel, so it may as well be applied before.
            tangent, _, _ = torch.ops.aten.native_batch_norm_backward(
                dx, x, w, *given, mean, inverse, training, eps, [True, False, False]
            )
        if dw is not None or db is not None:
            affine, _, _ = torch.native_batch_norm(x, *_filled(dw, db), *statistics, False, momentum, eps)
            tangent = affine if tangent is None else tangent.add_(affine)
        return tangent  # type: ignore[return-value]

    return output, tangent_map


def layer_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """Over the last dimensions."""
    if weight is not None and input.dtype != weight.dtype:
        return NotImplemented
    at_x, at_w, at_b = call.at(input), call.at(weight), call.at(bias)
    shape = list(normalized_shape)
    output, mean, inverse = torch.native_layer_norm(input, shape, weight, bias, eps)
    x, w = call.keep(input), _kept(call, weight)
    mean, inverse = mean.detach(), inverse.detach()

    def tangent_map(tangents: Tangents) -> Tensor:
        dx, dw, db = (tangent_at(tangents, place) for place in (at_x, at_w, at_b))
        tangent = None
        if dx is not None:
            tangent, _, _ = torch.ops.aten.native_layer_norm_backward(
                dx, x, shape, mean, inverse, None, None, [True, False, False]
            )
            tangent = tangent if w is None else tangent.mul_(w)
        if dw is not None or db is not None:
            affine = F.layer_norm(x, shape, *_filled(dw, db), eps)
            tangent = affine if tangent is None else tangent.add_(affine)
        return tangent  # type: ignore[return-value]

    return output, tangent_map


def group_norm(
    call: Call,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """Over groups of channels."""
    if (weight is not None and input.dtype != weight.dtype) or input.numel() == 0:
        return NotImplemented
    at_x, at_w, at_b = call.at(input), call.at(weight), call.at(bias)
    images, channels = input.shape[:2]
    sizes = (images, channels, input.numel() // (images * channels), num_groups)
    output, mean, inverse = torch.native_group_norm(input.contiguous(), weight, bias, *sizes, eps)
    x = call.keep(input).contiguous()
    w = None if weight is None else call.keep(weight).view(-1, *[1] * (input.dim() - 2))
    mean, inverse = mean.detach(), inverse.detach()

    def tangent_map(tangents: Tangents) -> Tensor:
        dx, dw, db = (tangent_at(tangents, place) for place in (at_x, at_w, at_b))
        tangent = None
        if dx is not None:
            tangent, _, _ = torch.ops.aten.native_group_norm_backward(
                dx.contiguous(), x, mean, inverse, None, *sizes, [True, False, False]
            )
            tangent = tangent if w is None else tangent.mul_(w)
        if dw is not None or db is not None:
            affine = F.group_norm(x, num_groups, *_filled(dw, db), eps)
            tangent = affine if tangent is None else tangent.add_(affine)
        return tangent  # type: ignore[return-value]

    return output, tangent_map


def rms_norm(
    call: Call, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Any:
    """x̂ = x / rms(x) over the last dimensions."""
    if weight is not None and input.dtype != weight.dtype:
        return NotImplemented
    at_x, at_w = call.at(input), call.at(weight)
    dims = tuple(range(-len(normalized_shape), 0))
    x, w = call.keep(input), _kept(call, weight)
    small = torch.finfo(input.dtype).eps if eps is None else eps
    inverse = x.square().mean(dims, keepdim=True).add_(small).rsqrt_()

    def tangent_map(tangents: Tangents) -> Tensor:
        dx, dw = tangent_at(tangents, at_x), tangent_at(tangents, at_w)
        normalised = x * inverse
        if dx is None:
            return normalised.mul_(dw)  # type: ignore[arg-type]
        tangent = torch.addcmul(dx, normalised, (normalised * dx).mean(dims, keepdim=True), value=-1).mul_(inverse)
        tangent = tangent if w is None else tangent.mul_(w)
        return tangent if dw is None else tangent.addcmul_(normalised, dw)

    return F.rms_norm(input, normalized_shape, weight, eps), tangent_map


def _kept(call: Call, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else call.keep(tensor)


def _filled(dw: Tensor | None, db: Tensor | None) -> tuple[Tensor, Tensor]:
    """Zero for the one that is not there."""
    present = db if dw is None else dw
    assert present is not None
    zero = torch.zeros_like(present)
    return zero if dw is None else dw, zero if db is None else db


RULES: dict[Any, Rule] = {
    F.batch_norm: batch_norm,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.rms_norm: rms_norm,
}
