"""One step, in the order of the algorithm (Henriques et al. 2019): measure, solve, update, adapt λ.

`CurveBall.step` and its CUDA graphs run it. Numbers in parentheses are those of the equations in docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from curveball_fused import checks, guard, loss_scale, ops, state
from curveball_fused._torch_private import disable_dynamo
from curveball_fused.backends.dtypes import at_least_float32
from curveball_fused.backends.scalars import (
    AVERAGE_BETA,
    AVERAGE_RHO,
    BETA,
    LINEAR_TERM,
    PREDICTED_CHANGE,
    QUADRATIC_TERM,
    RHO,
    SAFE_STEPS,
    Z_DOT_Z,
)
from curveball_fused.batch import Part
from curveball_fused.between_solves import gradient
from curveball_fused.curvature import METHODS
from curveball_fused.curvature.torch_modes import force_eager
from curveball_fused.data_parallel import are_there_processes, processes_of
from curveball_fused.losses import checked_loss
from curveball_fused.preconditioners import EARLY_REFRESHES, Direction, Preconditioner, gathers, refresh
from curveball_fused.quadratic_model import QuadraticTerms, StepContext, measure, measure_with_curvature_batch
from curveball_fused.replay import Replays
from curveball_fused.settings import Settings

MAY_RECOMPUTE = ("forward", "double_backward")  # the methods that follow a model with gradient checkpoints
# Of the first steps these solve in any case: β belongs to a metric, which becomes another one there.
EARLY_SOLVES = EARLY_REFRESHES


class StepInputs(NamedTuple):
    """The arguments of `CurveBall.step`.

    Attributes:
        parts: of the batch.
        curvature_parts: those from which the curvature is taken; None: the same.
        scaler: of float16.
    """

    parts: Sequence[Part]
    curvature_parts: Sequence[Part] | None = None
    scaler: torch.amp.GradScaler | None = None


class StepKind(NamedTuple):
    """What the host decides by counting steps.

    Attributes:
        solve: whether the step solves for β and ρ.
        adapt_damping: whether it adapts λ.
        compare: whether the guard compares its products with dot products taken directly.
        gather: whether the factors of P see the gradient.
    """

    solve: bool
    adapt_damping: bool
    compare: bool
    gather: bool


def kind_of(settings: Settings, step: int) -> StepKind:
    """Return the kind of the step of this number, counted from zero."""
    solve, adaptation, comparison = intervals(settings)
    return StepKind(
        solve=step in EARLY_SOLVES or step % solve == 0,
        adapt_damping=settings.auto_lambda and step % adaptation == 0,
        compare=step % comparison == 0,
        gather=settings.preconditioner is not None and gathers(step),
    )


def intervals(settings: Settings) -> tuple[int, int, int]:
    """Return after how many steps a step solves, adapts λ and compares; each is a multiple of the one before."""
    solve = settings.solve_interval
    adaptation = solve * settings.lambda_interval
    return solve, adaptation, adaptation * math.ceil(guard.INTERVAL / adaptation)


# torch.compile(optimizer.step) runs the step as it is: its kernels are compiled already.
@disable_dynamo
def take_step(optimizer: Any, inputs: StepInputs, settings: Settings) -> tuple[Tensor, list[Tensor]]:
    """Take a step, count it and note it in the history; return loss and outputs of the parts."""
    shared = prepared(optimizer, settings)
    before, processes = shared["scalars"], optimizer._processes
    if processes is not None:
        processes.sent_bytes = 0
    try:
        with nullcontext() if processes is None else processes.wrappers_set_aside():
            return run_step(optimizer, inputs, shared, settings, is_first=shared["step"] == 0)
    finally:
        if shared["scalars"] is not before:  # a step whose model fails at the new weights is complete, too
            finish(optimizer, shared, settings)


def finish(optimizer: Optimizer, shared: dict[str, Any], settings: Settings) -> None:
    """Count a step and note it in the history, and bring the bases of P up to date whose turn it is."""
    everything = _parameters(optimizer)
    if settings.preconditioner is not None:
        refresh([optimizer.state[p] for p in everything if p.requires_grad], shared["step"], shared["scalars"])
    state.finish_step(optimizer.state, everything, shared)


def prepared(optimizer: Any, settings: Settings) -> dict[str, Any]:
    """Return the state that belongs to all parameters, ready for a step."""
    everything = _parameters(optimizer)
    trained = [p.requires_grad for p in everything]
    if not any(trained):
        raise RuntimeError("no parameter of this optimizer requires a gradient: nothing to train.")
    checks.solve_interval(settings.solve_interval, settings.direction)
    if optimizer._shared is not None and optimizer._shared["step"] > 0:
        checks.unchanged_metric([optimizer.state.get(p, {}) for p in everything], settings.preconditioner)
    active = state.checksum(trained)
    known = active, are_there_processes()
    if optimizer._checked != known:  # in the first step, and where others are trained
        checks.separate_memory(everything)
        checks.float64_on(everything[0].device)  # where a model has been moved since it was constructed
        checks.unread_gradients(everything)
        former = optimizer._processes
        optimizer._processes = processes_of(everything, optimizer._process_group) if optimizer._may_share else None
        if former is not None and optimizer._processes is not None:
            optimizer._processes.note_modules(former.modules())
    shared = state.prepare(optimizer.state, everything, optimizer._shared, active, settings)
    optimizer._shared = shared
    if optimizer._processes is not None and (optimizer._checked != known or settings.debug):
        optimizer.check_replicas()
    optimizer._checked = known
    return shared


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def run_step(
    optimizer: Any, inputs: StepInputs, shared: dict[str, Any], settings: Settings, is_first: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Do all that a step does on the device; return loss and outputs. In a first step the host may read a value."""
    groups = [[p for p in group["params"] if p.requires_grad] for group in optimizer.param_groups]
    kind = kind_of(settings, shared["step"])
    context = _context(optimizer, groups, inputs, shared, settings, kind, is_first)
    torch.clear_autocast_cache()  # it may hold half-precision copies of weights that have moved since
    if kind.solve:
        return _run_with_solve(optimizer, context, groups, inputs, shared, kind)
    return _run_between_solves(optimizer, context, groups, inputs, shared)


def _run_with_solve(
    optimizer: Optimizer,
    context: StepContext,
    groups: Sequence[list[Tensor]],
    inputs: StepInputs,
    shared: dict[str, Any],
    kind: StepKind,
) -> tuple[Tensor, list[Tensor]]:
    settings, processes = context.settings, context.processes
    replays = Replays(context.params)
    with force_eager():
        try:
            terms = _measure(context, inputs, replays)  # (1-4)  u = P⁻¹Jᵀ(g + θ H Jz)
            scalars = _solve(terms, inputs, shared, settings)  # (5-7)  [β, -ρ] = A⁺ b
            scalars = _bounded(scalars, shared["scalars"], terms.loss_size, settings)
            replays.finish()  # before the update, which is of the weights that the model has left
            is_scaled = terms.overflow is not None and terms.direction is None
            scalars = _update(context, groups, terms.u, is_scaled, terms.direction, scalars)  # (8)
            _remember(optimizer, context, inputs, shared, scalars, terms.overflow)
            shared |= {"method": terms.method, "compute_dtype": terms.compute_dtype}
            if terms.comparison is not None:
                failed, worst = terms.comparison.failed(), terms.comparison.worst()
                shared["guard"] = state.noted_comparison(shared["guard"], failed, worst)
        except BaseException:
            replays.rewind()
            raise
        torch.clear_autocast_cache()  # for the run at the new weights, and for whatever follows in the same autocast
        if kind.adapt_damping:
            shared["scalars"] = _adapt_damping(inputs, terms, scalars, replays, settings)  # (9-10)  λ by γ
        if processes is not None:
            processes.note_modules(replays.modules())
            processes.broadcast_buffers()
    return terms.loss.to(terms.loss_dtype), terms.outputs


def _run_between_solves(
    optimizer: Optimizer,
    context: StepContext,
    groups: Sequence[list[Tensor]],
    inputs: StepInputs,
    shared: dict[str, Any],
) -> tuple[Tensor, list[Tensor]]:
    settings = context.settings
    # Only such a model can have gradient checkpoints, which run again in the backward pass: with their first buffers,
    # which advance once.
    may_recompute = shared["method"] in MAY_RECOMPUTE
    with force_eager() if may_recompute else nullcontext():
        found = gradient(context, inputs.parts, Replays(context.params) if may_recompute else None)
    loss, loss_dtype, outputs, u, is_scaled, room = found
    direction = None
    if context.preconditioner is not None:
        direction = context.preconditioner.direction(loss_scale.unscaled(u, context.loss_scale) if is_scaled else u)
        u, slope = direction.u, direction.dots[2]
    else:
        slope = ops.dots(context.z, u, backend=settings.backend)[2]
        if is_scaled:
            slope = slope / context.loss_scale**2
    scalars = ops.keep_coefficients(
        shared["scalars"],
        loss,
        slope,
        room if settings.beta is None else None,
        sign=settings.sign,
        backend=settings.backend,
    )
    scalars = _update(context, groups, u, is_scaled and direction is None, direction, scalars)
    overflow = None
    if is_scaled:
        too_large = torch.isfinite(loss) & ~torch.isfinite(slope)
        overflow = loss_scale.Overflow(too_large, torch.zeros_like(too_large))
    _remember(optimizer, context, inputs, shared, scalars, overflow)
    torch.clear_autocast_cache()
    if context.processes is not None:
        context.processes.broadcast_buffers()
    return loss.to(loss_dtype), outputs


def _context(
    optimizer: Any,
    groups: Sequence[list[Tensor]],
    inputs: StepInputs,
    shared: dict[str, Any],
    settings: Settings,
    kind: StepKind,
    is_first: bool,
) -> StepContext:
    params = [p for group in groups for p in group]
    own_scale, tangent_size = shared["scale"][0], shared["scale"][1]
    return StepContext(
        settings=settings,
        params=params,
        z=[optimizer.state[p]["z"] for p in params],
        z_dot_z=shared["scalars"][Z_DOT_Z],
        methods=settings.methods(shared["method"]),
        compute_dtype=shared["compute_dtype"],
        loss_scale=own_scale if inputs.scaler is None else loss_scale.scale_from(inputs.scaler, params[0].device),
        tangent_size=tangent_size,
        known_maps=guard.known_maps(optimizer),
        compares=kind.compare,
        is_first=is_first,
        preconditioner=_preconditioner(optimizer, params, shared, settings, kind.gather),
        processes=optimizer._processes,
    )


def _preconditioner(
    optimizer: Optimizer, params: Sequence[Tensor], shared: dict[str, Any], settings: Settings, gather: bool
) -> Preconditioner | None:
    """Return P as it is in the optimizer's state; None where P = 1."""
    if settings.preconditioner is None:
        return None
    return Preconditioner([optimizer.state[p] for p in params], shared["scalars"], settings.backend, gather)


def _measure(context: StepContext, inputs: StepInputs, replays: Replays) -> QuadraticTerms:
    if inputs.curvature_parts is None:
        return measure(context, inputs.parts, replays)
    return measure_with_curvature_batch(context, inputs.parts, inputs.curvature_parts, replays)


def _solve(terms: QuadraticTerms, inputs: StepInputs, shared: dict[str, Any], settings: Settings) -> Tensor:
    """Return the scalars with β and ρ."""
    # ρ > 1 is a matter of one step and one batch: beyond it the heavy ball gains energy.
    is_exact = settings.average == 0 and settings.solve_interval == 1 and inputs.curvature_parts is None
    return ops.solve(
        shared["scalars"],
        settings.sign * terms.loss,
        terms.products,
        terms.dots,
        beta=settings.beta,
        rho=settings.rho,
        lr=settings.lr[0],
        theta=settings.theta,
        average=settings.average,
        bounded=not is_exact,
        backend=settings.backend,
    )


def _bounded(scalars: Tensor, before: Tensor, loss_size: Tensor | None, settings: Settings) -> Tensor:
    """Return the scalars with a safe step shortened to where the gradient expects no more than the loss has to give.

    Only λ bounds such a step otherwise, as its curvature is not to be trusted, and that may be far too little for the
    scale of model and loss.
    """
    if loss_size is None or settings.beta is not None or settings.rho is not None:
        return scalars
    expected = scalars[LINEAR_TERM]
    too_long = (scalars[SAFE_STEPS] > before[SAFE_STEPS]) & (expected > loss_size) & (loss_size > 0)
    factor = torch.where(too_long, loss_size / expected, 1.0)
    bounded = scalars.clone()
    # M is proportional, as both terms are equal; ρ is not zero where it is an average.
    for index in (BETA, RHO, AVERAGE_BETA, AVERAGE_RHO, LINEAR_TERM, QUADRATIC_TERM, PREDICTED_CHANGE):
        bounded[index].mul_(factor)
    return bounded


def _update(
    context: StepContext,
    groups: Sequence[list[Tensor]],
    u: Sequence[Tensor],
    is_scaled: bool,
    direction: Direction | None,
    scalars: Tensor,
) -> Tensor:
    """Move z and w, and let P learn: z ← ρz - β(u + θλz), w ← w + lr z; return the scalars with z·z of the new z."""
    settings = context.settings
    update = partial(
        ops.update_groups_,
        context.params,
        context.z,
        u,
        group_sizes=[len(group) for group in groups],
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        backend=settings.backend,
    )
    scalars = loss_scale.update_by_scaled(update, scalars, context.loss_scale) if is_scaled else update(scalars)
    if context.preconditioner is None or direction is None:
        return scalars
    return context.preconditioner.learn(direction, scalars)


def _remember(
    optimizer: Optimizer,
    context: StepContext,
    inputs: StepInputs,
    shared: dict[str, Any],
    scalars: Tensor,
    overflow: loss_scale.Overflow | None,
) -> None:
    shared["scalars"] = scalars
    if overflow is not None:
        shared["scale"] = loss_scale.adapted(shared["scale"], overflow)
    if inputs.scaler is not None:
        none = torch.zeros_like(scalars[0], dtype=torch.bool)
        found = none if overflow is None else overflow.r
        loss_scale.report_overflow(inputs.scaler, optimizer, found)


def _adapt_damping(
    inputs: StepInputs, terms: QuadraticTerms, scalars: Tensor, replays: Replays, settings: Settings
) -> Tensor:
    """Compare the loss at the new weights, on the same batch, with the predicted one; return scalars with the new λ."""
    evaluate = METHODS[terms.method].evaluate

    def loss_of(part: Part) -> Tensor:
        return part.loss_fn(at_least_float32(evaluate(part.model_fn)))

    again = replays.again_at_new_weights([partial(loss_of, part) for part in inputs.parts])
    losses = [checked_loss(loss).detach() for loss in again]
    return ops.adapt_damping(
        scalars,
        settings.sign * terms.mean.of_losses(losses),
        low=settings.lambda_low,
        high=settings.lambda_high,
        factor=settings.lambda_factor**settings.lambda_interval,
        minimum=settings.lambda_min,
        maximum=settings.lambda_max,
        backend=settings.backend,
    )
