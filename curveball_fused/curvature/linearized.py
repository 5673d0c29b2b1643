"""The methods "linearize" and "linearize_operators": one run of the model, which leaves a tape of tangent maps."""

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
from .operator_tape import OperatorTape
from .tape import Tape


class Linearized(LinearMap):
    """Jacobian products from one run of the model: Jv by the tape that it leaves, Jᵀu by autograd's graph.

    What the graph holds is kept until the step ends.
    """

    def __init__(self, model_fn: ModelFn, params: Sequence[Tensor], replay: Replay, backend: str = "auto") -> None:
        self._params = params
        self._tape = self._new_tape(backend)
        with torch.enable_grad(), self._tape:
            self._outputs = checked_outputs(replay.first(model_fn))
        if not self._outputs.requires_grad:
            raise independent_outputs()

    def _new_tape(self, backend: str) -> Tape | OperatorTape:
        return Tape(self._params, backend)

    @override
    def jvp(self, tangents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        directions = [t.to(p.dtype) for p, t in zip(self._params, tangents, strict=True)]
        return in_own_memory(self._outputs.detach(), self._params), self._tape.jvp(directions, self._outputs)

    @property
    @override
    def operators(self) -> frozenset[str]:
        return frozenset(self._tape.functions)

    @override
    def vjp(self, cotangent: Tensor) -> list[Tensor]:
        pulled = gradients([self._outputs], self._params, [cotangent])
        if any(g is not None and id(p) not in self._tape.seen for p, g in zip(self._params, pulled, strict=True)):
            raise lost_tangent()
        return dense_gradients(self._params, pulled)


class LinearizedOperators(Linearized):
    """The same by a tape of operators, which follows gradients that the model itself takes."""

    @override
    def _new_tape(self, backend: str) -> OperatorTape:
        return OperatorTape(self._params)
