"""The method "forward": dual numbers for Jv, an ordinary backward pass for Jᵀu."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from typing_extensions import override

from curveball_fused._torch_private import DisableTorchFunction, dual_level
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
from .torch_modes import Decompose, Substitute


class DualNumbers(LinearMap):
    """Jacobian products by dual numbers (Jv) and an ordinary backward pass (Jᵀu).

    Every parameter is replaced by its dual number, by identity, in each torch call that `model_fn` makes, so any
    callable that uses the parameters will do. Nothing is kept between the products.
    """

    def __init__(self, model_fn: ModelFn, params: Sequence[Tensor], replay: Replay, backend: str = "auto") -> None:
        self._model_fn = model_fn
        self._params = params
        self._backend = backend
        self._replay = replay
        self._run = replay.first
        self._seen: set[int] = set()

    @override
    def jvp(self, tangents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        # Gradients stay enabled, although none is recorded, so that a `no_grad` block of the model can be told: what
        # it computes is constant to the backward pass and must be so here.
        with torch.enable_grad(), dual_level():
            duals: dict[int, Tensor] = {}
            substitute = Substitute(duals, self._backend)

            def model() -> Tensor:
                with DisableTorchFunction():  # here, as `again` may give a parameter its former place
                    for p, t in zip(self._params, tangents, strict=True):
                        duals[id(p)] = fwAD.make_dual(p.detach(), t.to(p.dtype))
                return self._model_fn()

            with substitute:
                outputs = checked_outputs(self._run(model))
            self._run = self._replay.again
            self._seen |= substitute.seen | ({id(outputs)} & duals.keys())
            primal, tangent = fwAD.unpack_dual(duals.get(id(outputs), outputs))
            if tangent is None:
                raise independent_outputs() if not self._seen else lost_tangent()
            return in_own_memory(primal.detach(), self._params), tangent.detach()

    @override
    def vjp(self, cotangent: Tensor) -> list[Tensor]:
        with torch.enable_grad(), Decompose(every_call=False):
            outputs = checked_outputs(self._replay.again(self._model_fn))
        if not outputs.requires_grad:
            raise independent_outputs()
        pulled = gradients([outputs], self._params, [cotangent])
        if any(g is not None and id(p) not in self._seen for p, g in zip(self._params, pulled, strict=True)):
            raise lost_tangent()
        return dense_gradients(self._params, pulled)
