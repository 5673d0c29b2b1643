"""The method "double_backward": autograd alone, for models that hold an operator without a forward-mode formula.

Jᵀu is linear in u, so the derivative of <Jᵀu, v> with respect to u is Jv (Townsend 2017, "A new trick for calculating
Jacobian vector products").
"""

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
    own_gradients,
)
from .torch_modes import Decompose


class DoubleBackward(LinearMap):
    """Jacobian products by autograd alone: Jᵀu is a backward pass, and Jv its transpose, a second one.

    The model runs once; its graph, and that of its backward pass, are kept until the step ends.
    """

    def __init__(self, model_fn: ModelFn, params: Sequence[Tensor], replay: Replay) -> None:
        self._params = params
        decompose = Decompose(every_call=True)
        with torch.enable_grad(), decompose:
            self._outputs = checked_outputs(replay.first(model_fn))
        self._operators = frozenset(decompose.functions)
        if not self._outputs.requires_grad:
            raise independent_outputs()
        self._cotangent = torch.zeros_like(self._outputs, requires_grad=True)
        with own_gradients(params):
            pulled = self._pull_back(self._cotangent, create_graph=True)
        self._used = [i for i, g in enumerate(pulled) if g is not None and g.requires_grad]
        self._transpose = [g for g in pulled if g is not None and g.requires_grad]
        if not self._transpose:
            raise independent_outputs()

    @override
    def jvp(self, tangents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        directions = [tangents[i].to(self._params[i].dtype) for i in self._used]
        (tangent,) = gradients(
            self._transpose, [self._cotangent], directions, every_call=True, allow_unused=False, retain_graph=True
        )
        assert tangent is not None
        return in_own_memory(self._outputs.detach(), self._params), tangent

    @property
    @override
    def operators(self) -> frozenset[str]:
        return self._operators

    @override
    def vjp(self, cotangent: Tensor) -> list[Tensor]:
        return dense_gradients(self._params, self._pull_back(cotangent, create_graph=False))

    def _pull_back(self, cotangent: Tensor, create_graph: bool) -> Sequence[Tensor | None]:
        return gradients(
            [self._outputs], self._params, [cotangent], every_call=True, retain_graph=True, create_graph=create_graph
        )
