"""The linear map of a model at its parameters: outputs, v ↦ Jv and u ↦ Jᵀu, without ever forming J = ∂f/∂w.

Three ways, with the same face. `Linearised` runs the model once and keeps what both products read. `Forward` takes an
ordinary backward pass for Jᵀu and passes of dual numbers for Jv, which follow almost any model. `DoubleBackward`
differentiates the backward pass, which is linear in its cotangent, for models that hold an operator without a
forward-mode formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from .modes import Decompose, ForwardModeUnsupported, Substitute, announce
from .replay import Replay
from .tape import Tape, Untaped

ModelFn = Callable[[], Tensor]


class LinearMap(Protocol):
    """J of a model at its parameters."""

    def jvp(self, tangents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """`(outputs, J v)`, both of the outputs' shape and dtype; `tangents` have the parameters' shapes."""

    def vjp(self, cotangent: Tensor) -> list[Tensor]:
        """`Jᵀ u`, in the parameters' shapes and dtypes; zero for a parameter that the model did not use."""


class Forward:
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

    def jvp(self, tangents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """`(outputs, J v)`, both of the outputs' shape and dtype; `tangents` have the parameters' shapes."""
        # Gradients stay enabled, although none is recorded, so that a `no_grad` block of the model can be told: what
        # it computes is constant to the backward pass and must be so here.
        with torch.enable_grad(), fwAD.dual_level():
            duals = {
                id(p): fwAD.make_dual(p.detach(), t.to(p.dtype)) for p, t in zip(self._params, tangents, strict=True)
            }
            substitute = Substitute(duals, self._backend)
            with substitute:
                outputs = _checked(self._run(self._model_fn))
            self._run = self._replay.again
            self._seen |= substitute.seen | ({id(outputs)} & duals.keys())
            primal, tangent = fwAD.unpack_dual(duals.get(id(outputs), outputs))
            if tangent is None:
                raise _independent() if not self._seen else _lost()
            return _own(primal.detach(), self._params), tangent.detach()

    def vjp(self, cotangent: Tensor) -> list[Tensor]:
        """`Jᵀ u`, in the parameters' shapes and dtypes; zero for a parameter that the model did not use."""
        with torch.enable_grad(), Decompose(every_call=False):
            outputs = _checked(self._replay.again(self._model_fn))
        if not outputs.requires_grad:
            raise _independent()
        gradients = torch.autograd.grad(outputs, self._params, cotangent, allow_unused=True)
        if any(g is not None and id(p) not in self._seen for p, g in zip(self._params, gradients, strict=True)):
            raise _lost()
        return _dense(self._params, gradients)


class Linearised:
    """Jacobian products from one run of the model: Jv by the tape that it leaves, Jᵀu by autograd's graph.

    The model runs once; what its graph holds is kept until the step ends.
    """

    def __init__(self, model_fn: ModelFn, params: Sequence[Tensor], replay: Replay, backend: str = "auto") -> None:
        self._params = params
        self._tape = Tape(params, backend)
        with torch.enable_grad(), self._tape:
            self._outputs = _checked(replay.first(model_fn))
        if not self._outputs.requires_grad:
            raise _independent()

    def jvp(self, tangents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As `Forward.jvp`."""
        directions = [t.to(p.dtype) for p, t in zip(self._params, tangents, strict=True)]
        return _own(self._outputs.detach(), self._params), self._tape.jvp(directions, self._outputs)

    def vjp(self, cotangent: Tensor) -> list[Tensor]:
        """As `Forward.vjp`; once."""
        gradients = torch.autograd.grad(self._outputs, self._params, cotangent, allow_unused=True)
        if any(g is not None and id(p) not in self._tape.seen for p, g in zip(self._params, gradients, strict=True)):
            raise _lost()
        return _dense(self._params, gradients)


class DoubleBackward:
    """Jacobian products by autograd alone: Jᵀu is a backward pass, and Jv its transpose, a second one.

    The model runs once; its graph, and that of its backward pass, are kept until the step ends.
    """

    def __init__(self, model_fn: ModelFn, params: Sequence[Tensor], replay: Replay) -> None:
        self._params = params
        with torch.enable_grad(), Decompose(every_call=True):
            self._outputs = _checked(replay.first(model_fn))
        if not self._outputs.requires_grad:
            raise _independent()
        self._cotangent = torch.zeros_like(self._outputs, requires_grad=True)
        gradients = torch.autograd.grad(self._outputs, params, self._cotangent, create_graph=True, allow_unused=True)
        # u ↦ Jᵀu is linear, so the derivative of <Jᵀu, v> with respect to u is Jv.
        self._used = [i for i, g in enumerate(gradients) if g is not None and g.requires_grad]
        self._transpose = [g for g in gradients if g is not None and g.requires_grad]
        if not self._transpose:
            raise _independent()

    def jvp(self, tangents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As `Forward.jvp`."""
        directions = [tangents[i].to(self._params[i].dtype) for i in self._used]
        (tangent,) = torch.autograd.grad(self._transpose, self._cotangent, directions, retain_graph=True)
        return _own(self._outputs.detach(), self._params), tangent

    def vjp(self, cotangent: Tensor) -> list[Tensor]:
        """As `Forward.vjp`."""
        gradients = torch.autograd.grad(self._outputs, self._params, cotangent, retain_graph=True, allow_unused=True)
        return _dense(self._params, gradients)


WAYS = ("linearize", "forward", "double_backward")


def linearise(
    ways: Sequence[str],
    model_fn: ModelFn,
    params: Sequence[Tensor],
    z: Sequence[Tensor],
    replay: Replay,
    backend: str = "auto",
) -> tuple[str, LinearMap, tuple[Tensor, Tensor]]:
    """The linear map by the first of `ways` that can follow the model, and its first product.

    The ways are those of `WAYS`, or "compiled".

    Returns:
        The way; the map; outputs and Jz.

    Raises:
        RuntimeError: none of the ways can.
    """
    refusals: list[str] = []
    for way in ways:
        try:
            with _explained(way):
                linear = _start(way, model_fn, params, replay, backend)
                first = linear.jvp(z)
        except Unfollowed as error:
            refusals.append(str(error))
            if way == ways[-1]:
                raise RuntimeError(f"{'; '.join(refusals)}. {_ADVICE[way]}.") from error
            replay.rewind()
        else:
            if refusals:
                announce(refusals[-1], f"curveball_fused: {'; '.join(refusals)}; {_RETREATS[way]}.")
            return way, linear, first
    raise AssertionError("no way was given")


def _start(way: str, model_fn: ModelFn, params: Sequence[Tensor], replay: Replay, backend: str) -> LinearMap:
    if way == "compiled":
        from .compiled import Compiled  # here, since torch's compiler takes seconds to import

        return Compiled(model_fn, params, replay)
    if way == "double_backward":
        return DoubleBackward(model_fn, params, replay)
    return (Linearised if way == "linearize" else Forward)(model_fn, params, replay, backend)


_ADVICE = {
    "linearize": 'Change that, or use curvature="auto"',
    "forward": 'Replace the operator, or use curvature="auto" or "double_backward"',
    "double_backward": "Replace the operator that is named here by one that torch can differentiate twice",
}
_RETREATS = {
    "forward": "dual numbers are used instead, at about 9/7 of the time",
    "double_backward": "double backward is used for the whole model",
}
# What torch says in errors about missing derivatives.
_MISSING = {
    "linearize": ("forward AD", "forward mode AD", "jvp"),
    "compiled": (),
    "forward": ("forward AD", "forward mode AD", "jvp"),
    "double_backward": ("derivative", "double backward", "differentiat"),
}


def run_plain(model_fn: ModelFn) -> Tensor:
    """The outputs alone, by the same kernels that `Forward.vjp` uses; for a look at the loss after the update."""
    torch.clear_autocast_cache()  # it may hold half-precision copies of the old weights
    # With gradients enabled, since a model may itself differentiate inside.
    with torch.enable_grad(), Decompose(every_call=False):
        return _checked(model_fn()).detach()


class Unfollowed(Exception):
    """One way cannot differentiate the model; the message says which, and why."""


@contextmanager
def _explained(way: str) -> Iterator[None]:
    """Turns what a way raises for a model that it cannot follow into `Unfollowed`."""
    try:
        yield
    except (Untaped, NotImplementedError, RuntimeError) as error:
        text = str(error)
        known = isinstance(error, (Untaped, ForwardModeUnsupported)) or any(words in text for words in _MISSING[way])
        if not known:
            raise
        first_line = text.split("\n")[0]
        raise Unfollowed(f'curvature="{way}" cannot follow this model: {first_line}') from error


def _checked(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"model_fn must return one tensor, the predictions; it returned {type(outputs).__name__}. Pick the tensor "
            "that the loss reads, or concatenate several into one."
        )
    if not outputs.is_floating_point():
        raise TypeError(f"model_fn must return a real floating-point tensor; it returned {outputs.dtype}.")
    return outputs


def _own(outputs: Tensor, params: Sequence[Tensor]) -> Tensor:
    """`outputs` in memory of their own, where the model returned a parameter: the update must not change them."""
    memory = outputs.untyped_storage().data_ptr()
    return outputs.clone() if any(p.untyped_storage().data_ptr() == memory for p in params) else outputs


def _dense(params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor]:
    if all(g is None for g in gradients):
        raise _independent()
    if any(g is not None and g.layout != torch.strided for g in gradients):
        raise RuntimeError("CurveBall does not support sparse gradients: construct the embedding with sparse=False.")
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, gradients, strict=True)]


def _independent() -> RuntimeError:
    return RuntimeError(
        "the output of model_fn does not depend on any parameter of this optimizer: pass the parameters of the model "
        "that model_fn calls, and don't detach its output or run it under torch.no_grad()."
    )


def _lost() -> RuntimeError:
    return RuntimeError(
        "the tangent of a parameter was lost: model_fn detaches what comes of it, or uses it inside code that torch "
        "functions cannot see into, such as a torch.jit-scripted or traced module or a custom autograd.Function. Call "
        'the original Python module in model_fn, or construct CurveBall with curvature="double_backward".'
    )
