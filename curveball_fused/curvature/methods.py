"""The methods of linearizing a model, and the order in which they are tried.

"linearize" runs the model once and keeps what both products read. "forward" takes an ordinary backward pass for Jᵀu and
passes of dual numbers for Jv, which follow almost any model. "double_backward" differentiates the backward pass, which
is linear in its cotangent. "compiled", for `compile=True`, has torch.compile do all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from traceback import walk_tb

from torch import Tensor
from torch.utils import checkpoint

from curveball_fused.replay import Replay

from .double_backward import DoubleBackward
from .dual_numbers import DualNumbers
from .linear_map import LinearMap, MethodUnsupported, ModelFn, evaluate, reentrant_checkpoint
from .linearized import Linearized
from .tape import TapeUnsupported
from .torch_modes import ForwardModeUnsupported, announce, first_line


@dataclass(frozen=True)
class Method:
    """All that is to be known of one method of linearizing a model.

    Attributes:
        name: as in `curvature=`, or "compiled".
        description: what it does, in a report.
        build: makes the linear map of a model, of (model_fn, params, replay, backend).
        advice: what a user can do where it cannot follow the model and no other is left to be tried.
        fallback: what the announcement says where this method takes the place of one that cannot follow the model.
        missing_derivative: words by which torch says that a derivative is missing.
        reruns: how often at most the model runs again in a step: for a product, a difference of outputs or the damping.
        evaluate: returns the outputs alone, by the same kernels.
    """

    name: str
    description: str
    build: Callable[[ModelFn, Sequence[Tensor], Replay, str], LinearMap]
    advice: str = ""
    fallback: str = ""
    missing_derivative: tuple[str, ...] = ()
    reruns: int = 2
    evaluate: Callable[[ModelFn], Tensor] = evaluate


# torch's compiler takes seconds to import: on first use only.
def _compiled(model_fn: ModelFn, params: Sequence[Tensor], replay: Replay, _: str) -> LinearMap:
    from .compiled import Compiled

    return Compiled(model_fn, params, replay)


def _evaluate_compiled(model_fn: ModelFn) -> Tensor:
    from .compiled import evaluate_compiled

    return evaluate_compiled(model_fn)


_FORWARD_MODE_IS_MISSING = ("forward AD", "forward mode AD", "jvp")
_LINEARIZE = Method(
    name="linearize",
    description="one run of the model, which leaves a tape of tangent maps",
    build=Linearized,
    advice='Change that, or use curvature="auto"',
    missing_derivative=_FORWARD_MODE_IS_MISSING,
)
_FORWARD = Method(
    name="forward",
    description="dual numbers",
    build=DualNumbers,
    advice='Replace the operator, or use curvature="auto" or "double_backward"',
    fallback="dual numbers are used instead, at about 9/7 of the time",
    missing_derivative=_FORWARD_MODE_IS_MISSING,
    reruns=3,
)
_DOUBLE_BACKWARD = Method(
    name="double_backward",
    description="autograd, differentiated once more",
    build=lambda model_fn, params, replay, _: DoubleBackward(model_fn, params, replay),
    advice="Replace the operator that is named here by one that torch can differentiate twice",
    fallback="double backward is used for the whole model",
    missing_derivative=("derivative", "double backward", "differentiat"),
)
_COMPILED = Method(
    name="compiled",
    description="torch.compile",
    build=_compiled,
    evaluate=_evaluate_compiled,
)
AUTO = ("linearize", "forward", "double_backward")  # the order of fallback
METHODS = {method.name: method for method in (_LINEARIZE, _FORWARD, _DOUBLE_BACKWARD, _COMPILED)}


def linearize(
    methods: Sequence[str],
    model_fn: ModelFn,
    params: Sequence[Tensor],
    z: Sequence[Tensor],
    replay: Replay,
    backend: str = "auto",
) -> tuple[str, LinearMap, tuple[Tensor, Tensor]]:
    """Linearize a model by the first of `methods` that can follow it.

    Args:
        methods: names, see `METHODS`.
        model_fn: called without arguments, returns the predictions.
        params: the parameters that are optimized.
        z: the first tangents to be asked for, of the parameters' shapes.
        replay: makes later runs of the model the same function.
        backend: whose tangent operators a tape or dual numbers may use.

    Returns:
        The method's name; the map; outputs and Jz.

    Raises:
        RuntimeError: none of the methods can follow the model.
        ValueError: there is none.
    """
    refusals: list[str] = []
    for name in methods:
        method = METHODS[name]
        try:
            with _refusals_named(method):
                linear = method.build(model_fn, params, replay, backend)
                first = linear.jvp(z)
        except MethodUnsupported as error:
            refusals.append(str(error))
            if name == methods[-1]:
                raise RuntimeError(f"{'; '.join(refusals)}. {method.advice}.") from error
            replay.rewind()
        else:
            if refusals:
                announce(refusals[-1], f"curveball_fused: {'; '.join(refusals)}; {method.fallback}.")
            return name, linear, first
    raise ValueError("no method was given.")


def _is_of_reentrant_checkpoint(error: BaseException) -> bool:
    """Return whether an error is about a call of `torch.utils.checkpoint.checkpoint`, of its older kind."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    inside = any(f.f_code.co_filename == checkpoint.__file__ and f.f_locals.get("use_reentrant") for f in frames)
    return inside or "use_reentrant=True" in str(error)


@contextmanager
def _refusals_named(method: Method) -> Iterator[None]:
    """Turn what a method raises for a model that it cannot follow into `MethodUnsupported`."""
    try:
        yield
    except (TapeUnsupported, NotImplementedError, RuntimeError) as error:
        text = str(error)
        known = isinstance(error, (TapeUnsupported, ForwardModeUnsupported))
        missing = known or any(words in text for words in method.missing_derivative)
        if not missing:
            raise
        if _is_of_reentrant_checkpoint(error):
            raise reentrant_checkpoint() from error
        reason = first_line(error)
        raise MethodUnsupported(f'curvature="{method.name}" cannot follow this model: {reason}') from error
