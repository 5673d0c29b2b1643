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
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from curveball_fused import guard, ops
from curveball_fused._torch_private import gradient_hooks_set_aside, has_gradient_hooks
from curveball_fused.backends.dtypes import at_least_float32
from curveball_fused.batch import BatchMean, Part, in_share
from curveball_fused.curvature import (
    LinearMap,
    Method,
    MethodUnsupported,
    Pullback,
    by_first_of,
    refusal,
    refusals_of,
)
from curveball_fused.curvature.backward import Backward
from curveball_fused.curvature.linear_map import own_gradients
from curveball_fused.data_parallel import Processes
from curveball_fused.loss_scale import Overflow, ScaledLinearMap, WideLinearMap, scale_tangents
from curveball_fused.losses import LossFn, LossModel, curved, stretch, substituted
from curveball_fused.preconditioners import Direction, Preconditioner
from curveball_fused.replay import Replay, Replays
from curveball_fused.settings import Settings
from curveball_fused.user_warnings import announce

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
        processes: that train the parameters together; None: this one alone.
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
    processes: Processes | None

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

    def wide(self, linear: LinearMap | Pullback, outputs: Tensor, is_scaled: bool) -> WideLinearMap:
        """Return a map as the step sees it, with the loss scale or without."""
        if is_scaled:
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
        loss: of the whole batch, 0-dim, detached.
        outputs: of the model for each part of it, detached.
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
        mean: by which numbers of the parts become those of the whole.
    """

    loss: Tensor
    outputs: list[Tensor]
    u: list[Tensor]
    products: Tensor
    dots: Tensor | None
    overflow: Overflow | None
    method: str
    compute_dtype: torch.dtype | None
    comparison: guard.Comparison | None
    loss_size: Tensor | None
    direction: Direction | None
    mean: BatchMean


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


class _Run(NamedTuple):
    """What the run of a part of the batch has left.

    Attributes:
        linear: J; None where its memory was freed for the next part.
        outputs: of the model.
        jz: J z, in float32 at least.
        loss_model: the quadratic model of the loss.
        c: the cotangent that is pulled back, g + θ H Jz.
        products_with: gives the products, of Ju.
        map_: the method and the functions that the model consists of.
        is_scaled: whether r is multiplied by the loss scale.
        compute_dtype: the half precision that the model computes in, or None.
    """

    linear: WideLinearMap | None
    outputs: Tensor
    jz: Tensor
    loss_model: LossModel
    c: Tensor
    products_with: Callable[[Tensor], Tensor]
    map_: tuple[str, frozenset[str]]
    is_scaled: bool
    compute_dtype: torch.dtype | None


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
        compute_dtype = _half_precision({compute_dtype, outputs.dtype, *replays.dtypes}, context.params)
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
    return terms._replace(loss=loss, outputs=all_outputs, overflow=overflow, mean=mean)


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
    runs = _first_runs(method, context, parts, replays, full_gradient, mean)
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
    ju = _images(context, method, parts, replays, runs, u, dots)
    own_products = [run.products_with(t) for run, t in zip(runs, ju, strict=True)]
    loss, products, size, missing = _of_whole(mean, runs, own_products)
    if _is_told_missing(context, runs, missing):
        announce(_NO_CURVATURE, _NO_CURVATURE)
    overflow = linear.overflow(loss, products, dots)
    is_debugged = settings.debug and mean.is_plain and full_gradient is None
    if is_debugged and (overflow is None or not any(map(bool, overflow))):
        own_r, own_u = linear.unscaled(r), linear.unscaled(u) if direction is None else u
        own_curvature = not (run.loss_model.is_nll or (missing is not None and bool(missing)))
        _check_by_differences(
            context, method, parts[0], replays[0], run, own_r, own_u, ju[0], products, direction, own_curvature
        )
    comparison = None
    first = context.processes is None and any(_is_new(context, run) for run in runs)
    if (first or context.compares) and adjoint:
        directly = context.dots(linear, r) if dots is None else dots
        dtypes = {*(run.outputs.dtype for run in runs), *replays.dtypes, *(p.dtype for p in context.params)}
        comparison = _compared(context, mean, runs, ju, directly, linear.difference_of_runs(), dtypes)
        if first:
            error = _judge(context, method, comparison, parts, replays)
            # An overflow of float16 says nothing, and may last for some steps: later comparisons are on the device.
            if math.isfinite(error) or overflow is not None:
                context.known_maps.update({run.map_: error for run in runs if _is_new(context, run)})
        products = comparison.masked(products)
    elif first:
        _rehearse(context, method, parts, replays)
    if full_gradient is not None:
        assert dots is not None
        products = _consistent(products, dots, settings.theta)
    # A first step by a method may be any, in a training that was resumed too: it leaves no trace in the state.
    noted = comparison if context.compares else None
    return QuadraticTerms(
        loss, [run.outputs for run in runs], u, products, dots, overflow, method.name, run.compute_dtype, noted, size,
        direction, mean,
    )  # fmt: skip


def _first_runs(
    method: Method,
    context: StepContext,
    parts: Sequence[Part],
    replays: Replays,
    full_gradient: FullGradient | None,
    mean: BatchMean,
) -> list[_Run]:
    """Run all parts, and pull their cotangents back into `mean`: r = Jᵀc. Of the runs the last one keeps its map."""
    runs: list[_Run] = []
    for i, part in enumerate(parts):
        if context.settings.debug and not mean.is_plain:
            _rehearse(context, method, [part], replays)  # each part has products of its own to be checked
        before = runs[0] if runs else full_gradient
        run = _run(context, method, part, replays[i], before)
        if context.processes is not None and _is_new(context, run):
            del run
            replays[i].rewind()
            _rehearse(context, method, [part], replays)  # others need not judge, and do not wait for what is refused
            run = _run(context, method, part, replays[i], before)
        along_z = run.loss_model.along_z
        mean.weigh(part, curved(run.outputs) if along_z is None and not mean.is_plain else along_z)
        # Where the loss of the whole has no curvature, c = g becomes a multiple of it; where there are parts, r does.
        stretches = context.settings.theta != 0 and full_gradient is None
        if stretches and mean.is_plain and along_z is not None:
            run = run._replace(c=run.c * stretch(along_z).to(run.c.dtype))
        run = run._replace(c=mean.weighed(run.c))
        if full_gradient is None or context.settings.theta != 0:
            factor = partial(_stretch, mean) if stretches and not mean.is_plain else None
            mean.pull_back(partial(_pull_back, context, method, run, full_gradient, mean), factor)  # r = Jᵀc
        runs.append(run if i == len(parts) - 1 else run._replace(linear=None))
        del run  # before the next part runs
    if len(parts) > 1:
        replays.close()
    return runs


def _stretch(mean: BatchMean) -> Tensor:
    """Return what r = Jᵀg of the whole batch is multiplied by; 1 where its loss has a curvature."""
    return stretch(cast(Tensor, mean.beside()))


def _is_told_missing(context: StepContext, runs: Sequence[_Run], missing: Tensor | None) -> bool:
    """Return whether the loss has no curvature, as far as known: the host may not always look."""
    if all(run.loss_model.is_linear for run in runs):
        return True
    unknown = any(run.loss_model.along_z is not None for run in runs)
    return unknown and context.is_first and bool(missing)


def _is_new(context: StepContext, run: _Run) -> bool:
    """Return whether the guard, which looks, has not seen the functions that the model consists of."""
    return context.guarded and run.map_ not in context.known_maps


def _images(
    context: StepContext,
    method: Method,
    parts: Sequence[Part],
    replays: Replays,
    runs: Sequence[_Run],
    u: list[Tensor],
    dots: Tensor | None,
) -> list[Tensor]:
    """Return J u for each part. The last one has its map still; the others run once more, and are before their run."""

    def image(linear: WideLinearMap) -> Tensor:
        with refusals_of(method):
            return linear.jvp_along(u, dots) if context.preconditioner is None else linear.jvp(u)

    def image_of_another_run(i: int) -> Tensor:
        scratch = replays.scratch()
        try:
            with refusals_of(method):
                map_ = method.build(parts[i].model_fn, context.params, scratch, context.settings.tangent_backend)
            return image(context.wide(map_, runs[i].outputs, runs[i].is_scaled))
        finally:
            scratch.rewind()

    last = cast(WideLinearMap, runs[-1].linear)
    found = [image(last)]
    if len(parts) > 1:
        last.release()  # before another part runs
    for i in reversed(range(len(parts) - 1)):
        replays[i + 1].rewind()
        replays[i].rewind()
        found.insert(0, image_of_another_run(i))
    return found


def _of_whole(
    mean: BatchMean, runs: Sequence[_Run], products: Sequence[Tensor]
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
            products_i = torch.cat((products_i, products_i.new_ones(1)))  # it has a curvature along u
        own = in_share(torch.cat((torch.stack((loss, loss.abs() if size is None else size)), products_i)), share)
        numbers.append(torch.cat((own, torch.full_like(own[:1], float(size is not None)))))
    total = mean.sum(numbers)
    whole, missing = substituted(total[2:8], cast(Tensor, along_z))
    # What is without a bound in one process may have one in another.
    return total[0], whole, torch.where(total[8] > 0, total[1], torch.inf), missing


def _check_by_differences(
    context: StepContext,
    method: Method,
    part: Part,
    replay: Replay,
    run: _Run,
    r: list[Tensor],
    u: list[Tensor],
    ju: Tensor,
    products: Tensor,
    direction: Direction | None,
    own_curvature: bool,
) -> None:
    """Do what debug mode does: check what was measured against finite differences, and P."""
    from curveball_fused import debug  # which no other step needs

    settings = context.settings
    step = debug.Step(
        method.name, part.model_fn, part.loss_fn, settings.sign, context.params, replay, context.z, run.outputs, run.jz,
        settings.theta, run.c, r, u, ju, products, own_curvature,
    )  # fmt: skip
    debug.check(step)
    if context.preconditioner is not None and direction is not None:
        debug.check_metric(context.preconditioner.blocks(), direction, context.z)


def _compared(
    context: StepContext,
    mean: BatchMean,
    runs: Sequence[_Run],
    ju: Sequence[Tensor],
    dots: Tensor,
    difference: Tensor | None,
    dtypes: Collection[torch.dtype],
) -> guard.Comparison:
    """Compare the dot products with those that follow by adjointness, for the c of the whole batch.

    Each part has its share in that c. Several processes sum up, too, the difference of runs and whether one of them has
    hooks, which would hide the identities, as all must come to the same judgement.

    Args:
        context: where the step begins.
        mean: of the parts.
        runs: of the parts.
        ju: Ju of the parts.
        dots: `[z·z, z·r, r·u]`, taken directly.
        difference: of the outputs of several runs; None where the model ran once.
        dtypes: that the model computes in.

    Returns:
        The comparison, on the device.
    """
    numbers = []
    stretched = context.settings.theta != 0 and not mean.is_plain  # else the c of the run is that of the whole
    factor = _stretch(mean) if stretched else 1.0
    for run, ju_i, share in zip(runs, ju, mean.shares, strict=True):
        of_z, of_u = (ops.dots([t], [run.c], backend=context.settings.backend) for t in (run.jz, ju_i))
        powers = torch.stack([of_z.new_ones(()) * (share * factor) ** k for k in range(3)])
        numbers.append(torch.cat((powers * of_z, powers * of_u)))
    own = torch.stack(numbers).sum(dim=0)
    if context.processes is None:
        of_z, of_u = own.split(3)
        return guard.compare(dots, of_z, of_u, difference, dtypes)
    beside = torch.full_like(own[:2], float(context.hooked))
    beside[0].zero_() if difference is None else beside[0].copy_(difference)
    of_z, of_u, beside = mean.sum([torch.cat((own, beside))]).split((3, 3, 2))
    comparison = guard.compare(dots, of_z, of_u, beside[0], dtypes)
    return comparison._replace(errors=comparison.errors.masked_fill(beside[1] > 0, 0.0))


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
    parts: Sequence[Part],
    replays: Replays,
) -> float:
    """Read a comparison on the host, in the first step by a method or by other functions.

    Args:
        context: where the step begins.
        method: that has measured.
        comparison: of what it has measured.
        parts: of the batch.
        replays: make another run of the model the same function.

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

            suspects = (debug.suspects(method.name, part.model_fn, replays[i]) for i, part in enumerate(parts))
            complaint = f"{complaint}. {' '.join(dict.fromkeys(suspects))}"
        raise MethodUnsupported(refusal(method, complaint))
    return float(comparison.worst())


def _rehearse(context: StepContext, method: Method, parts: Sequence[Part], replays: Replays) -> None:
    """Let the guard see a step as it is without hooks, another batch's gradient and other processes.

    The first two hide its identities. Nothing stays of it, but that the guard knows the map.
    """
    scratch_replays = replays.scratches()
    try:
        with gradient_hooks_set_aside(context.params):
            _measure_by(method, replace(context, processes=None), parts, scratch_replays, None)
    finally:
        scratch_replays.rewind()


def _run(context: StepContext, method: Method, part: Part, replay: Replay, before: _Run | FullGradient | None) -> _Run:
    """Run the model of a part: the map, outputs, Jz and the loss. `before` is another part, or the full gradient."""
    scaled = None
    if context.compute_dtype is torch.float16:
        scaled = scale_tangents(context.z, context.z_dot_z, context.tangent_size)
    with refusals_of(method):
        map_ = method.build(part.model_fn, context.params, replay, context.settings.tangent_backend)
        outputs, jz = map_.jvp(context.z if scaled is None else scaled.tangents)
    jz = at_least_float32(jz) if scaled is None else scaled.unscale(jz)
    known = {outputs.dtype, *replay.dtypes}
    if before is not None and before.compute_dtype is not None:
        known.add(before.compute_dtype)
    compute_dtype = _half_precision(known, context.params)
    # Of several parts the first may be in another precision than the rest.
    first_is_scaled = torch.float16 in (compute_dtype, context.compute_dtype)
    is_scaled = before.is_scaled if isinstance(before, _Run) else first_is_scaled
    linear = context.wide(map_, outputs, is_scaled)
    name = (method.name, linear.operators)
    if context.compares or (context.guarded and name not in context.known_maps):
        linear.compare_runs()
    loss_model = context.loss_model(part.loss_fn, outputs, linear, replay)
    c, products_with = loss_model.cotangent(jz)  # c = g + H Jz
    if context.settings.theta == 0:
        c = loss_model.gradient()
    return _Run(linear, outputs, jz, loss_model, c, products_with, name, is_scaled, compute_dtype)


def _pull_back(
    context: StepContext, method: Method, run: _Run, full_gradient: FullGradient | None, mean: BatchMean
) -> list[Tensor]:
    """Return r = Jᵀ(g + θ H Jz) of a part, or θ Jᵀ H Jz where there is a full gradient."""
    c = run.c
    if full_gradient is not None:
        g, along_z = run.loss_model.gradient(), mean.beside()
        c = c - g if along_z is None else c - g + (stretch(along_z) - 1).to(g.dtype) * g
        c = mean.weighed(c)
    with refusals_of(method), own_gradients(context.params) if _is_new(context, run) else nullcontext():
        return cast(WideLinearMap, run.linear).vjp(c)


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


def _half_precision(used: Collection[torch.dtype | None], params: Sequence[Tensor]) -> torch.dtype | None:
    """Return float16 if anything is in it, else bfloat16 likewise, else None."""
    used = {*used, *(p.dtype for p in params)}
    return next((dtype for dtype in (torch.float16, torch.bfloat16) if dtype in used), None)
