"""Jᵀu alone, by one run of the model: where the curvature is that of another batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from curveball_fused.replay import Replay

from .linear_map import (
    ModelFn,
    Pullback,
    checked_outputs,
    dense_gradients,
    gradients,
    in_own_memory,
    independent_outputs,
)
from .torch_modes import Decompose


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
