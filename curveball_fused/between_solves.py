"""A step between two solves: an ordinary backward pass, and the β and ρ of the solves before it.

It needs no curvature, as its direction has none in it (θ = 0): u = P⁻¹Jᵀg and z ← ρz - βu, at the cost of a step of
momentum SGD. What bounds it is what bounded the solve, λ and the range of ρ, and the loss itself: a β of other batches
is shortened where it promises more than this one has to give, as Polyak's rate (1987) does. Without that a net with
nearly no loss left, whose curvature has gone with it, is thrown far away by the first batch that it has not learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from curveball_fused._torch_private import run_backward
from curveball_fused.backends.dtypes import at_least_float32
from curveball_fused.batch import BatchMean, Part
from curveball_fused.curvature import checked_outputs
from curveball_fused.curvature.linear_map import dense_gradients, in_own_memory, independent_outputs
from curveball_fused.losses import LossGradient, loss_gradient
from curveball_fused.quadratic_model import StepContext
from curveball_fused.replay import Replays


class Gradient(NamedTuple):
    """What one backward pass for each part of the batch gives.

    Attributes:
        loss: of the whole batch, 0-dim, detached.
        outputs: of the model for each part, detached.
        r: Jᵀg of the minimized loss, of the parameters' shapes; in float16 it is multiplied by the loss scale.
        is_scaled: whether it is.
        room: how far the loss may fall in the step, 0-dim, at least zero: the loss itself where it is known to be never
            negative; of any other loss the larger of |loss| and Σ |g_i o_i| over the outputs o.
    """

    loss: Tensor
    outputs: list[Tensor]
    r: list[Tensor]
    is_scaled: bool
    room: Tensor


def gradient(context: StepContext, parts: Sequence[Part], replays: Replays | None) -> Gradient:
    """Run the model and its backward pass once for each part.

    Args:
        context: where the step begins.
        parts: of the batch.
        replays: by which the model runs, where a backward pass may run some of it again.

    Returns:
        Loss, outputs and gradient.

    Raises:
        independent_outputs: the outputs depend on no parameter.
    """
    mean = BatchMean(context.params, len(parts), context.processes)
    # The model may compute in float16 only since the last solve.
    is_scaled = torch.float16 in {context.compute_dtype, *(p.dtype for p in context.params)}
    found = []
    for i, (model_fn, loss_fn, _) in enumerate(parts):
        with torch.enable_grad():
            outputs = checked_outputs(model_fn() if replays is None else replays[i].first(model_fn))
            if not outputs.requires_grad:
                raise independent_outputs()
            mean.weigh(parts[i])
            is_scaled |= i == 0 and outputs.dtype == torch.float16
            own = in_own_memory(outputs.detach(), context.params)
            leaf = at_least_float32(own).detach().requires_grad_()  # by which the loss sees what it sees in a solve
            at_outputs = loss_gradient(loss_fn, leaf, context.settings.sign, context.params)
            room = _room(at_outputs, leaf.detach(), context.settings.sign)
            mean.pull_back(partial(_pull_back, context, outputs, at_outputs.cotangent, is_scaled))
        found.append((at_outputs.loss, own, room))
    losses, all_outputs, rooms = zip(*found, strict=True)
    if mean.is_plain:
        return Gradient(losses[0], [own], mean.gradient(), is_scaled, rooms[0])
    pairs = [torch.stack((loss, room)).double() * w for loss, room, w in zip(losses, rooms, mean.shares, strict=True)]
    loss, room = mean.sum(pairs).unbind()
    return Gradient(loss, list(all_outputs), mean.gradient(), is_scaled, room)


def _pull_back(context: StepContext, outputs: Tensor, cotangent: Tensor, is_scaled: bool) -> list[Tensor]:
    if is_scaled:
        cotangent = cotangent * context.loss_scale.float()
    cotangents = (cotangent.to(outputs.dtype),)
    gradients = run_backward((outputs,), cotangents, False, False, tuple(context.params), True, accumulate_grad=False)
    return dense_gradients(context.params, gradients)


def _room(at_outputs: LossGradient, outputs: Tensor, sign: float) -> Tensor:
    loss, cotangent, is_never_negative = at_outputs
    if sign < 0:
        is_never_negative = False  # what is maximized has no upper bound that is known
    if is_never_negative is True:
        return loss
    terms = torch.where(cotangent == 0, 0, cotangent * outputs)  # an output of -inf has no gradient
    size = torch.maximum(loss.abs(), terms.abs().sum())
    return size if is_never_negative is False else torch.where(is_never_negative, loss, size)
