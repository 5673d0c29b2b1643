"""What users give to `step`, as parts of a batch: two functions, one closure for both, or a list of such."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, MethodType
from typing import Any, NoReturn, cast

from torch import Tensor, nn

from curveball_fused.batch import Part, Weight
from curveball_fused.data_parallel import are_there_processes
from curveball_fused.outputs import StructuredOutputs

Functions = tuple[Callable[[], Any], Callable[[Any], Tensor]]
Closure = Callable[[], tuple[Any, Callable[[Any], Tensor]]]  # returns outputs, of any structure, and their loss


class GivenPart(StructuredOutputs):
    """A part of a batch as it was given; its outputs may have any structure.

    Args:
        functions: model_fn and loss_fn.
        weight: of the part; None: as many as it has samples.

    Raises:
        TypeError: model_fn needs arguments.
    """

    def __init__(self, functions: Functions, weight: Weight | None = None) -> None:
        _check_called_without_arguments(functions[0])
        super().__init__(*functions)
        self._weight = weight

    def part(self) -> Part:
        """Return it as one of a tensor."""
        return Part(self.model_fn, self.loss_fn, lambda: float(self.samples) if self._weight is None else self._weight)


def given_parts(
    model_fn: Any, loss_fn: Any, closure: Any, weights: Sequence[Weight] | None
) -> tuple[list[GivenPart], bool]:
    """Return the parts of the batch, and whether they were given as a list.

    Args:
        model_fn: that of `step`; also a closure, or a list of parts.
        loss_fn: that of `step`; None with a closure or a list.
        closure: in the place of both, or a list of parts, or None.
        weights: of the parts, or None.

    Raises:
        TypeError: they are not what `step` takes; the message says what to write.
        ValueError: there is no part, or the weights do not fit.
    """
    listed = closure if model_fn is None else model_fn
    if isinstance(listed, (list, tuple)) and loss_fn is None and (model_fn is None or closure is None):
        if isinstance(listed, tuple) and len(listed) == 2 and all(map(callable, listed)):
            raise TypeError("a pair is one part: write step(model_fn, loss_fn), or step([(model_fn, loss_fn)]).")
        if not listed:
            raise ValueError("the list of parts is empty: give at least one, (model_fn, loss_fn).")
        _check_weights(weights, len(listed))
        functions = [_functions_of_part(part) for part in listed]
        if weights is None:
            return [GivenPart(each) for each in functions], True
        return [GivenPart(*pair) for pair in zip(functions, weights, strict=True)], True
    if weights is not None:
        raise TypeError("weights belong to a list of parts: optimizer.step([(model_fn, loss_fn), ...], weights=[...]).")
    given = model_fn if closure is None else closure
    if loss_fn is None and (model_fn is None or closure is None):
        if callable(given):
            return [GivenPart(_functions_of_closure(given))], False
        if isinstance(given, Iterator):
            raise TypeError("the parts of a batch must be a list, as a step runs them more than once: list(parts).")
    if not callable(model_fn) or not callable(loss_fn) or closure is not None:
        raise_wrong_call()
    return [GivenPart((model_fn, loss_fn))], False


def raise_wrong_call() -> NoReturn:
    """Raise TypeError for a call of `step` in torch's old way."""
    raise TypeError(
        "CurveBall.step differentiates the model itself: it needs its outputs, and the loss as a function of them. "
        "Instead of a closure that returns the loss, and calls backward(), write:\n"
        "    loss, outputs = optimizer.step(lambda: model(x), lambda outputs: F.cross_entropy(outputs, y))\n"
        "or, where a trainer hands on one function, let it return both and leave out backward():\n"
        "    optimizer.step(lambda: (model(x), lambda outputs: F.cross_entropy(outputs, y)))\n"
        "(A trainer that calls backward() itself needs a class of curveball_fused.integrations: see docs/trainers.md.)"
    )


def arguments_of(given: Any) -> tuple[str, int]:
    """Return the name of a function or module, and how many arguments it needs; 0 where only the call will tell."""
    called: Any = given.forward if isinstance(given, nn.Module) else given
    function = called.__func__ if isinstance(called, MethodType) else called
    if not isinstance(function, FunctionType):
        return "", 0
    needed = function.__code__.co_argcount - len(function.__defaults__ or ()) - (function is not called)
    return function.__qualname__, needed


def _functions_of_part(part: Any) -> Functions:
    if callable(part):
        return _functions_of_closure(part)
    if not isinstance(part, (list, tuple)) or len(part) != 2 or not all(map(callable, part)):
        raise TypeError(
            "each part of a batch must be (model_fn, loss_fn), or a closure that returns outputs and loss_fn; got "
            f"{type(part).__name__}."
        )
    return cast(Functions, tuple(part))


def _check_called_without_arguments(model_fn: Any) -> None:
    """Raise TypeError for a function that cannot be."""
    name, needed = arguments_of(model_fn)
    if needed > 0:
        raise TypeError(
            f"model_fn is called without arguments, and {name} needs {needed}: write "
            "optimizer.step(lambda: model(x), lambda outputs: F.cross_entropy(outputs, y)). The model's function comes "
            "first, the loss second."
        )


def _functions_of_closure(closure: Closure) -> Functions:
    """Return the `model_fn` and `loss_fn` that a closure stands for; the loss is that of its last run."""
    last: list[Callable[[Any], Tensor]] = []

    def model_fn() -> Any:
        returned: Any = closure()
        if not isinstance(returned, tuple) or len(returned) != 2 or not callable(returned[1]):
            raise_wrong_call()
        outputs, loss_fn = returned
        last[:] = [loss_fn]
        return outputs

    return model_fn, lambda outputs: last[0](outputs)


def _check_weights(weights: Any, count: int) -> None:
    if weights is None:
        return
    if not isinstance(weights, (list, tuple)) or len(weights) != count:
        raise ValueError(f"weights must be a list of {count} numbers, one for each part; got {weights!r}.")
    for weight in weights:
        if isinstance(weight, Tensor):
            if weight.numel() != 1:
                raise ValueError(f"each weight must be a number, or 0-dim; one has the shape {tuple(weight.shape)}.")
        elif not isinstance(weight, numbers.Real) or not 0 <= float(weight) < math.inf:
            raise ValueError(f"each weight must be a finite number, at least 0; got {weight!r}.")
    if not are_there_processes() and not any(isinstance(weight, Tensor) or weight for weight in weights):
        raise ValueError("all weights are zero: there is nothing to learn from.")
