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
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from curveball_fused._torch_private import gradient_hooks_set_aside
from curveball_fused.batch import BatchMean, Part, dtype_of, in_share
from curveball_fused.curvature import Method, by_first_of
from curveball_fused.curvature.backward import Backward
from curveball_fused.loss_scale import Overflow, WideLinearMap
from curveball_fused.losses import substituted, with_sixth
from curveball_fused.replay import Replays
from curveball_fused.user_warnings import announce

from .comparison import check_by_differences, compared, judge
from .context import FullGradient, QuadraticTerms, StepContext
from .runs import Run, first_runs, half_precision, images, is_new

_NO_CURVATURE = (
    "curveball_fused: loss_fn has no curvature in the outputs, as it is linear in them, perhaps piece by piece: the "
    "steps are those of gradient descent, with a bound on their length. For Newton's let model_fn return the "
    "predictions and give the whole loss as loss_fn, such as F.cross_entropy of logits; instead of an absolute value "
    "or a hinge take a smooth one, such as F.smooth_l1_loss, F.huber_loss or F.softplus."
)


def measure(
    context: StepContext, parts: Sequence[Part], replays: Replays, full_gradient: FullGradient | None = None
) -> QuadraticTerms:
    """Return the terms of a step that solves.

    Args:
        context: where the step begins.
        parts: of the batch.
        replays: make later runs of the model the same function.
        full_gradient: Jᵀg of another batch, to take the place of this one's in r.
    """

    def by(method: Method) -> QuadraticTerms:
        return _measure_by(method, context, parts, replays, full_gradient)

    return by_first_of(context.methods, by, [part.model_fn for part in parts], replays)


def measure_with_curvature_batch(
    context: StepContext, parts: Sequence[Part], curvature_parts: Sequence[Part], replays: Replays
) -> QuadraticTerms:
    """Measure loss, outputs and gradient of the full batch, and the curvature of a part of it."""
    mean, compute_dtype, is_scaled = BatchMean(context.params, len(parts), context.processes), None, False
    losses, all_outputs = [], []
    for i, (model_fn, loss_fn, _) in enumerate(parts):
        backward = Backward(model_fn, context.params, replays[i])
        mean.weigh(parts[i])
        outputs = backward.outputs
        compute_dtype = half_precision({compute_dtype, outputs.dtype, *replays.dtypes}, context.params)
        is_scaled = compute_dtype is torch.float16 if i == 0 else is_scaled
        linear = context.wide(backward, outputs, is_scaled)
        loss_model = context.loss_model(loss_fn, outputs, linear, replays[i])
        mean.pull_back(partial(linear.vjp, mean.weighed(loss_model.gradient())))
        losses.append(loss_model.loss)
        all_outputs.append(outputs)
        del backward, linear, loss_model  # before the next part runs
    if len(parts) > 1:
        replays.close()
    loss = mean.of_losses(losses)
    own = mean.gradient() if context.processes is None else [g.clone() for g in mean.gradient()]  # one more sum follows
    full_gradient = FullGradient(own, is_scaled, compute_dtype)
    scratch_replays = replays.scratches()
    try:
        part = replace(context, compute_dtype=compute_dtype)
        terms = measure(part, curvature_parts, scratch_replays, full_gradient)
    finally:
        scratch_replays.rewind()
    overflow = terms.overflow
    if overflow is not None:  # a loss that is not finite is none
        overflow = Overflow(*(each & torch.isfinite(loss) for each in overflow))
    return terms._replace(loss=loss, loss_dtype=dtype_of(losses), outputs=all_outputs, overflow=overflow, mean=mean)


def _measure_by(
    method: Method,
    context: StepContext,
    parts: Sequence[Part],
    replays: Replays,
    full_gradient: FullGradient | None,
) -> QuadraticTerms:
    """Measure by one method.

    `MethodUnsupported` is raised where it cannot follow the model, or its two products are not those of one linear map.
    The arguments are those of `measure`.

    Returns:
        What `measure` returns.
    """
    settings = context.settings
    mean = BatchMean(context.params, len(parts), context.processes)
    runs = first_runs(method, context, parts, replays, full_gradient, mean, partial(_rehearse, context, method))
    run = runs[-1]
    linear = cast(WideLinearMap, run.linear)
    r = mean.gradient() if full_gradient is None else _with_full_gradient(context, linear, mean, full_gradient)
    # Adjointness does not hold of gradients that are rounded to a lower precision or altered by a hook.
    adjoint = full_gradient is None and (context.processes is not None or not context.hooked)
    # Of other processes none knows whether they have hooks, and all must compute the same.
    direct = not adjoint or linear.is_scaled or not context.precise or context.processes is not None
    direction = None
    if context.preconditioner is None:
        u, dots = r, context.dots(linear, r) if direct else None
    else:
        direction = context.preconditioner.direction(linear.unscaled(r), context.z)
        u, dots = direction.u, direction.dots
    ju = images(context, method, parts, replays, runs, u, dots)
    own_products = [run.products_with(t) for run, t in zip(runs, ju, strict=True)]
    loss, products, size, missing = _of_whole(mean, runs, own_products)
    by_autograd = not all(run.loss_model.has_closed_form for run in runs)
    if by_autograd and context.is_first and missing is not None and bool(missing):
        announce(_NO_CURVATURE, _NO_CURVATURE)
    overflow = linear.overflow(loss, products, dots)
    is_debugged = settings.debug and mean.is_plain and full_gradient is None
    is_debugged = is_debugged and bool(parts[0].weight())  # what a part without a weight computes may be no number
    if is_debugged and (overflow is None or not any(map(bool, overflow))):
        own_r, own_u = linear.unscaled(r), linear.unscaled(u) if direction is None else u
        own_curvature = not (run.loss_model.is_nll or (missing is not None and bool(missing)))
        check_by_differences(
            context, method, parts[0], replays[0], run, own_r, own_u, ju[0], products, direction, own_curvature
        )
    comparison = None
    first = context.processes is None and any(is_new(context, run) for run in runs)
    if (first or context.compares) and adjoint:
        directly = context.dots(linear, r) if dots is None else dots
        dtypes = {*(run.outputs.dtype for run in runs), *replays.dtypes, *(p.dtype for p in context.params)}
        comparison = compared(context, mean, runs, ju, directly, linear.difference_of_runs(), dtypes)
        if first:
            error = judge(context, method, comparison, parts, replays)
            # An overflow of float16 says nothing, and may last for some steps: later comparisons are on the device.
            if math.isfinite(error) or overflow is not None:
                context.known_maps.update({run.map_: error for run in runs if is_new(context, run)})
        products = comparison.masked(products)
    elif first:
        _rehearse(context, method, parts, replays)
    if full_gradient is not None:
        assert dots is not None
        products = _consistent(products, dots, settings.theta)
    # A first step by a method may be any, in a training that was resumed too: it leaves no trace in the state.
    noted = comparison if context.compares else None
    loss_dtype = dtype_of([run.loss_model.loss for run in runs])
    return QuadraticTerms(
        loss, loss_dtype, [run.outputs for run in runs], u, products, dots, overflow, method.name, run.compute_dtype,
        noted, size, direction, mean,
    )  # fmt: skip


def _of_whole(
    mean: BatchMean, runs: Sequence[Run], products: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return loss, products, `loss_size` and whether the curvature is missing, of the whole batch from its parts."""
    sizes = [run.loss_model.size for run in runs]
    along_z = mean.beside()
    if mean.is_plain:
        whole, missing = (products[0], None) if along_z is None else substituted(products[0], along_z)
        return runs[0].loss_model.loss, whole, sizes[0], missing
    numbers = []
    for run, products_i, size, share in zip(runs, products, sizes, mean.shares, strict=True):
        loss = run.loss_model.loss.double()
        if size is None:
            products_i = with_sixth(products_i)
        own = in_share(torch.cat((loss[None], products_i)), share)
        numbers.append(torch.cat((own, torch.full_like(own[:1], float(size is not None)))))
    total, of_z = mean.sum(numbers), cast(Tensor, along_z)
    whole, missing = substituted(total[1:7], of_z)
    # What is without a bound in one process may have one in another.
    return total[0], whole, torch.where(total[7] > 0, of_z[1], torch.inf), missing


def _consistent(products: Tensor, dots: Tensor, theta: float) -> Tensor:
    """Return `products` with the g·Jz and g·Ju that belong to r = Jᵀg + θJᵀHJz, whatever batch the curvature is of.

    By adjointness z·Jᵀg = z·r - θ Jz·HJz and u·Jᵀg = u·r - θ Jz·HJu: so gradient, direction and A are of one model,
    m(d) = g·d + ½ d·(JᵀHJ + λP) d, which decreases along the solution.
    """
    z_hz, z_hu, u_hu = products[1], products[3], products[4]
    return torch.stack((dots[1] - theta * z_hz, z_hz, dots[2] - theta * z_hu, z_hu, u_hu))


def _rehearse(context: StepContext, method: Method, parts: Sequence[Part], replays: Replays) -> None:
    """Let the guard see a step as it is without hooks, another batch's gradient and other processes.

    The first two hide its identities. Nothing stays of it, but that the guard knows the map.
    """
    alone = replace(context, processes=None, is_first=False)  # what it finds missing, the whole may have
    scratch_replays = replays.scratches()
    try:
        with gradient_hooks_set_aside(context.params):
            _measure_by(method, alone, parts, scratch_replays, None)
    finally:
        scratch_replays.rewind()


def _with_full_gradient(
    context: StepContext, linear: WideLinearMap, mean: BatchMean, full_gradient: FullGradient
) -> list[Tensor]:
    """Return r = θ Jᵀ H Jz, as `mean` has it, and the given gradient."""
    gradient = full_gradient.tensors
    if linear.is_scaled and not full_gradient.is_scaled:
        gradient = [g * context.loss_scale.to(g.dtype) for g in gradient]
    if context.settings.theta == 0:
        return gradient
    return [a + b for a, b in zip(mean.gradient(), gradient, strict=True)]
