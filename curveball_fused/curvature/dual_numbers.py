"""The method "forward": dual numbers for Jv, an ordinary backward pass for Jᵀu."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from typing_extensions import override

from curveball_fused._torch_private import DisableTorchFunction, dual_level, is_functorch_wrapped
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
    relative_difference,
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
        self._functions: set[str] = set()
        self._outputs: Tensor | None = None  # of the first run
        self._differences: list[Tensor] | None = None
        self._without_graph: list[weakref.ref[Tensor]] | None = None

    @property
    @override
    def operators(self) -> frozenset[str]:
        return frozenset(self._functions)

    @override
    def compare_runs(self) -> None:
        self._differences = []

    @override
    def difference_of_runs(self) -> Tensor | None:
        return torch.stack(self._differences).amax() if self._differences else None

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
            if self._without_graph is None:
                self._without_graph = [ref for ref in substitute.results if _is_dual(ref())]
            self._seen |= substitute.seen | ({id(outputs)} & duals.keys())
            primal, tangent = fwAD.unpack_dual(duals.get(id(outputs), outputs))
            if tangent is None:
                raise independent_outputs() if not self._seen else lost_tangent()
            self._functions |= substitute.functions
            return self._compared(in_own_memory(primal.detach(), self._params)), tangent.detach()

    @override
    def without_graph(self) -> list[Tensor]:
        return [t for t in (ref() for ref in self._without_graph or ()) if t is not None]

    @override
    def vjp(self, cotangent: Tensor) -> list[Tensor]:
        with torch.enable_grad(), Decompose(every_call=False):
            outputs = checked_outputs(self._replay.again(self._model_fn))
        if not outputs.requires_grad:
            raise independent_outputs()
        self._compared(outputs.detach())
        pulled = gradients([outputs], self._params, [cotangent])
        if any(g is not None and id(p) not in self._seen for p, g in zip(self._params, pulled, strict=True)):
            raise lost_tangent()
        return dense_gradients(self._params, pulled)

    def _compared(self, outputs: Tensor) -> Tensor:
        """Return the outputs of a run, compared with those of the first if that was asked for."""
        if self._outputs is None:
            self._outputs = outputs
        elif self._differences is not None:
            self._differences.append(relative_difference(outputs, self._outputs))
        return outputs


def _is_dual(tensor: Tensor | None) -> bool:
    # Other layouts, and what torch.func has wrapped, cannot be asked.
    if tensor is None or tensor.layout != torch.strided or tensor.is_nested or is_functorch_wrapped(tensor):
        return False
    return fwAD.unpack_dual(tensor).tangent is not None
