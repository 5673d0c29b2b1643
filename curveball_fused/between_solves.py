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
from curveball_fused.batch import BatchMean, Part, dtype_of, in_share
from curveball_fused.curvature import checked_outputs
from curveball_fused.curvature.linear_map import dense_gradients, in_own_memory, independent_outputs
from curveball_fused.losses import LossGradient, loss_gradient
from curveball_fused.quadratic_model import StepContext
from curveball_fused.replay import Replays


class Gradient(NamedTuple):
    """What one backward pass for each part of the batch gives.

    Attributes:
        loss: of the whole batch, 0-dim, detached; in float64 where it is a mean.
        loss_dtype: in which it is returned.
        outputs: of the model for each part, detached.
        r: Jᵀg of the minimized loss, of the parameters' shapes; in float16 it is multiplied by the loss scale.
        is_scaled: whether it is.
        room: how far the loss may fall in the step, 0-dim, at least zero: the loss itself where it is known to be never
            negative; of any other loss the larger of |loss| and Σ |g_i o_i| over the outputs o.
    """

    loss: Tensor
    loss_dtype: torch.dtype
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
            at_outputs = at_outputs._replace(cotangent=mean.weighed(at_outputs.cotangent))
            mean.pull_back(partial(_pull_back, context, outputs, at_outputs.cotangent, is_scaled))
        found.append((at_outputs, own))
    all_outputs = [own for _, own in found]
    loss, room = _loss_and_room(mean, found, context.settings.sign)
    loss_dtype = dtype_of([at_outputs.loss for at_outputs, _ in found])
    return Gradient(loss, loss_dtype, all_outputs, mean.gradient(), is_scaled, room)


def _loss_and_room(mean: BatchMean, found: Sequence[tuple[LossGradient, Tensor]], sign: float) -> tuple[Tensor, Tensor]:
    """Return `loss` and `room` of the whole batch."""
    # What is maximized has no upper bound that is known.
    never_negative = [sign > 0 and each.is_never_negative for each, _ in found]
    if mean.is_plain:
        loss, is_never_negative = found[0][0].loss, never_negative[0]
        return loss, loss if is_never_negative is True else _room(loss, _size(*found[0]), is_never_negative)
    numbers = []
    for (at_outputs, outputs), never, share in zip(found, never_negative, mean.shares, strict=True):
        own = in_share(torch.stack((at_outputs.loss.double(), _size(at_outputs, outputs).double())), share)
        may_be_negative = torch.zeros_like(own[:1]) + ~torch.as_tensor(never, device=own.device)
        numbers.append(torch.cat((own, may_be_negative)))
    loss, size, negative = mean.sum(numbers).unbind()
    return loss, _room(loss, size, negative == 0)


def _room(loss: Tensor, size: Tensor, is_never_negative: bool | Tensor) -> Tensor:
    larger = torch.maximum(loss.abs(), size)
    return larger if is_never_negative is False else torch.where(torch.as_tensor(is_never_negative), loss, larger)


def _size(at_outputs: LossGradient, outputs: Tensor) -> Tensor:
    """Return Σ |g_i o_i| over the outputs o."""
    cotangent = at_outputs.cotangent
    terms = torch.where(cotangent == 0, 0, cotangent * at_least_float32(outputs))  # an output of -inf has no gradient
    return terms.abs().sum()


def _pull_back(context: StepContext, outputs: Tensor, cotangent: Tensor, is_scaled: bool) -> list[Tensor]:
    if is_scaled:
        cotangent = cotangent * context.loss_scale.float()
    cotangents = (cotangent.to(outputs.dtype),)
    gradients = run_backward((outputs,), cotangents, False, False, tuple(context.params), True, accumulate_grad=False)
    return dense_gradients(context.params, gradients)
