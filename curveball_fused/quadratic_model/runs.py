"""The runs of the parts of a batch: outputs, Jz, c, and with that r = Jᵀc of the whole; then Ju."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from curveball_fused.backends.dtypes import at_least_float32
from curveball_fused.batch import BatchMean, Part
from curveball_fused.curvature import Method, refusals_of
from curveball_fused.curvature.linear_map import own_gradients
from curveball_fused.loss_scale import WideLinearMap, scale_tangents
from curveball_fused.losses import LossModel, stretch
from curveball_fused.replay import Replay, Replays

from .context import FullGradient, StepContext


class Run(NamedTuple):
    """What the run of a part of the batch has left.

    Attributes:
        linear: J; None where its memory was freed for the next part.
        outputs: of the model.
        jz: J z, in float32 at least.
        loss_model: the quadratic model of the loss.
        c: g + θ H Jz. Of a loss without curvature it is g where the batch has several parts, as only r of the whole is
            stretched then.
        along_z: what tells whether there is a curvature; None of a closed form that is the whole loss.
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
    along_z: Tensor | None
    products_with: Callable[[Tensor], Tensor]
    map_: tuple[str, frozenset[str]]
    is_scaled: bool
    compute_dtype: torch.dtype | None


def first_runs(
    method: Method,
    context: StepContext,
    parts: Sequence[Part],
    replays: Replays,
    full_gradient: FullGradient | None,
    mean: BatchMean,
    rehearse: Callable[[Sequence[Part], Replays], None],
) -> list[Run]:
    """Run all parts, and pull their cotangents back into `mean`: r = Jᵀc. Of the runs the last one keeps its map.

    Args:
        method: that linearizes the model.
        context: where the step begins.
        parts: of the batch.
        replays: make later runs of the model the same function.
        full_gradient: Jᵀg of another batch, which this one's is left out for.
        mean: over the parts; it takes in what is pulled back.
        rehearse: lets the guard, or debug mode, see the step of a part by itself.

    Returns:
        What the run of each part has left.
    """
    runs: list[Run] = []
    for i, part in enumerate(parts):
        if context.settings.debug and not mean.is_plain:
            rehearse([part], replays)  # each part has products of its own to be checked
        before = runs[0] if runs else full_gradient
        run = _run(context, method, part, replays[i], before, mean.is_plain)
        if context.processes is not None and is_new(context, run):
            del run
            replays[i].rewind()
            rehearse([part], replays)  # others need not judge, and do not wait for what is refused
            run = _run(context, method, part, replays[i], before, mean.is_plain)
        mean.weigh(part, run.along_z)
        # Where the loss of the whole has no curvature, c = g becomes a multiple of it; where there are parts, r does.
        stretches = context.settings.theta != 0 and full_gradient is None
        if stretches and mean.is_plain and run.along_z is not None:
            run = run._replace(c=run.c * stretch(run.along_z).to(run.c.dtype))
        run = run._replace(c=mean.weighed(run.c))
        if full_gradient is None or context.settings.theta != 0:
            factor = partial(stretch_of, mean) if stretches and not mean.is_plain else None
            mean.pull_back(partial(_pull_back, context, method, run, full_gradient, mean), factor)  # r = Jᵀc
        runs.append(run if i == len(parts) - 1 else run._replace(linear=None))
        del run  # before the next part runs
    if len(parts) > 1:
        replays.close()
    return runs


def stretch_of(mean: BatchMean) -> Tensor:
    """Return what r = Jᵀg of the whole batch is multiplied by; 1 where its loss has a curvature."""
    return stretch(cast(Tensor, mean.beside()))


def is_new(context: StepContext, run: Run) -> bool:
    """Return whether the guard, which looks, has not seen the functions that the model consists of."""
    return context.guarded and run.map_ not in context.known_maps


def images(
    context: StepContext,
    method: Method,
    parts: Sequence[Part],
    replays: Replays,
    runs: Sequence[Run],
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


def _run(
    context: StepContext,
    method: Method,
    part: Part,
    replay: Replay,
    before: Run | FullGradient | None,
    is_whole: bool,
) -> Run:
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
    compute_dtype = half_precision(known, context.params)
    # Of several parts the first may be in another precision than the rest.
    first_is_scaled = torch.float16 in (compute_dtype, context.compute_dtype)
    is_scaled = before.is_scaled if isinstance(before, Run) else first_is_scaled
    linear = context.wide(map_, outputs, is_scaled)
    name = (method.name, linear.operators)
    if context.compares or (context.guarded and name not in context.known_maps):
        linear.compare_runs()
    loss_model = context.loss_model(part.loss_fn, outputs, linear, replay)
    c, products_with = loss_model.cotangent(jz)  # c = g + H Jz
    along_z = None if is_whole and loss_model.has_closed_form else loss_model.along_z(jz, products_with)
    if context.settings.theta == 0:
        c = loss_model.gradient()
    return Run(linear, outputs, jz, loss_model, c, along_z, products_with, name, is_scaled, compute_dtype)


def _pull_back(
    context: StepContext, method: Method, run: Run, full_gradient: FullGradient | None, mean: BatchMean
) -> list[Tensor]:
    """Return r = Jᵀ(g + θ H Jz) of a part, or θ Jᵀ H Jz where there is a full gradient."""
    c = run.c
    if full_gradient is not None:
        g, along_z = run.loss_model.gradient(), mean.beside()
        c = c - g if along_z is None else c - g + (stretch(along_z) - 1).to(g.dtype) * g
        c = mean.weighed(c)
    with refusals_of(method), own_gradients(context.params) if is_new(context, run) else nullcontext():
        return cast(WideLinearMap, run.linear).vjp(c)


def half_precision(used: Collection[torch.dtype | None], params: Sequence[Tensor]) -> torch.dtype | None:
    """Return float16 if anything is in it, else bfloat16 likewise, else None."""
    used = {*used, *(p.dtype for p in params)}
    return next((dtype for dtype in (torch.float16, torch.bfloat16) if dtype in used), None)
