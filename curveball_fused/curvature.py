"""The linear map of a model at its parameters: outputs, v ↦ Jv and u ↦ Jᵀu, without ever forming J = ∂f/∂w.

Two ways, with the same face. `Forward` takes an ordinary backward pass for Jᵀu and passes of dual numbers for Jv: the
memory of ordinary training. `DoubleBackward` differentiates the backward pass, which is linear in its cotangent, for
models that hold an operator without a forward-mode formula.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from .dual_rules import RULES
from .replay import Replay

ModelFn = Callable[[], Tensor]

_ATTENTION = frozenset(("scaled_dot_product_attention", "multi_head_attention_forward"))
_RECURRENT = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))
_announced: set[str] = set()


class ForwardModeUnsupported(NotImplementedError):
    """The model holds an operator without a forward-mode formula."""


class Forward:
    """Jacobian products by dual numbers (Jv) and an ordinary backward pass (Jᵀu).

    Every parameter is replaced by its dual number, by identity, in each torch call that `model_fn` makes, so any
    callable that uses the parameters will do. Nothing is kept between the products.
    """

    def __init__(self, model_fn: ModelFn, params: Sequence[Tensor], replay: Replay) -> None:
        self._model_fn = model_fn
        self._params = params
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
            substitute = _Substitute(duals)
            with substitute:
                outputs = _checked(self._run(self._model_fn))
            self._run = self._replay.again
            self._seen |= substitute.seen
            primal, tangent = fwAD.unpack_dual(duals.get(id(outputs), outputs))
            if tangent is None:
                raise _independent() if not self._seen else _lost()
            return primal.detach(), tangent.detach()

    def vjp(self, cotangent: Tensor) -> list[Tensor]:
        """`Jᵀ u`, in the parameters' shapes and dtypes; zero for a parameter that the model did not use."""
        with torch.enable_grad(), _Decompose(every_call=False):
            outputs = _checked(self._replay.again(self._model_fn))
        if not outputs.requires_grad:
            raise _independent()
        gradients = torch.autograd.grad(outputs, self._params, cotangent, allow_unused=True)
        if any(g is not None and id(p) not in self._seen for p, g in zip(self._params, gradients, strict=True)):
            raise _lost()
        return _dense(self._params, gradients)


class DoubleBackward:
    """Jacobian products by autograd alone: Jᵀu is a backward pass, and Jv its transpose, a second one.

    The model runs once; its graph, and that of its backward pass, are kept until the step ends.
    """

    def __init__(self, model_fn: ModelFn, params: Sequence[Tensor], replay: Replay) -> None:
        self._params = params
        with torch.enable_grad(), _Decompose(every_call=True):
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
        return self._outputs.detach(), tangent

    def vjp(self, cotangent: Tensor) -> list[Tensor]:
        """As `Forward.vjp`."""
        gradients = torch.autograd.grad(self._outputs, self._params, cotangent, retain_graph=True, allow_unused=True)
        return _dense(self._params, gradients)


def run_plain(model_fn: ModelFn) -> Tensor:
    """The outputs alone, by the same kernels that `Forward.vjp` uses."""
    with torch.no_grad(), _Decompose(every_call=False):
        return _checked(model_fn())


@contextmanager
def forward_mode_errors() -> Iterator[None]:
    """Turns torch's errors about missing forward-mode formulas into `ForwardModeUnsupported`."""
    try:
        yield
    except ForwardModeUnsupported:
        raise
    except (NotImplementedError, RuntimeError) as error:
        text = str(error)
        if "forward AD" in text or "forward mode AD" in text or "jvp" in text:
            raise ForwardModeUnsupported(text.split("\n")[0]) from error
        raise


def announce(key: str, message: str) -> None:
    """Warns once per process."""
    if key not in _announced:
        _announced.add(key)
        warnings.warn(message, stacklevel=2)


class _Decompose(TorchFunctionMode):
    """Runs attention and recurrent layers by kernels that can be differentiated twice, or in forward mode.

    Fused kernels draw dropout masks of their own, so a layer with dropout is decomposed in every run of a step
    (`every_call=False`); one without only where its fused kernel lacks the derivative (`every_call=True`).
    """

    def __init__(self, every_call: bool) -> None:
        super().__init__()
        self._every_call = every_call

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with self._kernels(func, args, kwargs):
            return func(*args, **(kwargs or {}))

    def _kernels(self, func: Any, args: Any, kwargs: dict[str, Any] | None) -> AbstractContextManager[Any]:
        name = getattr(func, "__name__", "")
        if name in _ATTENTION:
            if self._every_call or _has_dropout(args, kwargs):
                return sdpa_kernel(SDPBackend.MATH)
        elif name in _RECURRENT and (self._every_call or _has_dropout(args, kwargs)):
            return _plain_recurrence(args[0].device.type)
        return nullcontext()


class _Substitute(_Decompose):
    """Replaces parameters by their dual numbers in every torch call, and calls our own dual rules where there are any.

    Attributes:
        seen: ids of the parameters that reached a torch call.
    """

    def __init__(self, duals: dict[int, Tensor]) -> None:
        super().__init__(every_call=True)
        self._duals = duals
        self.seen: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not torch.is_grad_enabled():
            return self._constant(func, args, kwargs or {})
        args = tuple([self._swap(a) for a in args])
        kwargs = {k: self._swap(v) for k, v in kwargs.items()} if kwargs else {}
        rule = RULES.get(func)
        if rule is not None:
            result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        name = getattr(func, "__name__", "")
        if name in _RECURRENT or name in _ATTENTION:
            announce(name, f"curveball_fused: {name} has no fused forward-mode formula; its plain kernel is used.")
            with self._kernels(func, args, kwargs):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _constant(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Inside `no_grad`: no derivative in either mode."""
        if not torch._C._is_fwd_grad_enabled() and any(id(a) in self._duals for a in args):
            raise ForwardModeUnsupported("a custom autograd.Function uses a parameter inside its forward")
        with fwAD._set_fwd_grad_enabled(False):
            return func(*args, **kwargs)

    def _swap(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            dual = self._duals.get(id(value))
            if dual is None:
                return value
            self.seen.add(id(value))
            return dual
        if type(value) in (list, tuple):
            return type(value)([self._swap(v) for v in value])
        return value


def _has_dropout(args: Any, kwargs: dict[str, Any] | None) -> bool:
    """Whether a positive float that may be a dropout probability is among the arguments of a fused layer."""
    named = [v for k, v in (kwargs or {}).items() if k.startswith("dropout")]
    return any(isinstance(v, float) and v > 0 for v in (*args, *named))


@contextmanager
def _plain_recurrence(device_type: str) -> Iterator[None]:
    switch = torch.backends.cudnn if device_type == "cuda" else torch.backends.mkldnn
    with switch.flags(enabled=False):
        yield


def uncompiled() -> AbstractContextManager[Any]:
    """Runs `torch.compile`d modules as written: compiled code has lost tangents silently in some versions of torch."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _checked(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"model_fn must return one tensor, the predictions; it returned {type(outputs).__name__}. Pick the tensor "
            "that the loss reads, or concatenate several into one."
        )
    if not outputs.is_floating_point():
        raise TypeError(f"model_fn must return a real floating-point tensor; it returned {outputs.dtype}.")
    return outputs


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
        "the tangent of a parameter was lost: model_fn uses it inside code that torch functions cannot see into, such "
        "as a torch.jit-scripted or traced module or a custom autograd.Function. Call the original Python module in "
        'model_fn, or construct CurveBall with curvature="double_backward".'
    )
