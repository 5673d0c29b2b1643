"""Modes of torch under which a model runs: parameters become dual numbers, fused kernels differentiable ones."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from curveball_fused._torch_private import base_of, forward_grad_enabled, set_forward_grad_enabled
from curveball_fused.replay.control_flow import AS_WRITTEN
from curveball_fused.user_warnings import announce

from .dual_rules import RULES
from .rules import COMPOSITES, TWICE_DIFFERENTIABLE, tensors

_ATTENTION = frozenset(("scaled_dot_product_attention", "multi_head_attention_forward"))
RECURRENT = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))
# In these a dual number differs from its parameter.
_OWN_ATTRIBUTES = frozenset(("requires_grad", "is_leaf", "grad_fn", "grad"))
_GIVES_PLACE = frozenset(("__set__", "set_"))  # the former in `parameter.data = values`
# Functions whose tangent by torch's forward mode is not the transpose of their backward pass: off the symmetric
# matrices, or with a part of it lost.
_TRANSPOSES_DISAGREE = frozenset(
    "as_strided_scatter cholesky cholesky_ex cholesky_inverse linalg_cholesky linalg_cholesky_ex linalg_eigh "
    "linear_cross_entropy max_unpool1d max_unpool2d max_unpool3d triangular_solve".split()
)
# Where each takes `scale_grad_by_freq`, by which its backward pass divides, the derivative of that one not.
_SCALES_GRADIENT = {F.embedding: 5, torch.embedding: 3, F.embedding_bag: 5, torch.embedding_bag: 3}


def transposes_disagree(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether the tangent of a call, by torch's forward mode, is not the transpose of its backward pass."""
    name = getattr(func, "__name__", "").partition(".")[0]
    if name in ("scatter_reduce", "scatter_reduce_"):
        return any(isinstance(a, str) and a == "prod" for a in (*args, *kwargs.values()))
    return name in _TRANSPOSES_DISAGREE


class ForwardModeUnsupported(NotImplementedError):
    """The model holds an operator without a forward-mode formula."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message: torch's may be followed by a stack of C++ frames."""
    return str(error).partition("\n")[0]


class Decompose(TorchFunctionMode):
    """Run attention, recurrent layers and others by what can be differentiated twice, or in forward mode.

    Fused kernels draw dropout masks of their own, so a layer with dropout is decomposed in every run of a step
    (`every_call=False`); one without only where its fused kernel lacks the derivative (`every_call=True`).

    Attributes:
        functions: names of the torch functions that were called with gradients enabled.
    """

    def __init__(self, every_call: bool) -> None:
        super().__init__()
        self._every_call = every_call
        self.functions: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in AS_WRITTEN:
            return self._as_written(func, args, kwargs)
        self.functions.add(getattr(func, "__name__", ""))
        if self._every_call:
            _refuse_scaled_gradients(func, args, kwargs or {})
            func = TWICE_DIFFERENTIABLE.get(func, func)
        with self._kernels(func, args, kwargs):
            return func(*args, **(kwargs or {}))

    def _as_written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        with self:
            return AS_WRITTEN[func](*args, **(kwargs or {}))

    def _kernels(self, func: Any, args: Any, kwargs: dict[str, Any] | None) -> AbstractContextManager[Any]:
        name = getattr(func, "__name__", "")
        if name in _ATTENTION:
            if self._every_call or _has_dropout(args, kwargs):
                return sdpa_kernel(SDPBackend.MATH)
        elif name in RECURRENT and (self._every_call or _has_dropout(args, kwargs)):
            return plain_recurrence(args[0].device.type)
        return nullcontext()


class Substitute(Decompose):
    """Replace parameters by their dual numbers in every torch call, and calls our own dual rules where there are any.

    Attributes:
        seen: ids of the parameters that reached a torch call.
        results: of torch calls, weakly.
    """

    def __init__(self, duals: dict[int, Tensor], backend: str) -> None:
        super().__init__(every_call=True)
        self._duals = duals
        self._backend = backend
        self.seen: set[int] = set()
        self.results: list[weakref.ref[Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in AS_WRITTEN:
            return self._as_written(func, args, kwargs)
        if func in COMPOSITES and func not in RULES:  # one with a rule of its own is decomposed where that cannot serve
            with self:
                return COMPOSITES[func](*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _GIVES_PLACE and id(args[0]) in self._duals:
            return self._replace(func, args, kwargs or {})
        if not torch.is_grad_enabled():
            return self._constant(func, args, kwargs or {})
        if getattr(func, "__name__", "") == "__get__" and func.__self__.__name__ in _OWN_ATTRIBUTES:
            return func(*args)
        swapped: list[int] = []
        args = tuple([self._swap(a, swapped) for a in args])
        kwargs = {k: self._swap(v, swapped) for k, v in kwargs.items()} if kwargs else {}
        result = self._call(func, args, kwargs)
        found = tensors((result,))
        self.results += map(weakref.ref, found)
        if swapped and found:  # to read a shape or a dtype is not to use the parameter
            self.seen.update(swapped)
        return result

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rule = RULES.get(func)
        if rule is not None:
            result = rule(self._backend, *args, **kwargs)
            if result is not NotImplemented:
                self.functions.add(func.__name__)
                return result
        name = getattr(func, "__name__", "")
        self.functions.add(name)
        _refuse_scaled_gradients(func, args, kwargs)
        if transposes_disagree(func, args, kwargs):
            raise ForwardModeUnsupported(f"{name}: its tangent is not the transpose of its backward pass")
        if name in RECURRENT or name in _ATTENTION:
            announce(name, f"curveball_fused: {name}'s fused kernel has no forward-mode formula; a plain one is used.")
        with self._kernels(func, args, kwargs):
            return TWICE_DIFFERENTIABLE.get(func, func)(*args, **kwargs)

    def _constant(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Inside `no_grad`: no derivative in either mode."""
        if not forward_grad_enabled() and any(id(a) in self._duals for a in args):
            raise ForwardModeUnsupported("a custom autograd.Function uses a parameter inside its forward")
        with set_forward_grad_enabled(False):
            return func(*args, **kwargs)

    def _replace(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call what gives a parameter other memory, and the same to its dual number."""
        with torch.no_grad():
            result = func(*args, **kwargs)
            tangent = fwAD.unpack_dual(self._duals[id(args[0])]).tangent
        self._duals[id(args[0])] = fwAD.make_dual(args[0].detach(), tangent)
        return result

    def _swap(self, value: Any, swapped: list[int]) -> Any:
        if isinstance(value, Tensor):
            dual = self._duals.get(id(value))
            if dual is not None:
                swapped.append(id(value))
                return dual
            if value.requires_grad and base_of(value) is not None and id(base_of(value)) in self._duals:
                raise RuntimeError(
                    "model_fn uses a view of a parameter that was made outside of it, whose tangent is not known: make "
                    'the view inside model_fn, or construct CurveBall with curvature="double_backward".'
                )
            return value
        if type(value) in (list, tuple):
            return type(value)([self._swap(v, swapped) for v in value])
        return value


def _refuse_scaled_gradients(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    place = _SCALES_GRADIENT.get(func)
    if place is not None and kwargs.get("scale_grad_by_freq", args[place] if len(args) > place else False):
        raise ForwardModeUnsupported(
            f"{func.__name__} with scale_grad_by_freq=True, whose gradient is that of no function (leave it out)"
        )


def _has_dropout(args: Any, kwargs: dict[str, Any] | None) -> bool:
    """Return whether a positive float that may be a dropout probability is among the arguments of a fused layer."""
    named = [v for k, v in (kwargs or {}).items() if k.startswith("dropout")]
    return any(isinstance(v, float) and v > 0 for v in (*args, *named))


@contextmanager
def plain_recurrence(device_type: str) -> Iterator[None]:
    """Let recurrent layers run as what they are composed of, within the block."""
    switch = torch.backends.cudnn if device_type == "cuda" else torch.backends.mkldnn
    with switch.flags(enabled=False):
        yield


def force_eager() -> AbstractContextManager[Any]:
    """Run `torch.compile`d modules as written: compiled code has lost tangents silently in some versions of torch."""
    # Control-flow operators, which compile themselves, would fail; modes and `Replay` run those as written, too.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
