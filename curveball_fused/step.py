"""One step in order: measure, solve, update, and sometimes a look at λ. What `CurveBall.step` and its graphs run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # unlike torch.compiler.disable it imports the compiler on first use only
from torch.optim import Optimizer

from . import economy, loss_scale, ops, state
from .curvature import WAYS, ModelFn, run_plain
from .losses import LossFn, checked_loss
from .modes import uncompiled
from .reference import Z_DOT_Z
from .replay import Replay
from .system import Problem


class Task(NamedTuple):
    """The arguments of `CurveBall.step`."""

    model_fn: ModelFn
    loss_fn: LossFn
    curvature_batch: tuple[ModelFn, LossFn] | None = None
    scaler: torch.amp.GradScaler | None = None


class Kind(NamedTuple):
    """What the host decides by counting steps: whether a step solves completely, and whether it looks at λ."""

    complete: bool
    look: bool


def kind_of(optimizer: Optimizer, step: int) -> Kind:
    """The kind of the step of this number, counted from zero."""
    settings = optimizer.param_groups[0]
    look = settings["auto_lambda"] and step % settings["lambda_interval"] == 0
    return Kind(step % settings["solve_interval"] == 0, bool(look))


def sign_of(optimizer: Optimizer) -> float:
    """By which the loss is multiplied to be minimised."""
    return -1.0 if optimizer.param_groups[0]["maximize"] else 1.0


# torch.compile(optimizer.step) runs the step as it is: its kernels are compiled already.
@_disable_dynamo
def take_step(optimizer: Optimizer, task: Task) -> tuple[Tensor, Tensor]:
    """A step, counted and noted in the history; returns loss and outputs."""
    shared = prepared(optimizer)
    before = shared["scalars"]
    try:
        return run_step(optimizer, task, shared)
    finally:
        if shared["scalars"] is not before:  # a step whose look at λ has failed is complete, too
            state.finish_step(shared)


def prepared(optimizer: Optimizer) -> dict[str, Any]:
    """The state that belongs to all parameters, ready for a step."""
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(p.requires_grad for p in everything):
        raise RuntimeError("no parameter of this optimizer requires a gradient: nothing to train.")
    return state.prepare(optimizer.state, everything, optimizer.param_groups[0]["lambd"], optimizer.defaults["backend"])


def run_step(optimizer: Optimizer, task: Task, shared: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """All that a step does on the device; returns loss and outputs."""
    groups = [[p for p in group["params"] if p.requires_grad] for group in optimizer.param_groups]
    params = [p for group in groups for p in group]
    replay = Replay(params, params[0].device)
    torch.clear_autocast_cache()  # it may hold half-precision copies of weights that have moved since
    with uncompiled():
        try:
            loss, outputs = _advance(optimizer, task, groups, shared, replay)
        except BaseException:
            replay.rewind()
            raise
        torch.clear_autocast_cache()  # for the look, and for whatever follows in the same autocast
        try:
            if kind_of(optimizer, shared["step"]).look:
                shared["scalars"] = _adapt(optimizer, task, shared["scalars"], replay)
        finally:
            replay.finish()
    return loss, outputs


def _advance(
    optimizer: Optimizer, task: Task, groups: Sequence[list[Tensor]], shared: dict[str, Any], replay: Replay
) -> tuple[Tensor, Tensor]:
    """Products, solve, update; returns loss and outputs."""
    settings, backend, sign = optimizer.param_groups[0], optimizer.defaults["backend"], sign_of(optimizer)
    params = [p for group in groups for p in group]
    problem = Problem(
        params,
        [optimizer.state[p]["z"] for p in params],
        shared["scalars"][Z_DOT_Z],
        _ways(optimizer, shared["way"]),
        shared["half"],
        shared["scale"][0] if task.scaler is None else loss_scale.of_scaler(task.scaler, params[0].device),
        shared["scale"][1],
        sign,
        backend,
        optimizer.defaults["debug"],
    )
    lagging = None if kind_of(optimizer, shared["step"]).complete else shared["system"]
    if task.curvature_batch is None:
        measured = problem.measure(task.model_fn, task.loss_fn, replay, lagging, None)
    else:
        measured = problem.measure_with_part(task.model_fn, task.loss_fn, task.curvature_batch, replay, lagging)
    loss, outputs, r, products, dots, overflow = measured

    solve = partial(ops.solve, shared["scalars"], sign * loss, beta=settings["beta"], lr=settings["lr"])
    if settings["average"] == 0 and settings["solve_interval"] == 1 and task.curvature_batch is None:
        scalars = solve(products, dots, rho=settings["rho"], backend=backend)
    else:
        shared["system"], scalars = economy.averaged_solve(
            solve, shared, loss, products, dots, settings["average"], settings["rho"], backend
        )
    update = partial(
        ops.update_groups_,
        params,
        problem.z,
        r,
        group_sizes=[len(group) for group in groups],
        lr=[group["lr"] for group in optimizer.param_groups],
        weight_decay=[group["weight_decay"] for group in optimizer.param_groups],
        backend=backend,
    )
    if overflow is not None:
        shared["scalars"] = loss_scale.update_by_scaled(update, scalars, problem.loss_scale)
        shared["scale"] = loss_scale.adapted(shared["scale"], overflow)
    else:
        shared["scalars"] = update(scalars)
    if task.scaler is not None:
        found = torch.zeros_like(scalars[0], dtype=torch.bool) if overflow is None else overflow.r
        loss_scale.tell(task.scaler, optimizer, found)
    shared["way"], shared["half"] = problem.ways[0], problem.half
    return loss, outputs


def _ways(optimizer: Optimizer, last: str | None) -> list[str]:
    """The ways to linearise the model, without those that came before the one that could follow it last."""
    curvature = "compiled" if optimizer.defaults["compile"] else optimizer.defaults["curvature"]
    ways = list(WAYS) if curvature == "auto" else [curvature]
    return ways[ways.index(last) :] if last and last in ways else ways


def _adapt(optimizer: Optimizer, task: Task, scalars: Tensor, replay: Replay) -> Tensor:
    """A look at the loss at the new weights, on the same batch; returns scalars with the λ that follows from it."""
    settings = optimizer.param_groups[0]
    run = run_plain
    if optimizer.defaults["compile"]:
        from .compiled import run_compiled as run
    new_loss = replay.again(lambda: task.loss_fn(loss_scale.at_least_float32(run(task.model_fn))))
    return ops.adapt_damping(
        scalars,
        sign_of(optimizer) * checked_loss(new_loss).detach(),
        low=settings["lambda_low"],
        high=settings["lambda_high"],
        factor=settings["lambda_factor"] ** settings["lambda_interval"],
        minimum=settings["lambda_min"],
        maximum=settings["lambda_max"],
        backend=optimizer.defaults["backend"],
    )
