"""Rules for functions of one element, for dropout and for softmax: the tangent is a product with what was kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from curveball_fused import _torch_private
from curveball_fused._torch_private import dual_level, set_forward_grad_enabled, softmax_backward
from curveball_fused.ops import tangents as tangent_ops

from .context import Rule, RuleContext, Tangents, tensors

Pair = tuple[Tensor, Tensor]


class _Elementwise(torch.autograd.Function):
    """y = f(x), which keeps f'(x) for the pull-back, so that neither product computes it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, with_derivative: Callable[[Tensor], Pair]) -> Pair:
        y, derivative = with_derivative(x)
        ctx.save_for_backward(derivative)
        ctx.mark_non_differentiable(derivative)
        return y, derivative

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor, _: Any) -> tuple[Tensor, None]:
        return cotangent * ctx.saved_tensors[0], None


def elementwise(
    function: Callable[..., Tensor], ctx: RuleContext, input: Tensor, *args: Any, inplace: bool = False, **kwargs: Any
) -> Any:
    """y = f(x);  ẏ = f'(x) ẋ, with f' by one dual number of tangent 1."""
    if ctx.tangent_index(input) is None or tensors((args, list(kwargs.values()))):
        return NotImplemented

    def with_derivative(x: Tensor) -> Pair:
        with set_forward_grad_enabled(True), dual_level():
            y, derivative = fwAD.unpack_dual(function(fwAD.make_dual(x.detach(), torch.ones_like(x)), *args, **kwargs))
        return y, torch.zeros_like(y) if derivative is None else derivative

    return _recorded(ctx, input, with_derivative, inplace)


def _recorded(ctx: RuleContext, input: Tensor, with_derivative: Callable[[Tensor], Pair], inplace: bool) -> Any:
    at = ctx.tangent_index(input)
    output, derivative = _Elementwise.apply(input, with_derivative)  # type: ignore[no-untyped-call]
    derivative = ctx.save(derivative)
    return input.copy_(output) if inplace else output, lambda tangents: tangents[at] * derivative


def relu(ctx: RuleContext, input: Tensor, inplace: bool = False) -> Any:
    """y = max(x, 0);  ẏ = ẋ where y > 0."""
    at = ctx.tangent_index(input)
    output = torch.relu_(input) if inplace else torch.relu(input)
    y = ctx.save(output)
    return output, lambda tangents: torch.ops.aten.threshold_backward(tangents[at], y, 0)


def gelu(ctx: RuleContext, input: Tensor, *, approximate: str = "none") -> Any:
    """y = x Φ(x), or its approximation by tanh; one pass gives the derivative too."""
    if approximate not in ("none", "tanh"):
        return NotImplemented
    return _fused(ctx, input, "gelu" if approximate == "none" else "gelu_tanh", False)


def silu(ctx: RuleContext, input: Tensor, inplace: bool = False) -> Any:
    """y = x σ(x)."""
    return _fused(ctx, input, "silu", inplace)


def _fused(ctx: RuleContext, input: Tensor, name: str, inplace: bool) -> Any:
    def with_derivative(x: Tensor) -> Pair:
        dense = x.is_contiguous() or (x.dim() > 2 and x.movedim(1, -1).is_contiguous())
        return tangent_ops.activation(x if dense else x.contiguous(), name, backend=ctx.backend)

    return _recorded(ctx, input, with_derivative, inplace)


def tanh(ctx: RuleContext, input: Tensor) -> Any:
    """ẏ = (1 - y²) ẋ."""
    at, output = ctx.tangent_index(input), torch.tanh(input)
    y = ctx.save(output)
    return output, lambda tangents: torch.ops.aten.tanh_backward(tangents[at], y)


def sigmoid(ctx: RuleContext, input: Tensor) -> Any:
    """ẏ = y (1 - y) ẋ."""
    at, output = ctx.tangent_index(input), torch.sigmoid(input)
    y = ctx.save(output)
    return output, lambda tangents: torch.ops.aten.sigmoid_backward(tangents[at], y)


def softmax(
    ctx: RuleContext, input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Any:
    """p = softmax(x);  ṗ = p (ẋ - <p, ẋ>), symmetric."""
    if dim is None or dtype is not None or not isinstance(_stacklevel, int):  # torch.softmax has the dtype in its place
        return NotImplemented
    return _softmax(ctx, input, torch.softmax(input, dim), dim)


def safe_softmax(ctx: RuleContext, input: Tensor, dim: int) -> Any:
    """As softmax, but zero where all is -∞."""
    return _softmax(ctx, input, _torch_private.safe_softmax(input, dim), dim)


def _softmax(ctx: RuleContext, input: Tensor, output: Tensor, dim: int) -> Any:
    at, p = ctx.tangent_index(input), ctx.save(output)
    return output, lambda tangents: softmax_backward(tangents[at], p, dim, p.dtype)


def dropout(ctx: RuleContext, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """y = m x, with a mask m that is drawn once;  ẏ = m ẋ."""
    if not training or p in (0, 1):  # at 0 and 1 torch draws nothing
        return NotImplemented
    at = ctx.tangent_index(input)
    output, mask = torch.native_dropout(input, p, True)
    return input.copy_(output) if inplace else output, lambda tangents: torch.ops.aten.native_dropout_backward(
        tangents[at], mask, 1 / (1 - p)
    )


def channel_dropout(
    unbatched: int, ctx: RuleContext, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    """y = m x with one number m for each channel, which is what torch makes of a channel's one."""
    # `unbatched` is the number of dimensions at which torch takes the first one for the channels.
    if not training or inplace or input.dim() < 2 or input.dim() == unbatched:
        return NotImplemented
    at, shape = ctx.tangent_index(input), (*input.shape[:2], *[1] * (input.dim() - 2))
    mask = torch.feature_dropout(input.new_ones(shape), p, True)
    return input * mask, lambda tangents: tangents[at] * mask


def masked(ctx: RuleContext, input: Tensor, mask: Tensor, value: Any) -> Any:
    """y = x, but a constant where the mask says so;  ẏ = ẋ, but zero there."""
    if ctx.tangent_index(value) is not None or torch.broadcast_shapes(input.shape, mask.shape) != input.shape:
        return NotImplemented
    at, m = ctx.tangent_index(input), ctx.save(mask)

    def tangent_map(tangents: Tangents) -> Tensor:
        return tangents[at].masked_fill(m, 0)  # type: ignore[index,union-attr]

    return input.masked_fill(mask, value), tangent_map


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """Return `F.hardsigmoid`, of functions that torch can differentiate twice."""
    return F.hardsigmoid(input, True) if inplace else F.hardtanh(input + 3, 0.0, 6.0) / 6


TWICE_DIFFERENTIABLE: dict[Any, Callable[..., Tensor]] = {F.hardsigmoid: hardsigmoid}
RULES: dict[Any, Rule] = {
    F.relu: relu, torch.relu: relu, torch.Tensor.relu: relu,
    F.gelu: gelu, F.silu: silu,
    torch.tanh: tanh, torch.Tensor.tanh: tanh,
    torch.sigmoid: sigmoid, torch.Tensor.sigmoid: sigmoid,
    F.softmax: softmax, torch.softmax: softmax, torch.Tensor.softmax: softmax,
    _torch_private.safe_softmax: safe_softmax,
    F.dropout: dropout,
    F.dropout1d: partial(channel_dropout, 2), F.dropout2d: partial(channel_dropout, 1),
    F.dropout3d: partial(channel_dropout, 4),
    torch.masked_fill: masked, torch.Tensor.masked_fill: masked,
}  # fmt: skip
IN_PLACE: dict[Any, Rule] = {function: partial(relu, inplace=True) for function in (torch.relu_, torch.Tensor.relu_)}
RULES |= {
    function: partial(elementwise, function)
    for function in (
        F.mish, F.elu, F.selu, F.celu, F.leaky_relu, F.softplus, F.softsign, F.logsigmoid, F.hardswish,
        F.hardsigmoid, F.hardtanh, F.relu6, F.tanhshrink, torch.exp, torch.Tensor.exp, torch.log, torch.Tensor.log,
        torch.sqrt, torch.Tensor.sqrt, torch.rsqrt, torch.Tensor.rsqrt, torch.sin, torch.Tensor.sin, torch.cos,
        torch.Tensor.cos, torch.abs, torch.Tensor.abs, torch.square, torch.Tensor.square, torch.pow, torch.Tensor.pow,
        torch.Tensor.__pow__, torch.clamp, torch.Tensor.clamp, torch.erf, torch.Tensor.reciprocal,
    )
}  # fmt: skip
