"""The quadratic model of the loss around the weights, as far as a step needs it: u = P⁻¹Jᵀc and the terms of the solve.

The products `[g·Jz, Jz·HJz, g·Ju, Jz·HJu, Ju·HJu]` come from the small output space. The dot products
`[z·Pz, z·Pu, u·Pu]` are taken directly, or, where P = 1 and u = r, are None: they follow by adjointness then, as
z·r = Jz·c and r·r = Jr·c. Loss and products are computed in float32 at least, whatever the model computes in.

These are equations (1) to (4) of docs/method.md, and the numbers that A and b of (6) are made of. Products with the
Gauss-Newton matrix JᵀHJ are Schraudolph's (2002), its damping is Martens' (2010); the solve in the plane of a direction
and the last step is that of Martens and Grosse (2015, section 7), for the direction of Henriques et al. (2019).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from curveball_fused import guard, ops
from curveball_fused._torch_private import gradient_hooks_set_aside, has_gradient_hooks
from curveball_fused.backends.dtypes import at_least_float32
from curveball_fused.curvature import (
    LinearMap,
    Method,
    MethodUnsupported,
    ModelFn,
    Pullback,
    by_first_of,
    refusal,
    refusals_of,
)
from curveball_fused.curvature.backward import Backward
from curveball_fused.curvature.linear_map import own_gradients
from curveball_fused.curvature.torch_modes import announce
from curveball_fused.loss_scale import Overflow, ScaledLinearMap, WideLinearMap, scale_tangents
from curveball_fused.losses import LossFn, LossModel
from curveball_fused.preconditioners import Direction, Preconditioner
from curveball_fused.replay import Replay
from curveball_fused.settings import Settings

_NO_CURVATURE = (
    "curveball_fused: loss_fn has no curvature in the outputs, as it is linear in them, perhaps piece by piece: the "
    "steps are those of gradient descent, with a bound on their length. For Newton's let model_fn return the "
    "predictions and give the whole loss as loss_fn, such as F.cross_entropy of logits; instead of an absolute value "
    "or a hinge take a smooth one, such as F.smooth_l1_loss, F.huber_loss or F.softplus."
)


@dataclass(frozen=True)
class StepContext:
    """Where a step begins.

    Attributes:
        settings: the optimizer's options.
        params: w, those that are trained.
        z: the state, of the same shapes.
        z_dot_z: z·z, 0-dim float64.
        methods: of linearizing the model, in the order in which they are tried.
        compute_dtype: float16 or bfloat16 where the model computes in it, as far as known; else None.
        loss_scale: S, 0-dim float64, for float16.
        tangent_size: T, 0-dim float64, for float16.
        known_maps: methods and functions that the guard has found right; it adds to them.
        compares: whether the guard compares in this step in any case.
        is_first: whether it is the first step, in which the host may read a value.
        preconditioner: P; None where P = 1.
    """

    settings: Settings
    params: list[Tensor]
    z: list[Tensor]
    z_dot_z: Tensor
    methods: Sequence[str]
    compute_dtype: torch.dtype | None
    loss_scale: Tensor
    tangent_size: Tensor
    known_maps: guard.Known
    compares: bool
    is_first: bool
    preconditioner: Preconditioner | None

    @property
    def guarded(self) -> bool:
        """Whether the guard looks; debug mode does so itself."""
        return not self.settings.debug

    @cached_property
    def hooked(self) -> bool:
        """Whether hooks may alter gradients."""
        return any(has_gradient_hooks(p) for p in self.params)

    @cached_property
    def precise(self) -> bool:
        """Whether gradients are not rounded to less than float32."""
        return all(p.dtype in (torch.float32, torch.float64) for p in self.params)

    def wide(self, linear: LinearMap | Pullback, outputs: Tensor, compute_dtype: torch.dtype | None) -> WideLinearMap:
        """Return a map as the step sees it."""
        if compute_dtype is torch.float16:
            return ScaledLinearMap(linear, outputs.dtype, self.loss_scale, self.tangent_size)
        return WideLinearMap(linear, outputs.dtype)

    def loss_model(self, loss_fn: LossFn, outputs: Tensor, linear: WideLinearMap, replay: Replay) -> LossModel:
        """Return the quadratic model of the loss at the outputs."""
        seen = at_least_float32(outputs)
        settings = self.settings
        hidden = [*self.params, *linear.without_graph()]
        return LossModel(lambda out: replay.first(lambda: loss_fn(out)), seen, settings.sign, hidden, settings.backend)

    def dots(self, linear: WideLinearMap, r: list[Tensor]) -> Tensor:
        """Return `[z·z, z·r, r·r]`, taken directly."""
        return linear.unscaled_dots(ops.dots(self.z, r, backend=self.settings.backend))


class QuadraticTerms(NamedTuple):
    """What a step has measured, before anything is changed.

    Attributes:
        loss, outputs: of the model, the loss 0-dim; detached.
        u: P⁻¹Jᵀc, of the parameters' shapes; in float16 there is an `overflow`, and where P = 1 it is multiplied by the
            loss scale.
        products: float64[5], of the unscaled u.
        dots: float64[3], likewise; None where the adjoint identities give them.
        overflow: what float16 could not hold.
        method: by which the model was linearized.
        compute_dtype: the half precision that the model computes in, or None.
        comparison: of the products with dot products taken directly; None where the step's number asks for none.
        loss_size: of a loss that may be concave somewhere, as `LossModel` has it; None of others.
        direction: what P is to learn from; None where P = 1.
    """

    loss: Tensor
    outputs: Tensor
    u: list[Tensor]
    products: Tensor
    dots: Tensor | None
    overflow: Overflow | None
    method: str
    compute_dtype: torch.dtype | None
    comparison: guard.Comparison | None
    loss_size: Tensor | None
    direction: Direction | None


class FullGradient(NamedTuple):
    """Jᵀg of a full batch whose curvature is taken from a part of it.

    Attributes:
        tensors: of the parameters' shapes.
        is_scaled: whether they are multiplied by the loss scale.
        compute_dtype: the half precision that the model computes in, or None.
    """

    tensors: list[Tensor]
    is_scaled: bool
    compute_dtype: torch.dtype | None


def measure(
    context: StepContext,
    model_fn: ModelFn,
    loss_fn: LossFn,
    replay: Replay,
    full_gradient: FullGradient | None = None,
) -> QuadraticTerms:
    """Return the terms of a step that solves.

    Args:
        context: where the step begins.
        model_fn: returns the predictions.
        loss_fn: maps them to the scalar loss.
        replay: makes later runs of the model the same function.
        full_gradient: Jᵀg of another batch, to take the place of this one's in r.
    """

    def by(method: Method) -> QuadraticTerms:
        return _measure_by(method, context, model_fn, loss_fn, replay, full_gradient)

    return by_first_of(context.methods, by, model_fn, replay)


def measure_with_curvature_batch(
    context: StepContext,
    model_fn: ModelFn,
    loss_fn: LossFn,
    curvature_batch: tuple[ModelFn, LossFn],
    replay: Replay,
) -> QuadraticTerms:
    """Measure loss, outputs and gradient of the full batch, and the curvature of a part of it."""
    backward = Backward(model_fn, context.params, replay)
    outputs = backward.outputs
    compute_dtype = _half_precision({outputs.dtype, *replay.dtypes}, context.params)
    linear = context.wide(backward, outputs, compute_dtype)
    loss_model = context.loss_model(loss_fn, outputs, linear, replay)
    full_gradient = FullGradient(linear.vjp(loss_model.gradient()), linear.is_scaled, compute_dtype)
    scratch_replay = Replay(context.params, context.params[0].device)
    try:
        part = replace(context, compute_dtype=compute_dtype)
        terms = measure(part, *curvature_batch, scratch_replay, full_gradient)
    finally:
        scratch_replay.rewind()
    overflow = terms.overflow
    if overflow is not None:  # a loss that is not finite is none
        overflow = Overflow(*(each & torch.isfinite(loss_model.loss) for each in overflow))
    return terms._replace(loss=loss_model.loss, outputs=outputs, overflow=overflow)


def _measure_by(
    method: Method,
    context: StepContext,
    model_fn: ModelFn,
    loss_fn: LossFn,
    replay: Replay,
    full_gradient: FullGradient | None,
) -> QuadraticTerms:
    """Measure by one method.

    `MethodUnsupported` is raised where it cannot follow the model, or its two products are not those of one linear map.
    The arguments are those of `measure`.

    Returns:
        What `measure` returns.
    """
    linear, outputs, jz, compute_dtype = _linearize(context, method, model_fn, replay, full_gradient)
    map_ = (method.name, linear.operators)
    first = context.guarded and map_ not in context.known_maps
    compares = first or context.compares
    if compares:
        linear.compare_runs()
    loss_model = context.loss_model(loss_fn, outputs, linear, replay)
    c, products_with = loss_model.cotangent(jz)  # c = g + H Jz
    if context.settings.theta == 0:
        c = loss_model.gradient()
    with refusals_of(method), own_gradients(context.params) if first else nullcontext():
        r = _pull_back(context, linear, loss_model, c, full_gradient)  # r = Jᵀc
    # Adjointness does not hold of gradients that are rounded to a lower precision or altered by a hook.
    adjoint = not context.hooked and full_gradient is None
    direct = not adjoint or linear.is_scaled or not context.precise
    direction = None
    if context.preconditioner is None:
        u, dots = r, context.dots(linear, r) if direct else None
        with refusals_of(method):
            ju = linear.jvp_along(r, dots)
    else:
        direction = context.preconditioner.direction(linear.unscaled(r), context.z)
        u, dots = direction.u, direction.dots
        with refusals_of(method):
            ju = linear.jvp(u)
    products = products_with(ju)
    if loss_model.lacks_curvature(look=context.is_first):
        announce(_NO_CURVATURE, _NO_CURVATURE)
    overflow = linear.overflow(loss_model.loss, products, dots)
    settings = context.settings
    if settings.debug and full_gradient is None and not (overflow is not None and any(map(bool, overflow))):
        from curveball_fused import debug  # which no other step needs

        step = debug.Step(
            method.name, model_fn, loss_fn, settings.sign, context.params, replay, context.z, outputs, jz,
            settings.theta, c, linear.unscaled(r), linear.unscaled(u) if direction is None else u, ju, products,
            loss_model.has_own_curvature(),
        )  # fmt: skip
        debug.check(step)
        if context.preconditioner is not None and direction is not None:
            debug.check_metric(context.preconditioner.blocks(), direction, context.z)
    comparison = None
    if compares and adjoint:
        comparison = guard.compare(
            context.dots(linear, r) if dots is None else dots,
            ops.dots([jz], [c], backend=settings.backend),
            ops.dots([ju], [c], backend=settings.backend),
            linear.difference_of_runs(),
            {outputs.dtype, *replay.dtypes, *(p.dtype for p in context.params)},
        )
        if first:
            error = _judge(context, method, comparison, model_fn, replay)
            # An overflow of float16 says nothing, and may last for some steps: later comparisons are on the device.
            if math.isfinite(error) or overflow is not None:
                context.known_maps[map_] = error
        products = comparison.masked(products)
    elif first:
        _rehearse(context, method, model_fn, loss_fn)
    if full_gradient is not None:
        assert dots is not None
        products = _consistent(products, dots, settings.theta)
    # A first step by a method may be any, in a training that was resumed too: it leaves no trace in the state.
    noted = comparison if context.compares else None
    return QuadraticTerms(
        loss_model.loss, outputs, u, products, dots, overflow, method.name, compute_dtype, noted, loss_model.size,
        direction,
    )  # fmt: skip


def _consistent(products: Tensor, dots: Tensor, theta: float) -> Tensor:
    """Return `products` with the g·Jz and g·Ju that belong to r = Jᵀg + θJᵀHJz, whatever batch the curvature is of.

    By adjointness z·Jᵀg = z·r - θ Jz·HJz and u·Jᵀg = u·r - θ Jz·HJu: so gradient, direction and A are of one model,
    m(d) = g·d + ½ d·(JᵀHJ + λP) d, which decreases along the solution.
    """
    z_hz, z_hu, u_hu = products[1], products[3], products[4]
    return torch.stack((dots[1] - theta * z_hz, z_hz, dots[2] - theta * z_hu, z_hu, u_hu))


def _judge(
    context: StepContext,
    method: Method,
    comparison: guard.Comparison,
    model_fn: ModelFn,
    replay: Replay,
) -> float:
    """Read a comparison on the host, in the first step by a method or by other functions.

    Args:
        context: where the step begins.
        method: that has measured.
        comparison: of what it has measured.
        model_fn: called without arguments, returns the predictions.
        replay: makes another run of the model the same function.

    Returns:
        The largest error; NaN where it cannot be read, or is none.

    Raises:
        MethodUnsupported: it has failed; the message names the function if this is the last method.
    """
    if comparison.errors.is_cuda and torch.cuda.is_current_stream_capturing():
        return math.nan  # nothing can be read then; the steps before the capture were judged
    complaint = comparison.complaint()
    if complaint:
        if method.name == context.methods[-1]:
            from curveball_fused import debug

            complaint = f"{complaint}. {debug.suspects(method.name, model_fn, replay)}"
        raise MethodUnsupported(refusal(method, complaint))
    return float(comparison.worst())


def _rehearse(context: StepContext, method: Method, model_fn: ModelFn, loss_fn: LossFn) -> None:
    """Let the guard see a step as it is without hooks and without another batch's gradient, which hide its identities.

    Nothing stays of it, but that the guard knows the map.
    """
    scratch_replay = Replay(context.params, context.params[0].device)
    plain = replace(context)
    try:
        with gradient_hooks_set_aside(context.params):
            _measure_by(method, plain, model_fn, loss_fn, scratch_replay, None)
    finally:
        scratch_replay.rewind()


def _linearize(
    context: StepContext, method: Method, model_fn: ModelFn, replay: Replay, full_gradient: FullGradient | None
) -> tuple[WideLinearMap, Tensor, Tensor, torch.dtype | None]:
    """Return the map, outputs, Jz in float32 at least, and the model's half precision."""
    scaled = None
    if context.compute_dtype is torch.float16:
        scaled = scale_tangents(context.z, context.z_dot_z, context.tangent_size)
    with refusals_of(method):
        linear = method.build(model_fn, context.params, replay, context.settings.tangent_backend)
        outputs, jz = linear.jvp(context.z if scaled is None else scaled.tangents)
    jz = at_least_float32(jz) if scaled is None else scaled.unscale(jz)
    known = {outputs.dtype, *replay.dtypes}
    if full_gradient is not None and full_gradient.compute_dtype is not None:
        known.add(full_gradient.compute_dtype)
    compute_dtype = _half_precision(known, context.params)
    return context.wide(linear, outputs, compute_dtype), outputs, jz, compute_dtype


def _pull_back(
    context: StepContext,
    linear: WideLinearMap,
    loss_model: LossModel,
    c: Tensor,
    full_gradient: FullGradient | None,
) -> list[Tensor]:
    """Return r = Jᵀ(g + θ H Jz), or θ Jᵀ H Jz and the given gradient."""
    if full_gradient is None:
        return linear.vjp(c)
    gradient = full_gradient.tensors
    if linear.is_scaled and not full_gradient.is_scaled:
        gradient = [g * context.loss_scale.to(g.dtype) for g in gradient]
    if context.settings.theta == 0:
        return gradient
    curved = linear.vjp(c - loss_model.gradient())
    return [a + b for a, b in zip(curved, gradient, strict=True)]


def _half_precision(used: set[torch.dtype], params: Sequence[Tensor]) -> torch.dtype | None:
    """Return float16 if anything is in it, else bfloat16 likewise, else None."""
    used = used | {p.dtype for p in params}
    return next((dtype for dtype in (torch.float16, torch.bfloat16) if dtype in used), None)
