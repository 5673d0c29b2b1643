"""Rules for the normalizations y = γ x̂ + β: ẏ = γ ∂x̂/∂x ẋ + γ̇ x̂ + β̇, in one pass.

Of a constant input the first term is absent, and the rest is the normalization itself with other weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curveball_fused.backends.dtypes import compute_dtype
from curveball_fused.ops import tangents as tangent_ops

from .context import Map, Rule, RuleContext, Tangents, tangent_at


def batch_norm(
    ctx: RuleContext,
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
    if input.numel() == 0 or (training and input.numel() == input.shape[1]):
        return NotImplemented
    at_x, at_w, at_b = ctx.tangent_index(input), ctx.tangent_index(weight), ctx.tangent_index(bias)
    dense = input.is_contiguous() or input.movedim(1, -1).is_contiguous()
    input = input if dense else input.contiguous()  # in autograd's graph, which then holds the same memory
    output, mean, rstd = torch.native_batch_norm(
        input, weight, bias, running_mean, running_var, training, momentum, eps
    )
    x, w = ctx.save(input), _saved(ctx, weight)
    if not training:
        mean, rstd = _saved(ctx, running_mean), (_saved(ctx, running_var) + eps).rsqrt()
    mean, rstd, dtype = _statistics(mean, x), _statistics(rstd, x), output.dtype
    wide = x.dtype if w is None else w.dtype  # weights may be wider than what they normalize

    def tangent_map(tangents: Tangents) -> Tensor:
        dx, dw, db = (tangent_at(tangents, place) for place in (at_x, at_w, at_b))
        if dx is None:
            dx = torch.zeros_like(x)
        elif dx.stride() != x.stride():
            dx = torch.empty_like(x).copy_(dx)
        vectors = (w, _contiguous(dw), _contiguous(db))
        return tangent_ops.batch_norm_tangent(
            dx.to(wide), x.to(wide), mean, rstd, *vectors, training=training, backend=ctx.backend
        ).to(dtype)

    return output, tangent_map


def layer_norm(
    ctx: RuleContext,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """Over the last dimensions."""
    shape, at_x, x = list(normalized_shape), ctx.tangent_index(input), input.contiguous()
    wide = input.dtype if weight is None else weight.dtype
    if wide == input.dtype and not torch.is_autocast_enabled(input.device.type):
        output, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
    else:  # autocast may choose the output's dtype
        output = F.layer_norm(x, shape, weight, bias, eps)
        variance, mean = torch.var_mean(x.detach().to(wide).flatten(-len(shape)), -1, correction=0)
        rstd = (variance + eps).rsqrt()
    constant = lambda x, dw, db: F.layer_norm(x, shape, dw, db, eps)  # noqa: E731
    return output, _row_map(ctx, at_x, x, output, shape, mean, rstd, weight, bias, constant)


def rms_norm(
    ctx: RuleContext,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    """x̂ = x / rms(x) over the last dimensions."""
    shape, at_x, x = list(normalized_shape), ctx.tangent_index(input), input.contiguous()
    small = torch.finfo(input.dtype).eps if eps is None else eps
    wide = compute_dtype(input.dtype)
    squares = torch.linalg.vector_norm(x.detach().flatten(-len(shape)), dim=-1, dtype=wide).square_()
    rstd = (squares / math.prod(shape) + small).rsqrt_()
    output = F.rms_norm(x, shape, weight, eps)
    constant = lambda x, dw, _: F.rms_norm(x, shape, dw, eps)  # noqa: E731
    return output, _row_map(ctx, at_x, x, output, shape, None, rstd, weight, None, constant)


def _row_map(
    ctx: RuleContext,
    at_x: int | None,
    input: Tensor,
    output: Tensor,
    shape: list[int],
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    of_constant: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Map:
    """For a normalization of rows: what the last dimensions hold is one row. `input` is contiguous."""
    at_w, at_b = ctx.tangent_index(weight), ctx.tangent_index(bias)
    x, w = ctx.save(input), _saved(ctx, weight)
    rows, dtype = (-1, math.prod(shape)), output.dtype
    wide = x.dtype if w is None else w.dtype  # weights may be wider than what they normalize
    mean = None if mean is None else _statistics(mean.flatten(), x)
    rstd = _statistics(rstd.flatten(), x)

    def tangent_map(tangents: Tangents) -> Tensor:
        dx, dw, db = (tangent_at(tangents, place) for place in (at_x, at_w, at_b))
        if dx is None:
            return of_constant(x, *_filled(dw, db))
        flat = (None if t is None else t.contiguous().view(-1) for t in (w, dw, db))
        dx_, x_ = (t.to(wide).contiguous().view(rows) for t in (dx, x))
        tangent = tangent_ops.layer_norm_tangent(dx_, x_, mean, rstd, *flat, backend=ctx.backend)
        return tangent.view(x.shape).to(dtype)

    return tangent_map


def group_norm(
    ctx: RuleContext,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """Over groups of channels: rows without weights, whose channels have weights of their own."""
    if (weight is not None and input.dtype != weight.dtype) or input.numel() == 0:
        return NotImplemented
    if torch.is_autocast_enabled(input.device.type):  # which may choose another dtype
        return NotImplemented
    at_x, at_w, at_b = ctx.tangent_index(input), ctx.tangent_index(weight), ctx.tangent_index(bias)
    images, channels = input.shape[:2]
    input = input.contiguous()
    output, mean, rstd = torch.native_group_norm(
        input, weight, bias, images, channels, input.numel() // (images * channels), num_groups, eps
    )
    x = ctx.save(input)
    w = None if weight is None else ctx.save(weight).view(-1, *[1] * (input.dim() - 2))
    mean, rstd = _statistics(mean.flatten(), x), _statistics(rstd.flatten(), x)
    rows = x.view(images * num_groups, -1)

    def tangent_map(tangents: Tangents) -> Tensor:
        dx, dw, db = (tangent_at(tangents, place) for place in (at_x, at_w, at_b))
        affine = None if dw is None and db is None else F.group_norm(x, num_groups, *_filled(dw, db), eps)
        if dx is None:
            return affine  # type: ignore[return-value]
        dx = dx.contiguous().view(rows.shape)
        tangent = tangent_ops.layer_norm_tangent(dx, rows, mean, rstd, backend=ctx.backend).view(x.shape)
        tangent = tangent if w is None else tangent.mul_(w)
        return tangent if affine is None else tangent.add_(affine)

    return output, tangent_map


def _saved(ctx: RuleContext, tensor: Tensor | None) -> Any:
    return None if tensor is None else ctx.save(tensor)


def _statistics(values: Tensor, x: Tensor) -> Tensor:
    """Return `values` in the dtype of the arithmetic."""
    return values.detach().to(compute_dtype(x.dtype))


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _filled(dw: Tensor | None, db: Tensor | None) -> tuple[Tensor, Tensor]:
    """Zero for the one that is not there."""
    zero = torch.zeros_like(db if dw is None else dw)  # type: ignore[arg-type]
    return zero if dw is None else dw, zero if db is None else db


RULES: dict[Any, Rule] = {
    F.batch_norm: batch_norm,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.rms_norm: rms_norm,
}
