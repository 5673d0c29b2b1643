"""One step, in the order of the algorithm (Henriques et al. 2019): measure, solve, update, adapt λ.

`CurveBall.step` and its CUDA graphs run it. Numbers in parentheses are those of the equations in docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
from curveball_fused.between_solves import gradient
from curveball_fused.curvature import METHODS, ModelFn
from curveball_fused.curvature.torch_modes import force_eager
from curveball_fused.losses import LossFn, checked_loss
from curveball_fused.outputs import StructuredOutputs
from curveball_fused.preconditioners import EARLY_REFRESHES, Direction, Preconditioner, gathers, refresh
from curveball_fused.quadratic_model import QuadraticTerms, StepContext, measure, measure_with_curvature_batch
from curveball_fused.replay import Replay
from curveball_fused.settings import Settings

MAY_RECOMPUTE = ("forward", "double_backward")  # the methods that follow a model with gradient checkpoints
# Of the first steps these solve in any case: β belongs to a metric, which becomes another one there.
EARLY_SOLVES = EARLY_REFRESHES


Closure = Callable[[], tuple[Any, Callable[[Any], Tensor]]]  # returns outputs, of any structure, and their loss


class StepInputs(NamedTuple):
    """The arguments of `CurveBall.step`."""

    model_fn: ModelFn
    loss_fn: LossFn
    curvature_batch: tuple[ModelFn, LossFn] | None = None
    scaler: torch.amp.GradScaler | None = None


def functions_of(closure: Closure) -> tuple[Callable[[], Any], Callable[[Any], Tensor]]:
    """Return the `model_fn` and `loss_fn` that a closure stands for; the loss is that of its last run.

    Args:
        closure: called without arguments, as often as `model_fn` would be, returns outputs and `loss_fn`.
    """
    last: list[Callable[[Any], Tensor]] = []

    def model_fn() -> Any:
        returned: Any = closure()
        if not isinstance(returned, tuple) or len(returned) != 2 or not callable(returned[1]):
            checks.raise_wrong_step_call()
        outputs, loss_fn = returned
        last[:] = [loss_fn]
        return outputs

    return model_fn, lambda outputs: last[0](outputs)


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
def take_step(optimizer: Optimizer, inputs: StepInputs, settings: Settings) -> tuple[Tensor, Any]:
    """Take a step, count it and note it in the history; return loss and outputs, of whatever structure these are."""
    shared = prepared(optimizer, settings)
    before = shared["scalars"]
    whole, part = StructuredOutputs(inputs.model_fn, inputs.loss_fn), None
    if inputs.curvature_batch is not None:
        of_part = StructuredOutputs(*inputs.curvature_batch)
        part = of_part.model_fn, of_part.loss_fn
    inputs = StepInputs(whole.model_fn, whole.loss_fn, part, inputs.scaler)
    try:
        loss, outputs = run_step(optimizer, inputs, shared, settings, is_first=shared["step"] == 0)
        return loss, whole.of(outputs)
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
    if optimizer._checked != active:  # in the first step, and where others are trained
        checks.separate_memory(everything)
        checks.replicas(everything)
        checks.unread_gradients(everything)
        optimizer._checked = active
    shared = state.prepare(optimizer.state, everything, optimizer._shared, active, settings)
    optimizer._shared = shared
    return shared


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def run_step(
    optimizer: Optimizer, inputs: StepInputs, shared: dict[str, Any], settings: Settings, is_first: bool = False
) -> tuple[Tensor, Tensor]:
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
) -> tuple[Tensor, Tensor]:
    settings = context.settings
    replay = Replay(context.params, context.params[0].device)
    with force_eager():
        try:
            terms = _measure(context, inputs, replay)  # (1-4)  u = P⁻¹Jᵀ(g + θ H Jz)
            scalars = _solve(terms, inputs, shared, settings)  # (5-7)  [β, -ρ] = A⁺ b
            scalars = _bounded(scalars, shared["scalars"], terms.loss_size, settings)
            replay.finish()  # before the update, which is of the weights that the model has left
            is_scaled = terms.overflow is not None and terms.direction is None
            scalars = _update(context, groups, terms.u, is_scaled, terms.direction, scalars)  # (8)
            _remember(optimizer, context, inputs, shared, scalars, terms.overflow)
            shared |= {"method": terms.method, "compute_dtype": terms.compute_dtype}
            if terms.comparison is not None:
                failed, worst = terms.comparison.failed(), terms.comparison.worst()
                shared["guard"] = state.noted_comparison(shared["guard"], failed, worst)
        except BaseException:
            replay.rewind()
            raise
        torch.clear_autocast_cache()  # for the run at the new weights, and for whatever follows in the same autocast
        if kind.adapt_damping:
            shared["scalars"] = _adapt_damping(inputs, terms.method, scalars, replay, settings)  # (9-10)  λ by γ
    return terms.loss, terms.outputs


def _run_between_solves(
    optimizer: Optimizer,
    context: StepContext,
    groups: Sequence[list[Tensor]],
    inputs: StepInputs,
    shared: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    settings = context.settings
    model_fn: ModelFn = inputs.model_fn
    if shared["method"] in MAY_RECOMPUTE:
        # Only such a model can have gradient checkpoints, which run again in the backward pass: with their first
        # buffers, which advance once.
        replay = Replay(context.params, context.params[0].device)
        model_fn = partial(replay.first, model_fn)
    with force_eager() if shared["method"] in MAY_RECOMPUTE else nullcontext():
        loss, outputs, u, is_scaled, room = gradient(context, model_fn, inputs.loss_fn)
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
    return loss, outputs


def _context(
    optimizer: Optimizer,
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
    )


def _preconditioner(
    optimizer: Optimizer, params: Sequence[Tensor], shared: dict[str, Any], settings: Settings, gather: bool
) -> Preconditioner | None:
    """Return P as it is in the optimizer's state; None where P = 1."""
    if settings.preconditioner is None:
        return None
    return Preconditioner([optimizer.state[p] for p in params], shared["scalars"], settings.backend, gather)


def _measure(context: StepContext, inputs: StepInputs, replay: Replay) -> QuadraticTerms:
    model_fn, loss_fn, curvature_batch = inputs.model_fn, inputs.loss_fn, inputs.curvature_batch
    if curvature_batch is None:
        return measure(context, model_fn, loss_fn, replay)
    return measure_with_curvature_batch(context, model_fn, loss_fn, curvature_batch, replay)


def _solve(terms: QuadraticTerms, inputs: StepInputs, shared: dict[str, Any], settings: Settings) -> Tensor:
    """Return the scalars with β and ρ."""
    # ρ > 1 is a matter of one step and one batch: beyond it the heavy ball gains energy.
    is_exact = settings.average == 0 and settings.solve_interval == 1 and inputs.curvature_batch is None
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


def _adapt_damping(inputs: StepInputs, method: str, scalars: Tensor, replay: Replay, settings: Settings) -> Tensor:
    """Compare the loss at the new weights, on the same batch, with the predicted one; return scalars with the new λ."""
    evaluate = METHODS[method].evaluate
    new_loss = replay.again_at_new_weights(lambda: inputs.loss_fn(at_least_float32(evaluate(inputs.model_fn))))
    return ops.adapt_damping(
        scalars,
        settings.sign * checked_loss(new_loss).detach(),
        low=settings.lambda_low,
        high=settings.lambda_high,
        factor=settings.lambda_factor**settings.lambda_interval,
        minimum=settings.lambda_min,
        maximum=settings.lambda_max,
        backend=settings.backend,
    )
