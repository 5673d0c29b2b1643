"""Jz from a difference of outputs, in steps between full solves, which need no second product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from typing_extensions import override

from curveball_fused.backends.dtypes import at_least_float32
from curveball_fused.replay import Replay

from .linear_map import (
    ModelFn,
    Pullback,
    checked_outputs,
    dense_gradients,
    evaluate,
    gradients,
    in_own_memory,
    independent_outputs,
)
from .torch_modes import Decompose

DIFFERENCE = 0.1  # of z, for its tangent: enough to stand out of rounding, also of reduced-precision multiplication


class Backward(Pullback):
    """Jᵀu alone: one run of the model and an ordinary backward pass.

    Attributes:
        outputs: the model's predictions, detached.
    """

    def __init__(self, model_fn: ModelFn, params: Sequence[Tensor], replay: Replay) -> None:
        self._params = params
        with torch.enable_grad(), Decompose(every_call=False):  # as `evaluate`, whose masks must be the same
            self._outputs = checked_outputs(replay.first(model_fn))
        if not self._outputs.requires_grad:
            raise independent_outputs()
        self.outputs = in_own_memory(self._outputs.detach(), params)

    @override
    def vjp(self, cotangent: Tensor) -> list[Tensor]:
        pulled = gradients([self._outputs], self._params, [cotangent])
        return dense_gradients(self._params, pulled)


def difference(
    model_fn: ModelFn, params: Sequence[Tensor], z: Sequence[Tensor], replay: Replay
) -> tuple[Backward, Tensor] | None:
    """Return the model's `Backward`, and Jz ≈ (f(w + εz) - f(w)) / ε, of the outputs' shape.

    None for a model that writes to its parameters, as the difference would see what becomes of εz there.

    One forward pass for Jz, where dual numbers or a tape take the work of two. Both runs see the same dropout masks; of
    the second nothing is left in generators and buffers. w itself is put aside and back, so that it is exactly as it
    was.
    """
    with _moved(params, z):
        scratch_replay = Replay(params, params[0].device)
        try:
            nearby = scratch_replay.first(lambda: evaluate(model_fn))
            if scratch_replay.wrote_parameters:
                return None
        finally:
            scratch_replay.rewind()
    linear = Backward(model_fn, params, replay)
    return linear, (at_least_float32(nearby) - at_least_float32(linear.outputs)) / DIFFERENCE


@contextmanager
def _moved(params: Sequence[Tensor], tangents: Sequence[Tensor]) -> Iterator[None]:
    """Put the parameters at w + εv, without a gradient, so that no graph of this run is kept; then back, exactly.

    By `data`, so that their versions stay, and with them what other graphs have saved of the weights.
    """
    weights = [p.data for p in params]
    try:
        for p, weight, tangent in zip(params, weights, tangents, strict=True):
            p.data = weight + DIFFERENCE * tangent
            p.requires_grad_(False)
        yield
    finally:
        for p, weight in zip(params, weights, strict=True):
            p.data = weight
            p.requires_grad_(True)
