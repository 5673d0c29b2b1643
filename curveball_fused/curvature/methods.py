"""The methods of linearizing a model, and the order in which they are tried.

"linearize" runs the model once and keeps what both products read; "linearize_operators" does so for models that
differentiate inside. "forward" takes an ordinary backward pass for Jᵀu and passes of dual numbers for Jv, which follow
almost any model. "double_backward" differentiates the backward pass, which is linear in its cotangent. "compiled", for
`compile=True`, has torch.compile do all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from traceback import walk_tb
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils import checkpoint

from curveball_fused.data_parallel import LostProcess
from curveball_fused.replay import Replay, Replays, Unrepeatable
from curveball_fused.user_warnings import announce

from .double_backward import DoubleBackward
from .dual_numbers import DualNumbers
from .linear_map import LinearMap, MethodUnsupported, ModelFn, NotTrainable, evaluate, reentrant_checkpoint
from .linearized import Linearized, LinearizedOperators
from .tangent_maps import TapeUnsupported
from .torch_modes import ForwardModeUnsupported, first_line

Result = TypeVar("Result")


@dataclass(frozen=True)
class Method:
    """All that is to be known of one method of linearizing a model.

    Attributes:
        name: as in `curvature=`, or "compiled".
        description: what it does, in a report.
        build: makes the linear map of a model, of (model_fn, params, replay, backend).
        advice: what a user can do where it cannot follow the model and no other is left to be tried.
        fallback: what the announcement says where this method takes the place of one that cannot follow the model.
        reruns: how often at most the model runs again in a step: for a product, a difference of outputs or the damping.
        evaluate: returns the outputs alone, by the same kernels.
    """

    name: str
    description: str
    build: Callable[[ModelFn, Sequence[Tensor], Replay, str], LinearMap]
    advice: str = ""
    fallback: str = ""
    reruns: int = 2
    evaluate: Callable[[ModelFn], Tensor] = evaluate


# torch's compiler takes seconds to import: on first use only.
def _compiled(model_fn: ModelFn, params: Sequence[Tensor], replay: Replay, _: str) -> LinearMap:
    from .compiled import Compiled

    return Compiled(model_fn, params, replay)


def _evaluate_compiled(model_fn: ModelFn) -> Tensor:
    from .compiled import evaluate_compiled

    return evaluate_compiled(model_fn)


_LINEARIZE = Method(
    name="linearize",
    description="one run of the model, which leaves a tape of tangent maps",
    build=Linearized,
    advice='Change that, or use curvature="auto"',
)
_LINEARIZE_OPERATORS = Method(
    name="linearize_operators",
    description="one run of the model, which leaves a tape of the tangent maps of its operators",
    build=lambda model_fn, params, replay, _: LinearizedOperators(model_fn, params, replay),
    advice='Change that, or use curvature="auto"',
    fallback="its operators are followed one by one instead",
)
_FORWARD = Method(
    name="forward",
    description="dual numbers",
    build=DualNumbers,
    advice='Replace the operator, or use curvature="auto" or "double_backward"',
    fallback="dual numbers are used instead, at about 9/7 of the time",
    reruns=3,
)
_DOUBLE_BACKWARD = Method(
    name="double_backward",
    description="autograd, differentiated once more",
    build=lambda model_fn, params, replay, _: DoubleBackward(model_fn, params, replay),
    advice="Replace what is named here by what torch can differentiate twice",
    fallback="double backward is used for the whole model",
)
_COMPILED = Method(
    name="compiled",
    description="torch.compile",
    build=_compiled,
    advice="Leave compile=True off",
    evaluate=_evaluate_compiled,
)
AUTO = ("linearize", "linearize_operators", "forward", "double_backward")  # the order of fallback
METHODS = {method.name: method for method in (_LINEARIZE, _LINEARIZE_OPERATORS, _FORWARD, _DOUBLE_BACKWARD, _COMPILED)}


def by_first_of(
    methods: Sequence[str], measure: Callable[[Method], Result], model_fns: Sequence[ModelFn], replays: Replays
) -> Result:
    """Measure by the first of `methods` that can follow the model.

    Args:
        methods: names, see `METHODS`.
        measure: runs the model by a method; raises `MethodUnsupported`, as `refusals_of` makes it do, where that cannot
            follow it.
        model_fns: of the parts of the batch: called without arguments, each returns its predictions.
        replays: put back what an attempt has changed.

    Returns:
        What `measure` returns.

    Raises:
        RuntimeError: none of the methods can follow the model; the message has each one's reason.
        ValueError: there is none.
    """
    refusals: list[MethodUnsupported] = []
    for name in methods:
        try:
            result = measure(METHODS[name])
        except MethodUnsupported as refusal:
            replays.rewind()
            refusals.append(refusal)
            own = _own_error(refusal, model_fns, replays)
            if own is not None:
                raise own from None
        else:
            if refusals:
                said = _joined(refusals)
                announce(said, f"curveball_fused: {said}; {METHODS[name].fallback}.")
            return result
    if not refusals:
        raise ValueError("no method was given.")
    cause = refusals[-1].__cause__
    if isinstance(cause, NotTrainable):
        raise cause
    raise RuntimeError(f"{_joined(refusals)}. {METHODS[methods[-1]].advice}.") from refusals[-1]


def _is_of_reentrant_checkpoint(error: BaseException) -> bool:
    """Return whether an error is about a call of `torch.utils.checkpoint.checkpoint`, of its older kind."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    inside = any(f.f_code.co_filename == checkpoint.__file__ and f.f_locals.get("use_reentrant") for f in frames)
    return inside or "use_reentrant=True" in str(error)


@contextmanager
def refusals_of(method: Method) -> Iterator[None]:
    """Turn what a method raises for a model that it cannot follow into `MethodUnsupported`.

    Args:
        method: at work in the block.

    Yields:
        Nothing.

    Raises:
        OutOfMemoryError: as it was raised: no fault of the method.
        Unrepeatable: likewise, as every method would refuse the model.
        LostProcess: likewise.
        reentrant_checkpoint: likewise.
        MethodUnsupported: anything else was raised.
    """
    try:
        yield
    except (MethodUnsupported, Unrepeatable, LostProcess, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if _is_of_reentrant_checkpoint(error):
            raise reentrant_checkpoint() from error
        raise MethodUnsupported(refusal(method, _reason(error))) from error


def _reason(error: Exception) -> str:
    """Return what an error says: its first line, and of a long one, as torch's may be, the first sentence."""
    line = first_line(error) or type(error).__name__
    foreign = not isinstance(error, (TapeUnsupported, ForwardModeUnsupported, NotTrainable))
    return line.partition(". ")[0] if foreign and len(line) > 200 else line


def refusal(method: Method, reason: str) -> str:
    """Return the message of `MethodUnsupported`."""
    option = "compile=True" if method.name == "compiled" else f'curvature="{method.name}"'
    return f"{option} cannot follow this model: {reason.rstrip('.')}"


def _own_error(refusal: MethodUnsupported, model_fns: Sequence[ModelFn], replays: Replays) -> Exception | None:
    """Return what the model raises in an ordinary run too, which is no fault of a method; None if nothing."""
    if refusal.__cause__ is None or isinstance(refusal.__cause__, (TapeUnsupported, ForwardModeUnsupported)):
        return None
    try:
        for i, model_fn in enumerate(model_fns):
            replays[i].first(partial(evaluate, model_fn))  # recorded, as a refused run may have ended before it wrote
    except Exception as error:
        return error
    finally:
        replays.rewind()
    return None


def _joined(refusals: Sequence[MethodUnsupported]) -> str:
    return "; ".join(str(refusal) for refusal in refusals)
