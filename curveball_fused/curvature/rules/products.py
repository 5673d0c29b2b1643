"""Rules for functions that are linear in each of their arguments: the product rule."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .context import Rule, RuleContext, Tangents, snapshot, tangent_at


def linear(ctx: RuleContext, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """y = x Wᵀ + b;  ẏ = ẋ Wᵀ + ḃ + x Ẇᵀ, the last product added in place."""
    if weight.dim() != 2 or input.numel() == 0:
        return NotImplemented
    at_x, at_w, at_b = ctx.tangent_index(input), ctx.tangent_index(weight), ctx.tangent_index(bias)
    x, w = ctx.save(input), ctx.save(weight)

    def tangent_map(tangents: Tangents) -> Tensor:
        dx, dw, db = (tangent_at(tangents, place) for place in (at_x, at_w, at_b))
        if dx is None and dw is None:
            assert db is not None
            return db.expand(*x.shape[:-1], w.shape[0])
        if dx is None:
            return F.linear(x, dw, db)  # type: ignore[arg-type]
        tangent = F.linear(dx, w, db)
        if dw is None:
            return tangent
        if not tangent.dtype == x.dtype == dw.dtype:  # under autocast
            return tangent.add_(F.linear(x, dw))
        tangent.view(-1, w.shape[0]).addmm_(x.reshape(-1, w.shape[1]), dw.t())
        return tangent

    return F.linear(input, weight, bias), tangent_map


def convolution(
    function: Callable[..., Tensor],
    ctx: RuleContext,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """y = x * W + b;  ẏ = ẋ * W + x * Ẇ + ḃ; a transposed convolution likewise."""
    at_x, at_w, at_b = ctx.tangent_index(input), ctx.tangent_index(weight), ctx.tangent_index(bias)
    x, w, args, kwargs = ctx.save(input), ctx.save(weight), snapshot(args), snapshot(kwargs)
    output = function(input, weight, bias, *args, **kwargs)
    shape = output.shape

    def tangent_map(tangents: Tangents) -> Tensor:
        dx, dw, db = (tangent_at(tangents, place) for place in (at_x, at_w, at_b))
        if dx is None and dw is None:
            return db.view(-1, *[1] * (w.dim() - 2)).expand(shape)  # type: ignore[union-attr]
        if dw is None:
            return function(dx, w, db, *args, **kwargs)
        tangent = function(x, dw, db, *args, **kwargs)
        return tangent if dx is None else tangent.add_(function(dx, w, None, *args, **kwargs))

    return output, tangent_map


def product(function: Callable[[Tensor, Any], Tensor], ctx: RuleContext, input: Any, other: Any) -> Any:
    """y = a · b, for any product;  ẏ = ȧ · b + a · ḃ."""
    at_a, at_b = ctx.tangent_index(input), ctx.tangent_index(other)
    if at_a is not None and at_b is not None:
        a, b = ctx.save(input), ctx.save(other)
        return function(input, other), lambda tangents: function(tangents[at_a], b).add_(function(a, tangents[at_b]))
    if at_a is not None:
        b = ctx.save(other) if isinstance(other, Tensor) else other
        return function(input, other), lambda tangents: function(tangents[at_a], b)
    a = ctx.save(input) if isinstance(input, Tensor) else input
    return function(input, other), lambda tangents: function(a, tangents[at_b])


def quotient(ctx: RuleContext, input: Tensor, other: Any, *, rounding_mode: str | None = None) -> Any:
    """y = a / b with a constant b;  ẏ = ȧ / b."""
    if rounding_mode is not None or ctx.tangent_index(input) is None or ctx.tangent_index(other) is not None:
        return NotImplemented
    at, b = ctx.tangent_index(input), ctx.save(other) if isinstance(other, Tensor) else other
    return input / other, lambda tangents: tangents[at] / b


def scale_(ctx: RuleContext, input: Tensor, other: Any) -> Any:
    """y *= b with a constant b, in place;  ẏ = b ẏ."""
    if ctx.tangent_index(input) is None or ctx.tangent_index(other) is not None:
        return NotImplemented
    at, b = ctx.tangent_index(input), ctx.save(other) if isinstance(other, Tensor) else other
    return input.mul_(other), lambda tangents: tangents[at] * b


def embedding(
    ctx: RuleContext,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """y = W[i];  ẏ = Ẇ[i], but zero at the padding index, whose gradient torch's backward pass takes for zero."""
    at = ctx.tangent_index(weight)
    if at is None or max_norm is not None or scale_grad_by_freq or sparse:
        return NotImplemented
    index = ctx.save(input)
    padded = None if padding_idx is None else (input == padding_idx % weight.shape[0]).unsqueeze(-1)

    def tangent_map(tangents: Tangents) -> Tensor:
        tangent = F.embedding(index, tangents[at])  # type: ignore[arg-type]
        return tangent if padded is None else tangent.masked_fill_(padded, 0)

    return F.embedding(input, weight, padding_idx), tangent_map


RULES: dict[Any, Rule] = {F.linear: linear, F.embedding: embedding}
RULES |= {
    function: partial(convolution, function)
    for function in (
        torch.conv1d, torch.conv2d, torch.conv3d,
        torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
    )
}  # fmt: skip
RULES |= {
    function: partial(product, torch.matmul)
    for function in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm, torch.mm)
}
RULES |= {
    function: partial(product, torch.mul)
    for function in (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
}
RULES |= dict.fromkeys((torch.div, torch.Tensor.div, torch.Tensor.__truediv__), quotient)
IN_PLACE: dict[Any, Rule] = dict.fromkeys((torch.Tensor.mul_, torch.Tensor.__imul__), scale_)
