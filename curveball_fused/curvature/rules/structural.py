"""Structural rules: functions that are linear in all that has a tangent, sums and what moves elements about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .context import Map, Rule, RuleContext, Tangents, snapshot, tangent_at, tensors


def add_sub(sign: int, ctx: RuleContext, input: Tensor, other: Any, *, alpha: float = 1) -> Any:
    """y = a ± αb;  ẏ = ȧ ± αḃ."""
    factor, at_a, at_b = sign * alpha, ctx.tangent_index(input), ctx.tangent_index(other)
    output = torch.add(input, other, alpha=factor)
    return output, _sum_map(at_a, at_b, factor, output.shape, output.dtype)


def reflected_sub(ctx: RuleContext, input: Tensor, other: Any) -> Any:
    """y = b - a, the arguments of Python's reflected operator."""
    at_a, at_b = ctx.tangent_index(input), ctx.tangent_index(other)
    output = torch.rsub(input, other)
    return output, _sum_map(at_b, at_a, -1, output.shape, output.dtype)


def add_sub_(sign: int, ctx: RuleContext, input: Tensor, other: Any, *, alpha: float = 1) -> Any:
    """y ← a ± αb in place of a, which may have been a constant."""
    factor, at_a, at_b = sign * alpha, ctx.tangent_index(input), ctx.tangent_index(other)
    output = input.add_(other, alpha=factor)
    return output, _sum_map(at_a, at_b, factor, output.shape, output.dtype)


def _sum_map(at_a: int | None, at_b: int | None, factor: float, shape: torch.Size, dtype: torch.dtype) -> Map:
    """ȧ + factor ḃ, where a constant adds nothing, but may have made the result larger."""

    def tangent_map(tangents: Tangents) -> Tensor:
        a, b = tangent_at(tangents, at_a), tangent_at(tangents, at_b)
        if a is not None and b is not None:
            return torch.add(a, b, alpha=factor)
        one = a if b is None else b if factor == 1 else b * factor
        return one.to(dtype).expand(shape)  # type: ignore[union-attr]

    return tangent_map


def setitem(ctx: RuleContext, input: Tensor, index: Any, value: Any) -> Any:
    """y[i] = b;  ẏ[i] = ḃ. The old y, or b, may be a constant."""
    if not ctx.constant(index):
        return NotImplemented
    index = _snapshot_of(ctx, index)
    at_a, at_b = ctx.tangent_index(input), ctx.tangent_index(value)
    like = input.detach()
    input[index] = value

    def tangent_map(tangents: Tangents) -> Tensor:
        a, b = tangent_at(tangents, at_a), tangent_at(tangents, at_b)
        tangent = torch.zeros_like(like) if a is None else a.clone()
        tangent[index] = 0 if b is None else b
        return tangent

    return input, tangent_map


def scatter_add(
    function: Callable[..., Tensor], ctx: RuleContext, input: Tensor, dim: int, index: Tensor, source: Any
) -> Any:
    """y ← y + what an index sends to it of b, in place, or y ← that; linear in both."""
    if not isinstance(source, Tensor):
        return NotImplemented
    at_a, at_b = ctx.tangent_index(input), ctx.tangent_index(source)
    like, indices, constant = input.detach(), ctx.save(index), source.detach()

    def tangent_map(tangents: Tangents) -> Tensor:
        a, b = tangent_at(tangents, at_a), tangent_at(tangents, at_b)
        tangent = torch.zeros_like(like) if a is None else a.clone()
        return function(tangent, dim, indices, torch.zeros_like(constant) if b is None else b)

    return function(input, dim, index, source), tangent_map


def structural(function: Callable[..., Any], ctx: RuleContext, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Linear in its first argument, and all others are constant: the map is the function."""
    if ctx.tangent_index(input) is None or not ctx.constant(args, list(kwargs.values())):
        return NotImplemented
    args, kwargs = _snapshot_of(ctx, args), _snapshot_of(ctx, kwargs)
    at, output = ctx.tangent_index(input), function(input, *args, **kwargs)
    if isinstance(output, Tensor):
        return output, lambda tangents: function(tangents[at], *args, **kwargs)
    return output, [partial(_pick, at, i, function, args, kwargs) for i in range(len(output))]


def _snapshot_of(ctx: RuleContext, arguments: Any) -> Any:
    """Constant arguments as they are now; tensors among them must stay so."""
    for constant in tensors(arguments.values() if isinstance(arguments, dict) else (arguments,)):
        ctx.save(constant)
    return snapshot(arguments)


def _pick(at: int | None, index: int, function: Any, args: Any, kwargs: Any, tangents: Tangents) -> Tensor:
    result: Tensor = function(tangent_at(tangents, at), *args, **kwargs)[index]
    return result


def view(ctx: RuleContext, input: Tensor, *shape: Any, **kwargs: Any) -> Any:
    """Return as `structural` does; but a tangent need not lie in memory as its tensor does."""
    if kwargs or isinstance(shape[0], torch.dtype):
        return NotImplemented
    at, output = ctx.tangent_index(input), input.view(*shape)
    size = output.shape
    return output, lambda tangents: tangents[at].reshape(size)


def padding(
    ctx: RuleContext, input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Any:
    """Pad by a constant border, or by one made of the tensor's own elements."""
    pad = snapshot(pad)
    at, output = ctx.tangent_index(input), F.pad(input, pad, mode, value)
    return output, lambda tangents: F.pad(tangents[at], pad, mode)


def concat(
    function: Callable[..., Tensor], ctx: RuleContext, parts: Sequence[Tensor], *args: Any, **kwargs: Any
) -> Any:
    """Concatenation; a part that is constant has the tangent zero."""
    places = [ctx.tangent_index(part) for part in parts]
    args, kwargs = snapshot(args), snapshot(kwargs)
    constants = [part.detach() if place is None else None for part, place in zip(parts, places, strict=True)]

    def tangent_map(tangents: Tangents) -> Tensor:
        own = [
            torch.zeros_like(constant) if constant is not None else tangent_at(tangents, place)
            for constant, place in zip(constants, places, strict=True)
        ]
        return function(own, *args, **kwargs)

    return function(parts, *args, **kwargs), tangent_map


def max_pool(
    ctx: RuleContext,
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
    at = ctx.tangent_index(input)
    # On a CPU torch pools four times faster with the channels innermost.
    inner = input.contiguous(memory_format=torch.channels_last) if input.device.type == "cpu" else input
    output, index = torch.ops.aten.max_pool2d_with_indices(
        inner, kernel_size, stride or [], padding, dilation, ceil_mode
    )
    if input.is_contiguous():
        output, index = output.contiguous(), index.contiguous()
    return output, lambda tangents: tangents[at].flatten(2).gather(2, index.flatten(2)).view(index.shape)


T: Any = torch.Tensor
_STRUCTURAL = (
    T.reshape, torch.reshape, T.flatten, torch.flatten, T.unflatten, torch.unflatten, T.transpose, torch.transpose,
    T.swapaxes, T.permute, torch.permute, T.movedim, torch.movedim, T.t, T.T.__get__, T.mT.__get__, T.unsqueeze,
    torch.unsqueeze, T.squeeze, torch.squeeze, T.expand, T.expand_as, T.broadcast_to, T.repeat, T.repeat_interleave,
    T.contiguous, T.clone, torch.clone, T.to, T.float, T.double, T.neg, torch.neg, T.__neg__, T.__getitem__, T.narrow,
    T.select, T.index_select, torch.index_select, T.gather, torch.gather, T.diagonal, T.flip, torch.flip, T.roll,
    torch.roll, T.tril, torch.tril, T.triu, torch.triu, T.chunk, torch.chunk, T.split, torch.split, T.unbind,
    torch.unbind, T.mean, torch.mean, T.sum, torch.sum, T.cumsum, torch.cumsum, F.avg_pool1d, F.avg_pool2d,
    F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.interpolate, F.unfold, F.fold,
    F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle,
)  # fmt: skip
RULES: dict[Any, Rule] = {function: partial(structural, function) for function in _STRUCTURAL}
RULES |= {function: partial(add_sub, 1) for function in (torch.add, T.add, T.__add__, T.__radd__)}
RULES |= {function: partial(add_sub, -1) for function in (torch.sub, T.sub, T.__sub__)}
RULES |= {T.__rsub__: reflected_sub}
RULES |= {function: partial(concat, function) for function in (torch.cat, torch.stack)}
RULES |= {T.view: view, F.pad: padding, F.max_pool2d: max_pool}
IN_PLACE: dict[Any, Rule] = {function: partial(add_sub_, 1) for function in (T.add_, T.__iadd__)}
IN_PLACE |= {function: partial(add_sub_, -1) for function in (T.sub_, T.__isub__)}
IN_PLACE |= {T.__setitem__: setitem}
IN_PLACE |= {
    function: partial(scatter_add, function) for function in (T.index_add_, T.scatter_add_, T.index_copy_, T.scatter_)
}
