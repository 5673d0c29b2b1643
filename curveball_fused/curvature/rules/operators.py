"""Rules for operators: what autograd makes of torch functions, and what its backward passes are composed of.

A rule is given an `OperatorContext` and the arguments of a call that has been made, and returns the map of its result,
or the maps of its results; or `NotImplemented`, for a case that it leaves to torch's dual numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from typing_extensions import override

from curveball_fused._torch_private import OpOverload, dual_level, softmax_backward, version_of

from .context import Map, RuleContext, Tangents, snapshot, tangent_at, tensors

aten = torch.ops.aten


class OperatorContext(RuleContext):
    """One call of an operator that has been made.

    Args:
        slots: where the tangent of each tensor among the arguments stands, by the tensor's identity; None: constant.
        result: what the call has returned.
    """

    def __init__(self, slots: dict[int, int | None], result: Any) -> None:
        super().__init__(slots, "auto")
        self.result = result

    @override
    def save(self, value: Any) -> Any:
        """Return a value for the map to read: a tensor, writing to which later is an error, or what is none."""
        # With its graph: below autograd, where operators run, a detached tensor would count its own writes only.
        if isinstance(value, Tensor):
            self.saved.append((value, version_of(value)))
        return value


OperatorRule = Callable[..., Any]


def structural(function: Callable[..., Any], ctx: OperatorContext, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Linear in its first argument, and all others are constant: the map is the operator."""
    at, others = ctx.tangent_index(input), tensors((*args, *kwargs.values()))
    if at is None or not ctx.constant(others):
        return NotImplemented
    for constant in others:
        ctx.save(constant)
    args, kwargs = snapshot(args), snapshot(kwargs)
    if isinstance(ctx.result, Tensor):
        return lambda tangents: function(tangents[at], *args, **kwargs)

    def map_of(index: int) -> Map:
        return lambda tangents: function(tangents[at], *args, **kwargs)[index]

    return [map_of(index) for index in range(len(ctx.result))]


def view(ctx: OperatorContext, input: Tensor, *_: Any) -> Any:
    """Reshape: a tangent need not lie in memory as its tensor does."""
    at, shape = ctx.tangent_index(input), ctx.result.shape
    return lambda tangents: tangents[at].reshape(shape)


class Part:
    """The elements of a view, by their place in the memory of its base.

    Args:
        base: the tensor that the view is of.
        size, stride, offset: the view's, as in `torch.as_strided`.
    """

    def __init__(self, base: Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> None:
        self._of_base = base.shape, base.stride(), base.dtype, base.device
        self._place = size, stride, offset - base.storage_offset()

    def laid_out(self, tangent: Tensor | None) -> Tensor:
        """Return a copy, zero for None, that lies in memory as the base does."""
        shape, stride, dtype, device = self._of_base
        copy = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        return copy.zero_() if tangent is None else copy.copy_(tangent)

    def of(self, laid_out: Tensor) -> Tensor:
        """Return the part of a tensor that lies in memory as the base does, from its beginning."""
        return laid_out.as_strided(*self._place)


def as_strided(
    ctx: OperatorContext, input: Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Any:
    """View what must lie in memory as its tensor does."""
    if any(step == 0 for step in input.stride()):
        return NotImplemented
    at, part = ctx.tangent_index(input), Part(input, size, stride, ctx.result.storage_offset())
    return lambda tangents: part.of(part.laid_out(tangents[at]))


def matrix_product(function: Callable[[Tensor, Tensor], Tensor], ctx: OperatorContext, a: Tensor, b: Tensor) -> Any:
    """y = A B;  ẏ = Ȧ B + A Ḃ, the second product added in place."""
    if a.layout != torch.strided or b.layout != torch.strided:
        return NotImplemented
    at_a, at_b = ctx.tangent_index(a), ctx.tangent_index(b)
    a, b = (a if at_b is None else ctx.save(a)), (b if at_a is None else ctx.save(b))
    add_ = torch.Tensor.addmm_ if function is torch.mm else torch.Tensor.baddbmm_

    def tangent_map(tangents: Tangents) -> Tensor:
        da, db = tangent_at(tangents, at_a), tangent_at(tangents, at_b)
        if da is None:
            return function(a, db)  # type: ignore[arg-type]
        return function(da, b) if db is None else add_(function(da, b), a, db)

    return tangent_map


def affine(ctx: OperatorContext, bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """y = b + A B;  ẏ = ḃ + Ȧ B + A Ḃ."""
    if beta != 1 or alpha != 1 or a.layout != torch.strided or b.layout != torch.strided:
        return NotImplemented
    at, at_a, at_b = ctx.tangent_index(bias), ctx.tangent_index(a), ctx.tangent_index(b)
    a, b = (a if at_b is None else ctx.save(a)), (b if at_a is None else ctx.save(b))
    shape = ctx.result.shape

    def tangent_map(tangents: Tangents) -> Tensor:
        dbias, da, db = (tangent_at(tangents, each) for each in (at, at_a, at_b))
        tangent = dbias
        for left, right in ((da, b), (a, db)):
            if (left is da and da is None) or (right is db and db is None):
                continue
            if tangent is None:
                tangent = torch.mm(left, right)  # type: ignore[arg-type]
            elif tangent is dbias:
                tangent = torch.addmm(tangent, left, right)  # type: ignore[arg-type]
            else:
                tangent.addmm_(left, right)  # type: ignore[arg-type]
        return tangent.expand(shape)  # type: ignore[union-attr]

    return tangent_map


def product(ctx: OperatorContext, a: Tensor, b: Tensor) -> Any:
    """y = a b;  ẏ = ȧ b + a ḃ."""
    at_a, at_b = ctx.tangent_index(a), ctx.tangent_index(b)
    a, b = (a if at_b is None else ctx.save(a)), (b if at_a is None else ctx.save(b))

    def tangent_map(tangents: Tangents) -> Tensor:
        da, db = tangent_at(tangents, at_a), tangent_at(tangents, at_b)
        if da is None:
            return a * db  # type: ignore[operator]
        return da * b if db is None else (da * b).addcmul_(a, db)

    return tangent_map


def quotient(ctx: OperatorContext, a: Tensor, b: Tensor) -> Any:
    """y = a / b;  ẏ = (ȧ - y ḃ) / b."""
    at_a, at_b, b = ctx.tangent_index(a), ctx.tangent_index(b), ctx.save(b)
    a = a if at_b is None else ctx.save(a)
    y = functools.cache(lambda: a / b)  # anew, as the model may write to the result

    def tangent_map(tangents: Tangents) -> Tensor:
        da, db = tangent_at(tangents, at_a), tangent_at(tangents, at_b)
        if db is None:
            return da / b  # type: ignore[arg-type,operator]
        return (-y() * db if da is None else torch.addcmul(da, y(), db, value=-1)) / b

    return tangent_map


def total(sign: int, ctx: OperatorContext, a: Tensor, b: Any, *, alpha: Any = 1) -> Any:
    """y = a ± αb;  ẏ = ȧ ± αḃ, where a constant adds nothing, but may have made the result larger."""
    factor, at_a, at_b, shape = sign * alpha, ctx.tangent_index(a), ctx.tangent_index(b), ctx.result.shape

    def tangent_map(tangents: Tangents) -> Tensor:
        da, db = tangent_at(tangents, at_a), tangent_at(tangents, at_b)
        if da is not None and db is not None:
            return torch.add(da, db, alpha=factor)
        one = da if db is None else db if factor == 1 else db * factor
        return one.expand(shape)  # type: ignore[union-attr]

    return tangent_map


def tanh(ctx: OperatorContext, x: Tensor) -> Any:
    """ẏ = (1 - y²) ẋ."""
    at, y = ctx.tangent_index(x), ctx.save(ctx.result)
    return lambda tangents: aten.tanh_backward(tangents[at], y)


def tanh_backward(ctx: OperatorContext, g: Tensor, y: Tensor) -> Any:
    """q = g (1 - y²);  q̇ = ġ (1 - y²) - 2 g y ẏ, with g y kept from one product to the next."""
    at_g, at_y, y = ctx.tangent_index(g), ctx.tangent_index(y), ctx.save(y)
    g = g if at_y is None else ctx.save(g)
    factor = functools.cache(lambda: g * y)

    def tangent_map(tangents: Tangents) -> Tensor:
        dg, dy = tangent_at(tangents, at_g), tangent_at(tangents, at_y)
        if dy is None:
            return aten.tanh_backward(dg, y)  # type: ignore[no-any-return]
        if dg is None:
            return (factor() * dy).mul_(-2)
        return aten.tanh_backward(dg, y).addcmul_(factor(), dy, value=-2)  # type: ignore[no-any-return]

    return tangent_map


def elementwise(function: Callable[..., Tensor], ctx: OperatorContext, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """y = f(x);  ẏ = f'(x) ẋ, the derivative kept from one product to the next."""
    if ctx.tangent_index(x) is None or tensors((*args, *kwargs.values())):
        return NotImplemented
    at, x = ctx.tangent_index(x), ctx.save(x)
    derivative = functools.cache(lambda: _derivative(lambda x: function(x, *args, **kwargs), x))
    return lambda tangents: derivative() * tangents[at]


def elementwise_backward(
    function: Callable[..., Tensor], ctx: OperatorContext, g: Tensor, x: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """q = g f', a function of x, or of y = f(x);  q̇ = ġ f' + c ẋ, with c = g ∂f' kept from one product to the next."""
    if tensors((*args, *kwargs.values())):
        return NotImplemented
    at_g, at_x, x = ctx.tangent_index(g), ctx.tangent_index(x), ctx.save(x)
    g = g if at_x is None else ctx.save(g)
    factor = functools.cache(lambda: _derivative(lambda x: function(g, x, *args, **kwargs), x))

    def tangent_map(tangents: Tangents) -> Tensor:
        dg, dx = tangent_at(tangents, at_g), tangent_at(tangents, at_x)
        if dg is None:
            return factor() * dx  # type: ignore[operator]
        tangent = function(dg, x, *args, **kwargs)
        return tangent if dx is None else tangent.addcmul_(factor(), dx)

    return tangent_map


def _derivative(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the derivative of a function of one element, by one dual number of tangent 1."""
    with dual_level():
        derivative = fwAD.unpack_dual(function(fwAD.make_dual(x, torch.ones_like(x)))).tangent
    if derivative is None:
        raise TypeError("its forward mode gives no tangent")
    return derivative  # type: ignore[no-any-return]


def masked_gradient(function: Callable[..., Tensor], ctx: OperatorContext, g: Tensor, *args: Any) -> Any:
    """q = g where the other arguments, which have no derivative here, say so."""
    at, zero = ctx.tangent_index(g), ctx.result.detach()
    args = tuple([ctx.save(a) for a in args])
    return lambda tangents: torch.zeros_like(zero) if at is None else function(tangents[at], *args)


def masked_fill(ctx: OperatorContext, input: Tensor, mask: Tensor, value: Any) -> Any:
    """y = x, but a constant where the mask says so;  ẏ = ẋ, but zero there."""
    at, shape = ctx.tangent_index(input), ctx.result.shape
    if at is None or ctx.tangent_index(value) is not None:
        return NotImplemented
    m = ctx.save(mask)
    return lambda tangents: tangents[at].expand(shape).masked_fill(m, 0)


def embedding(
    ctx: OperatorContext,
    weight: Tensor,
    index: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """y = W[i];  ẏ = Ẇ[i], but zero at the padding index, whose gradient torch's backward pass takes for zero."""
    if scale_grad_by_freq:
        raise NotImplementedError("with scale_grad_by_freq, which makes its gradient that of another function")
    at, index = ctx.tangent_index(weight), ctx.save(index)
    padded = None if padding_idx < 0 else (index == padding_idx).unsqueeze(-1)

    def tangent_map(tangents: Tangents) -> Tensor:
        tangent = aten.embedding(tangents[at], index)  # type: ignore[index]
        return tangent if padded is None else tangent.masked_fill_(padded, 0)  # type: ignore[no-any-return]

    return tangent_map


def softmax(ctx: OperatorContext, x: Tensor, dim: int, _: bool) -> Any:
    """p = softmax(x);  ṗ = p (ẋ - <p, ẋ>), symmetric."""
    at, p = ctx.tangent_index(x), ctx.save(ctx.result)
    return lambda tangents: softmax_backward(tangents[at], p, dim, p.dtype)


def dropout(ctx: OperatorContext, input: Tensor, p: float, train: bool | None) -> Any:
    """y = m x, with a mask m that is drawn once;  ẏ = m ẋ."""
    if train is False or p in (0, 1):  # at 0 and 1 torch draws nothing
        return NotImplemented
    at, mask = ctx.tangent_index(input), ctx.save(ctx.result[1])
    return [lambda tangents: aten.native_dropout_backward(tangents[at], mask, 1 / (1 - p))] * 2


def copy(ctx: OperatorContext, _: Tensor, source: Tensor, non_blocking: bool = False) -> Any:
    """y = b, in the shape and dtype of what it takes the place of;  ẏ = ḃ."""
    at, zero = ctx.tangent_index(source), ctx.result.detach()
    return lambda tangents: torch.zeros_like(zero) if at is None else tangents[at].expand(zero.shape)


def concatenation(function: Callable[..., Tensor], ctx: OperatorContext, parts: Sequence[Tensor], dim: int = 0) -> Any:
    """Concatenate; a part that is constant has the tangent zero."""
    places, constants = [ctx.tangent_index(part) for part in parts], [part.detach() for part in parts]

    def tangent_map(tangents: Tangents) -> Tensor:
        own = (tangent_at(tangents, at) for at in places)
        return function([torch.zeros_like(c) if t is None else t for t, c in zip(own, constants, strict=True)], dim)

    return tangent_map


def convolution(ctx: OperatorContext, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Any:
    """y = x * W + b;  ẏ = ẋ * W + x * Ẇ + ḃ; a transposed convolution likewise."""
    at_x, at_w, at_b = ctx.tangent_index(x), ctx.tangent_index(weight), ctx.tangent_index(bias)
    x, w, args, shape = ctx.save(x), ctx.save(weight), snapshot(args), ctx.result.shape

    def tangent_map(tangents: Tangents) -> Tensor:
        dx, dw, db = (tangent_at(tangents, at) for at in (at_x, at_w, at_b))
        if dx is None and dw is None:
            return db.view(-1, *[1] * (w.dim() - 2)).expand(shape)  # type: ignore[union-attr]
        if dw is None:
            return aten.convolution(dx, w, db, *args)  # type: ignore[no-any-return]
        tangent = aten.convolution(x, dw, db, *args)
        return tangent if dx is None else tangent.add_(aten.convolution(dx, w, None, *args))  # type: ignore[no-any-return]

    return tangent_map


def convolution_backward(
    ctx: OperatorContext, g: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, *args: Any
) -> Any:
    """Return the maps of the gradients of x, W and b, which are linear in g, and in W, in x, in neither."""
    own, places = [ctx.save(t) for t in (g, x, weight)], [ctx.tangent_index(t) for t in (g, x, weight)]
    args, results = snapshot(args[:-1]), ctx.result

    def map_of(which: int, factors: tuple[int, ...]) -> Map:
        mask = [i == which for i in range(3)]

        def tangent_map(tangents: Tangents) -> Tensor:
            tangent = torch.zeros_like(results[which])
            for factor in factors:
                one = tangent_at(tangents, places[factor])
                if one is not None:
                    arguments = [one if i == factor else t for i, t in enumerate(own)]
                    tangent += aten.convolution_backward(*arguments, bias_sizes, *args, mask)[which]
            return tangent

        return tangent_map

    return [map_of(0, (0, 2)), map_of(1, (0, 1)), map_of(2, (0,))]


# Linear in each argument that has a tangent, for complex numbers too.
LINEAR: dict[OpOverload, OperatorRule] = {
    operator: partial(structural, operator)
    for operator in (
        aten.t.default, aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.default,
        aten.squeeze.dim, aten.squeeze.dims, aten.expand.default, aten.select.int, aten.slice.Tensor,
        aten.select_backward.default, aten.slice_backward.default, aten.diagonal.default,
        aten.diagonal_backward.default, aten.unfold.default, aten.unfold_backward.default, aten.clone.default,
        aten.alias.default, aten.neg.default, aten.sum.default, aten.sum.dim_IntList, aten.mean.default,
        aten.mean.dim, aten._to_copy.default, aten.flip.default, aten.roll.default, aten.triu.default,
        aten.tril.default, aten.cumsum.default, aten.repeat.default, aten.constant_pad_nd.default,
        aten.index_select.default, aten.gather.default, aten.index.Tensor, aten.split.Tensor,
        aten.split_with_sizes.default, aten.unbind.int, aten.mul.Scalar, aten.div.Scalar, aten.avg_pool2d.default,
        aten.avg_pool2d_backward.default,
    )
}  # fmt: skip
LINEAR |= dict.fromkeys((aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default), view)
LINEAR |= {aten.mm.default: partial(matrix_product, torch.mm), aten.bmm.default: partial(matrix_product, torch.bmm)}
LINEAR |= {aten.addmm.default: affine, aten.mul.Tensor: product, aten.copy.default: copy}
LINEAR |= {aten.as_strided.default: as_strided}
LINEAR |= {aten.add.Tensor: partial(total, 1), aten.sub.Tensor: partial(total, -1)}
LINEAR |= {aten.cat.default: partial(concatenation, torch.cat), aten.stack.default: partial(concatenation, torch.stack)}
RULES = LINEAR | {aten.tanh.default: tanh, aten.tanh_backward.default: tanh_backward, aten._softmax.default: softmax}
RULES |= {aten.div.Tensor: quotient, aten.embedding.default: embedding, aten.native_dropout.default: dropout}
RULES |= {aten.masked_fill.Scalar: masked_fill, aten.masked_fill.Tensor: masked_fill}
RULES |= {
    operator: partial(elementwise, operator)
    for operator in (
        aten.exp.default, aten.log.default, aten.sin.default, aten.cos.default, aten.sigmoid.default,
        aten.silu.default, aten.gelu.default, aten.softplus.default, aten.elu.default, aten.mish.default,
        aten.leaky_relu.default, aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.erf.default,
        aten.abs.default, aten.pow.Tensor_Scalar,
    )
}  # fmt: skip
RULES |= {
    operator: partial(elementwise_backward, operator)
    for operator in (
        aten.sigmoid_backward.default, aten.silu_backward.default, aten.gelu_backward.default,
        aten.softplus_backward.default, aten.mish_backward.default, aten.hardswish_backward.default,
    )
}  # fmt: skip
RULES |= {
    operator: partial(masked_gradient, operator)
    for operator in (
        aten.threshold_backward.default, aten.leaky_relu_backward.default, aten.hardtanh_backward.default,
        aten.hardsigmoid_backward.default, aten.nll_loss_backward.default, aten.nll_loss2d_backward.default,
    )
}  # fmt: skip
RULES |= {aten.convolution.default: convolution, aten.convolution_backward.default: convolution_backward}
