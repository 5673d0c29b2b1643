"""Which functions a model calls between its parameters and its outputs, and how the tape handles each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.overrides import resolve_name

from curveball_fused._torch_private import dual_level
from curveball_fused.curvature import ModelFn, checked_outputs
from curveball_fused.curvature.arguments import map_nested
from curveball_fused.curvature.tape import Tape
from curveball_fused.curvature.torch_modes import Substitute, first_line

REFUSED = "refused"


@dataclass(frozen=True)
class Function:
    """A function that the model calls on the way from the parameters to the outputs.

    Attributes:
        name: torch's name of it; of the backward node for one that is no torch function.
        handled_by: what the linearized run follows it by: "own rule"; "in-place rule", an own rule for writing to an
            argument; "composite", the functions that it calls; "dual numbers", torch's own forward mode; "double
            backward", its own backward pass, differentiated; or "refused".
        reason: why it was refused; empty otherwise.
        lacks: what torch says where it cannot differentiate the function in forward mode; empty where it can, and where
            an own rule does.
        calls: how often it is called so.
    """

    name: str
    handled_by: str
    reason: str
    lacks: str
    calls: int


def trace(model_fn: ModelFn, params: Sequence[Tensor]) -> tuple[Tensor, tuple[Function, ...]]:
    """Run a model once, as "linearize" does, and go on where that would refuse a call.

    Args:
        model_fn: called without arguments, returns the predictions.
        params: the parameters that are optimized.

    Returns:
        The outputs, with autograd's graph; the functions in the order of their first calls.
    """
    report = TraceReport()
    tape = Tape(params, "auto", report)
    with torch.enable_grad(), tape:
        outputs = checked_outputs(model_fn())
    if outputs.requires_grad:
        tape.tangent_index(outputs)  # they may be the result of something that the tape did not see
    return outputs, report.functions()


class TraceReport:
    """The observer of a tape that counts the calls, by function and by how they are handled."""

    def __init__(self) -> None:
        self._calls: dict[tuple[str, str, str, str], int] = {}
        self._lacks = ""  # why the call that the tape is at fails on dual numbers

    def functions(self) -> tuple[Function, ...]:
        """Return the functions in the order of their first calls."""
        return tuple(Function(*key, calls) for key, calls in self._calls.items())

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Try the call on dual numbers, before the function writes to its arguments."""
        self._lacks = _what_lacks(func, args, kwargs)

    def on_handled(self, func: Any, by: str) -> None:
        """Count a call that the tape follows."""
        self._count(_name(func), by, "", self._lacks)

    def on_refused(self, func: Any, reason: str) -> None:
        """Count a call that the tape cannot follow."""
        self._count(_name(func), REFUSED, reason, self._lacks)

    def on_unknown(self, tensor: Tensor, reason: str) -> None:
        """Count what is no torch function by the name of its backward node."""
        self._count(str(tensor.grad_fn and tensor.grad_fn.name()), REFUSED, reason, "")

    def _count(self, name: str, handled_by: str, reason: str, lacks: str) -> None:
        key = (name, handled_by, reason, lacks)
        self._calls[key] = self._calls.get(key, 0) + 1


def _what_lacks(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return why a call fails on dual numbers, or "". On copies, as the function may write to its arguments."""

    def dual(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        copy = value.detach().clone()
        return fwAD.make_dual(copy, torch.zeros_like(copy)) if value.requires_grad else copy

    substitute = Substitute({}, "auto")
    try:
        with torch.enable_grad(), dual_level(), substitute:
            func(*map_nested(dual, args), **map_nested(dual, kwargs))
    except Exception as error:  # whatever copies lead to is no news but for the one thing that is asked
        reason = first_line(error)
        return reason if isinstance(error, NotImplementedError) or "forward AD" in reason else ""
    return ""


def _name(func: Any) -> str:
    return str(resolve_name(func) or getattr(func, "__name__", func))
