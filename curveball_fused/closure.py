"""One function in the place of two: a closure that returns the outputs and the loss as a function of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from curveball_fused import checks
from curveball_fused.curvature import ModelFn
from curveball_fused.losses import LossFn

Closure = Callable[[], tuple[Tensor, LossFn]]


def functions_of(closure: Closure) -> tuple[ModelFn, LossFn]:
    """Return `model_fn` and `loss_fn` of a closure; the loss is that of the run that came last.

    Args:
        closure: called without arguments, as often as `model_fn` would be, returns outputs and `loss_fn`.
    """
    last: list[LossFn] = []

    def model_fn() -> Tensor:
        returned: Any = closure()
        if not isinstance(returned, tuple) or len(returned) != 2 or not callable(returned[1]):
            checks.raise_wrong_step_call()
        outputs: Tensor
        outputs, loss_fn = returned
        last[:] = [loss_fn]
        return outputs

    return model_fn, lambda outputs: last[0](outputs)
