"""Which functions a model calls between its parameters and its outputs, and how each is followed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.overrides import resolve_name

from curveball_fused._torch_private import dual_level
from curveball_fused.curvature.rules import COMPOSITES, IN_PLACE, Call, tensors, without_override
from curveball_fused.curvature.tape import Tape, TapeUnsupported
from curveball_fused.curvature.torch_modes import Substitute

OWN, IN_PLACE_RULE, COMPOSITE, DUAL, REFUSED = "own rule", "in-place rule", "composite", "dual numbers", "refused"


@dataclass(frozen=True)
class Function:
    """A function that the model calls on the way from the parameters to the outputs.

    Attributes:
        name: torch's name of it; of the backward node for one that is no torch function.
        followed: by the linearized run: "own rule"; "in-place rule", an own rule for writing to an argument;
            "composite", which is followed by the functions that it calls; "dual numbers", torch's own forward mode; or
            "refused".
        reason: why it was refused; empty otherwise.
        lacks: what torch says where it cannot differentiate the function in forward mode; empty where it can, and where
            an own rule does.
        calls: how often it is called so.
    """

    name: str
    followed: str
    reason: str
    lacks: str
    calls: int


class Survey(Tape):
    """A taped run that notes what the tape does with each call and, where the tape refuses one, goes on.

    The tape that it leaves is of no use otherwise.
    """

    def __init__(self, params: Sequence[Tensor], backend: str) -> None:
        super().__init__(params, backend)
        self._calls: dict[tuple[str, str, str, str], int] = {}
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._lacks = ""

    def functions(self, outputs: Tensor) -> tuple[Function, ...]:
        """In the order of their first calls."""
        if outputs.requires_grad:
            self._place(outputs)  # which may be the result of something that the tape did not see
        return tuple(Function(*key, calls) for key, calls in self._calls.items())

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._arguments = args, kwargs or {}
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except TapeUnsupported as refusal:  # before the function was called
            self._note(_name(func), REFUSED, str(refusal))
            return self._adopted(func(*args, **(kwargs or {})))

    def _refuse(self, func: Any) -> None:
        self._lacks = _what_lacks(func, *self._arguments)  # before the function writes to its arguments
        super()._refuse(func)

    def _by_rule(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], call: Call) -> Any:
        lacks, result = self._lacks, super()._by_rule(func, args, kwargs, call)
        self._lacks = lacks
        if result is not NotImplemented:
            self._note(_name(func), IN_PLACE_RULE if func in IN_PLACE else OWN)
        elif COMPOSITES.get(func) or without_override(func):
            self._note(_name(func), COMPOSITE)
        return result

    def _by_dual_numbers(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor], call: Call
    ) -> Any:
        results: list[Any] = []

        def once(*args: Any, **kwargs: Any) -> Any:
            results.append(func(*args, **kwargs))
            return results[-1]

        once.__name__ = getattr(func, "__name__", "")
        try:
            result = super()._by_dual_numbers(once, args, kwargs, inputs, call)
        except TapeUnsupported as refusal:
            self._note(_name(func), REFUSED, str(refusal))
            return self._adopted(results[0] if results else func(*args, **kwargs))
        if any(id(t) in self._known for t in tensors((result,))):  # not a shape or a comparison
            self._note(_name(func), *((REFUSED, "no forward mode") if self._lacks else (DUAL,)))
        return result

    def _place(self, tensor: Tensor) -> int | None:
        try:
            return super()._place(tensor)
        except TapeUnsupported as refusal:
            self._lacks = ""
            self._note(str(tensor.grad_fn and tensor.grad_fn.name()), REFUSED, str(refusal))
            return super()._place(self._adopted(tensor))

    def _adopted(self, result: Any) -> Any:
        """`result` of a call that the tape refused, known to it from now on."""
        for tensor in tensors((result,)):
            self._add("", tensor, _no_map, Call({}, self._backend))
        return result

    def _note(self, name: str, followed: str, reason: str = "") -> None:
        key = (name, followed, reason, self._lacks)
        self._calls[key] = self._calls.get(key, 0) + 1


def _what_lacks(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why a call fails on dual numbers; empty where it does not. On copies, as the function may write to arguments."""

    def dual(value: Any) -> Any:
        if isinstance(value, Tensor):
            copy = value.detach().clone()
            return fwAD.make_dual(copy, torch.zeros_like(copy)) if value.requires_grad else copy
        if type(value) is dict:
            return {key: dual(v) for key, v in value.items()}
        return type(value)([dual(v) for v in value]) if type(value) in (list, tuple) else value

    substitute = Substitute({}, "auto")
    try:
        with torch.enable_grad(), dual_level(), substitute:
            func(*dual(args), **dual(kwargs))
    except Exception as error:  # whatever copies lead to is no news but for the one thing that is asked
        first_line = str(error).split("\n")[0]
        return first_line if isinstance(error, NotImplementedError) or "forward AD" in first_line else ""
    return ""


def _no_map(_: Any) -> Any:
    raise AssertionError("a survey has no tangents")


def _name(func: Any) -> str:
    return str(resolve_name(func) or getattr(func, "__name__", func))
