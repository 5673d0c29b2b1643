"""The quadratic model of the loss around the weights, as far as a step needs it: r = Jᵀc and the terms of a 2x2 system.

The products `[g·Jz, Jz·HJz, g·Jr, Jz·HJr, Jr·HJr]` come from the small output space; the dot products
`[z·z, z·r, r·r]` follow from them by adjointness, z·r = Jz·c and r·r = Jr·c, and are then None, or are taken directly.
Loss and products are computed in float32 at least, whatever the model computes in.

These are equations (1) to (4) of docs/method.md, and the numbers that A and b of (6) are made of. Products with the
Gauss-Newton matrix JᵀHJ are Schraudolph's (2002), its damping is Martens' (2010); the solve in the plane of a direction
and the last step is that of Martens and Grosse (2015, section 7), for the direction of Henriques et al. (2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from curveball_fused import averaging, ops
from curveball_fused._torch_private import has_gradient_hooks
from curveball_fused.backends.dtypes import at_least_float32
from curveball_fused.curvature import LinearMap, ModelFn, Pullback, linearize
from curveball_fused.curvature.finite_difference import Backward, difference
from curveball_fused.loss_scale import Overflow, ScaledLinearMap, WideLinearMap, scale_tangents
from curveball_fused.losses import LossFn, LossModel
from curveball_fused.replay import Replay
from curveball_fused.settings import Settings


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
    """

    settings: Settings
    params: list[Tensor]
    z: list[Tensor]
    z_dot_z: Tensor
    methods: Sequence[str]
    compute_dtype: torch.dtype | None
    loss_scale: Tensor
    tangent_size: Tensor

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

    def loss_model(self, loss_fn: LossFn, outputs: Tensor, replay: Replay) -> LossModel:
        """Return the quadratic model of the loss at the outputs."""
        seen = at_least_float32(outputs)
        settings = self.settings
        return LossModel(
            lambda out: replay.first(lambda: loss_fn(out)), seen, settings.sign, self.params, settings.backend
        )

    def dots(self, linear: WideLinearMap, r: list[Tensor]) -> Tensor:
        """Return `[z·z, z·r, r·r]`, taken directly."""
        return linear.unscaled_dots(ops.dots(self.z, r, backend=self.settings.backend))


class QuadraticTerms(NamedTuple):
    """What a step has measured, before anything is changed.

    Attributes:
        loss, outputs: of the model, the loss 0-dim; detached.
        r: Jᵀc, of the parameters' shapes; in float16 it is multiplied by the loss scale, and there is an `overflow`.
        products: float64[5], of the unscaled r.
        dots: float64[3], likewise; None where the adjoint identities give them.
        overflow: what float16 could not hold.
        method: by which the model was linearized.
        compute_dtype: the half precision that the model computes in, or None.
    """

    loss: Tensor
    outputs: Tensor
    r: list[Tensor]
    products: Tensor
    dots: Tensor | None
    overflow: Overflow | None
    method: str
    compute_dtype: torch.dtype | None


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
    previous_system: Tensor | None = None,
    full_gradient: FullGradient | None = None,
) -> QuadraticTerms:
    """Return the terms of a step.

    Args:
        context: where the step begins.
        model_fn: returns the predictions.
        loss_fn: maps them to the scalar loss.
        replay: makes later runs of the model the same function.
        previous_system: in a step between full solves, the average of the last systems; None: a full solve.
        full_gradient: Jᵀg of another batch, to take the place of this one's in r.
    """
    if previous_system is not None and not context.hooked:
        return _measure_between_solves(context, model_fn, loss_fn, replay, previous_system, full_gradient)
    method, linear, outputs, jz, compute_dtype = _linearize(context, model_fn, replay, full_gradient)
    loss_model = context.loss_model(loss_fn, outputs, replay)
    c, products_with = loss_model.cotangent(jz)  # c = H Jz + g
    r = _pull_back(context, linear, loss_model, c, full_gradient)  # r = Jᵀc
    # Adjointness does not hold of gradients that are rounded to a lower precision or altered by a hook.
    direct = context.hooked or linear.is_scaled or full_gradient is not None or not context.precise
    dots = context.dots(linear, r) if direct else None
    jr = linear.jvp_along(r, dots)
    products = products_with(jr)
    overflow = linear.overflow(loss_model.loss, products, dots)
    settings = context.settings
    if settings.debug and full_gradient is None and not (overflow is not None and any(map(bool, overflow))):
        from curveball_fused import debug  # which no other step needs

        step = debug.Step(
            method, model_fn, loss_fn, settings.sign, context.params, replay, context.z, outputs, jz, c,
            linear.unscaled(r), jr, products,
        )  # fmt: skip
        debug.check(step)
    if full_gradient is not None:
        assert dots is not None
        products = averaging.consistent(products, dots)
    return QuadraticTerms(loss_model.loss, outputs, r, products, dots, overflow, method, compute_dtype)


def measure_with_curvature_batch(
    context: StepContext,
    model_fn: ModelFn,
    loss_fn: LossFn,
    curvature_batch: tuple[ModelFn, LossFn],
    replay: Replay,
    previous_system: Tensor | None = None,
) -> QuadraticTerms:
    """Measure loss, outputs and gradient of the full batch, and the curvature of a part of it."""
    backward = Backward(model_fn, context.params, replay)
    outputs = backward.outputs
    compute_dtype = _half_precision({outputs.dtype, *replay.dtypes}, context.params)
    linear = context.wide(backward, outputs, compute_dtype)
    loss_model = context.loss_model(loss_fn, outputs, replay)
    full_gradient = FullGradient(linear.vjp(loss_model.gradient()), linear.is_scaled, compute_dtype)
    scratch_replay = Replay(context.params, context.params[0].device)
    try:
        part = replace(context, compute_dtype=compute_dtype)
        terms = measure(part, *curvature_batch, scratch_replay, previous_system, full_gradient)
    finally:
        scratch_replay.rewind()
    overflow = terms.overflow
    if overflow is not None:  # a loss that is not finite is none
        overflow = Overflow(*(each & torch.isfinite(loss_model.loss) for each in overflow))
    return terms._replace(loss=loss_model.loss, outputs=outputs, overflow=overflow)


def _measure_between_solves(
    context: StepContext,
    model_fn: ModelFn,
    loss_fn: LossFn,
    replay: Replay,
    previous_system: Tensor,
    full_gradient: FullGradient | None,
) -> QuadraticTerms:
    """Measure without Jr: the curvature along r by ratios of the last systems."""
    measured = None
    # Double backward sees more than a moved parameter would change, and in half precision a difference drowns.
    if context.precise and context.compute_dtype is None and context.methods[0] != "double_backward":
        measured = difference(model_fn, context.params, context.z, replay)
    if measured is not None:
        backward, jz = measured
        method, outputs = context.methods[0], backward.outputs
        compute_dtype = _half_precision({outputs.dtype, *replay.dtypes}, context.params)
        linear = context.wide(backward, outputs, compute_dtype)
    else:
        method, linear, outputs, jz, compute_dtype = _linearize(context, model_fn, replay, full_gradient)
    loss_model = context.loss_model(loss_fn, outputs, replay)
    c, products_with = loss_model.cotangent(jz)
    r = _pull_back(context, linear, loss_model, c, full_gradient)
    dots = context.dots(linear, r)
    of_z = products_with(jz)
    products = averaging.products_from_previous_system(previous_system, of_z, dots)
    products = averaging.consistent(products, dots)
    overflow = linear.overflow(loss_model.loss, of_z, dots)
    return QuadraticTerms(loss_model.loss, outputs, r, products, dots, overflow, method, compute_dtype)


def _linearize(
    context: StepContext, model_fn: ModelFn, replay: Replay, full_gradient: FullGradient | None
) -> tuple[str, WideLinearMap, Tensor, Tensor, torch.dtype | None]:
    """Return the method, the map, outputs, Jz in float32 at least, and the model's half precision."""
    scaled = None
    if context.compute_dtype is torch.float16:
        scaled = scale_tangents(context.z, context.z_dot_z, context.tangent_size)
    method, linear, (outputs, jz) = linearize(
        context.methods,
        model_fn,
        context.params,
        context.z if scaled is None else scaled.tangents,
        replay,
        context.settings.tangent_backend,
    )
    jz = at_least_float32(jz) if scaled is None else scaled.unscale(jz)
    known = {outputs.dtype, *replay.dtypes}
    if full_gradient is not None and full_gradient.compute_dtype is not None:
        known.add(full_gradient.compute_dtype)
    compute_dtype = _half_precision(known, context.params)
    return method, context.wide(linear, outputs, compute_dtype), outputs, jz, compute_dtype


def _pull_back(
    context: StepContext,
    linear: WideLinearMap,
    loss_model: LossModel,
    c: Tensor,
    full_gradient: FullGradient | None,
) -> list[Tensor]:
    """Return r = Jᵀ(H Jz + g), or Jᵀ H Jz and the given gradient."""
    if full_gradient is None:
        return linear.vjp(c)
    curved, gradient = linear.vjp(c - loss_model.gradient()), full_gradient.tensors
    if linear.is_scaled and not full_gradient.is_scaled:
        gradient = [g * context.loss_scale.to(g.dtype) for g in gradient]
    return [a + b for a, b in zip(curved, gradient, strict=True)]


def _half_precision(used: set[torch.dtype], params: Sequence[Tensor]) -> torch.dtype | None:
    """Return float16 if anything is in it, else bfloat16 likewise, else None."""
    used = used | {p.dtype for p in params}
    return next((dtype for dtype in (torch.float16, torch.bfloat16) if dtype in used), None)
