"""The method "double_backward": autograd alone, for models that hold an operator without a forward-mode formula.

Jᵀu is linear in u, so the derivative of <Jᵀu, v> with respect to u is Jv (Townsend 2017, "A new trick for calculating
Jacobian vector products"). A custom `autograd.Function` whose gradient has no graph back to its cotangent would drop
out of that derivative without a word, so each one is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from typing_extensions import override

from curveball_fused.autograd_graph import nodes_of
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
        with _differentiable_functions(self._outputs), own_gradients(params):
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


@contextmanager
def _differentiable_functions(outputs: Tensor) -> Iterator[None]:
    """Refuse a backward pass with a graph of its own in which a custom function returns what has none.

    No comparison of numbers finds it in a first step where the function's results are multiplied by zero, as in a
    residual branch that begins at zero.

    Args:
        outputs: whose graph the block goes through.

    Yields:
        Nothing.

    Raises:
        RuntimeError: a gradient that a function returns does not depend on the one that it is given.
    """
    passes: list[tuple[str, Sequence[Tensor | None], Sequence[Tensor | None]]] = []
    with ExitStack() as hooks:
        for node in nodes_of(outputs):
            if isinstance(node, BackwardCFunction):
                name = type(node).__name__.removesuffix("Backward")
                hook = node.register_hook(lambda given, taken, name=name: passes.append((name, given, taken)))
                hooks.callback(hook.remove)
        yield
    for name, returned, taken in passes:
        cotangents = [t for t in taken if t is not None and t.requires_grad]
        for gradient in returned:
            if cotangents and gradient is not None and not _depends(gradient, cotangents):
                raise RuntimeError(
                    f"the backward pass of the autograd.Function {name} cannot be differentiated, as what it returns "
                    "has no graph; write it with functions of torch, without no_grad, detach and once_differentiable"
                )


def _depends(gradient: Tensor, cotangents: Sequence[Tensor]) -> bool:
    if not gradient.requires_grad:
        return False
    u = torch.zeros_like(gradient)
    found = torch.autograd.grad(gradient, cotangents, u, retain_graph=True, allow_unused=True)
    return any(f is not None for f in found)
