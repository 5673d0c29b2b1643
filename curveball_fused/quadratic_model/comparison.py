"""What is measured against itself: adjoint identities, and in debug mode finite differences."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from curveball_fused import guard, ops
from curveball_fused.batch import BatchMean, Part
from curveball_fused.curvature import Method, MethodUnsupported, refusal
from curveball_fused.preconditioners import Direction
from curveball_fused.replay import Replay, Replays

from .context import StepContext
from .runs import Run, stretch_of


def check_by_differences(
    context: StepContext,
    method: Method,
    part: Part,
    replay: Replay,
    run: Run,
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


def compared(
    context: StepContext,
    mean: BatchMean,
    runs: Sequence[Run],
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
    factor = stretch_of(mean) if stretched else 1.0
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


def judge(
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
