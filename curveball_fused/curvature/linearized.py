"""The method "linearize": one run of the model, which leaves a tape of tangent maps beside autograd's graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from curveball_fused.replay import Replay

from .linear_map import (
    LinearMap,
    ModelFn,
    checked_outputs,
    dense_gradients,
    gradients,
    in_own_memory,
    independent_outputs,
    lost_tangent,
)
from .tape import Tape


class Linearized(LinearMap):
    """Jacobian products from one run of the model: Jv by the tape that it leaves, Jᵀu by autograd's graph.

    What the graph holds is kept until the step ends.
    """

    def __init__(self, model_fn: ModelFn, params: Sequence[Tensor], replay: Replay, backend: str = "auto") -> None:
        self._params = params
        self._tape = Tape(params, backend)
        with torch.enable_grad(), self._tape:
            self._outputs = checked_outputs(replay.first(model_fn))
        if not self._outputs.requires_grad:
            raise independent_outputs()

    @override
    def jvp(self, tangents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        directions = [t.to(p.dtype) for p, t in zip(self._params, tangents, strict=True)]
        return in_own_memory(self._outputs.detach(), self._params), self._tape.jvp(directions, self._outputs)

    @override
    def vjp(self, cotangent: Tensor) -> list[Tensor]:
        pulled = gradients([self._outputs], self._params, [cotangent])
        if any(g is not None and id(p) not in self._tape.seen for p, g in zip(self._params, pulled, strict=True)):
            raise lost_tangent()
        return dense_gradients(self._params, pulled)
