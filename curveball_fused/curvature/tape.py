"""A linearized run: the model runs once, as in training, and leaves a tape of tangent maps beside autograd's graph.

Jᵀu is autograd's backward pass through that graph. Jv goes through the tape: each call on the way from the parameters
to the outputs has left a map from the tangents of its arguments to that of its result, which reads what the call has
computed instead of computing it again. So a step costs one forward pass, one backward pass, and for each Jv the linear
part alone: 7 forward-equivalents of multiply-adds, against 9 with dual numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from curveball_fused._torch_private import (
    has_saved_tensor_hooks,
    in_dual_level,
    in_functorch_transform,
    version_of,
)
from curveball_fused.replay.control_flow import AS_WRITTEN
from curveball_fused.replay.generators import positions

from .call_maps import DUAL_NUMBERS, CallMaps
from .rules import COMPOSITES, IN_PLACE, RULES, Map, RuleContext, Tangents, tensors, without_override
from .tangent_maps import TangentMaps, TapeUnsupported
from .torch_modes import Decompose, first_line

_MOVES_STATISTICS = frozenset(("batch_norm", "instance_norm"))
# What is read off a tensor without being computed from its elements.
_READS = frozenset("__get__ size dim stride numel is_contiguous is_floating_point __len__ get_device".split())
# What computes gradients out of the tape's sight, or changes them where only Jᵀu sees it.
_OUT_OF_SIGHT = frozenset((torch.autograd.grad, torch.Tensor.backward, torch.Tensor.register_hook))


# How the tape handles a call; a call without a rule is followed as `CallMaps` says.
OWN_RULE, IN_PLACE_RULE, COMPOSITE = "own rule", "in-place rule", "composite"


class Observer(Protocol):
    """An observer of what a tape does with each call on the way from the parameters to the outputs.

    Where there is one, the tape goes on after a call that it cannot follow; `TapeUnsupported` is raised by a
    Jacobian-vector product only.
    """

    def on_call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See a call before it is made, and before anything else is said of it."""

    def on_handled(self, func: Any, by: str) -> None:
        """See how the call is handled; of a composite, before the calls that it is composed of."""

    def on_refused(self, func: Any, reason: str) -> None:
        """See why the call cannot be followed."""

    def on_unknown(self, tensor: Tensor, reason: str) -> None:
        """See an argument, or outputs, whose tangent is not known, and why."""


class Tape(Decompose):
    """Record the maps while the model runs, gradients enabled.

    A tensor is known by its identity and version: one that was written to, by whatever call, is not the one that the
    tape knows. What depends on a parameter requires a gradient, so that nothing can slip past the tape. The tape keeps
    alive what the maps read, which is what autograd's graph holds too, and, of recurrent layers, their gates.

    Args:
        params: the parameters, whose tangents the maps begin with.
        backend: whose tangent operators the rules may use.
        observer: sees what the tape does, and lets it go on where it would refuse.

    Attributes:
        seen: ids of the parameters that reached a torch call.
    """

    def __init__(self, params: Sequence[Tensor], backend: str, observer: Observer | None = None) -> None:
        super().__init__(every_call=False)
        self._backend = backend
        self._observer = observer
        self._known = {id(p): (weakref.ref(p), slot, version_of(p)) for slot, p in enumerate(params)}
        # What requires a gradient, but of parameters that aren't ours.
        self._constant: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._maps = TangentMaps(params)
        self.seen: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in AS_WRITTEN:
            return self._as_written(func, args, kwargs)
        if not torch.is_grad_enabled() or (getattr(func, "__name__", "") in _READS and func not in RULES):
            return func(*args, **kwargs)
        inputs = tensors((args, list(kwargs.values())))
        if not any(t.requires_grad for t in inputs):
            return func(*args, **kwargs)
        if func is torch.autograd.grad and not _creates_graph(*args, **kwargs):
            return func(*args, **kwargs)  # a constant, to autograd too
        if in_functorch_transform():  # its tensors stand for others, which are parameters perhaps
            return self._refuse(func, "a transform of torch.func", partial(func, *args, **kwargs))
        ctx = RuleContext({id(t): self.tangent_index(t) for t in inputs}, self._backend)
        if not any(slot is not None for slot in ctx.slots.values()):
            result = func(*args, **kwargs)
            self._constant |= {id(t): (weakref.ref(t), version_of(t)) for t in tensors((result,)) if t.requires_grad}
            return result
        if self._observer is not None:
            self._observer.on_call(func, args, kwargs)
        reason = _refusal(func)
        if reason:
            return self._refuse(func, reason, partial(func, *args, **kwargs))
        # Rules take derivatives for numbers, which complex ones need not have.
        real = not any(t.dtype.is_complex for t in inputs)
        result = self._by_rule(func, args, kwargs, ctx) if real else NotImplemented
        if result is not NotImplemented:
            return result
        inside = COMPOSITES.get(func) or without_override(func)
        if inside is not None:
            if self._observer is not None:
                self._observer.on_handled(func, COMPOSITE)
            with self:
                return inside(*args, **kwargs)
        return self._by_calling_again(func, args, kwargs, inputs, ctx)

    def jvp(self, tangents: Sequence[Tensor], outputs: Tensor) -> Tensor:
        """Compute J v.

        Args:
            tangents: v, in the parameters' shapes and dtypes.
            outputs: what the taped run returned.

        Returns:
            J v, of the shape and dtype of `outputs`.

        Raises:
            TapeUnsupported: the outputs, or what a map reads, is not what it was when the tape saw it.
        """
        last = self.tangent_index(outputs)
        if last is None:
            raise TapeUnsupported("outputs that do not depend on a parameter")
        return self._maps.jvp(tangents, last)

    def tangent_index(self, tensor: Tensor) -> int | None:
        """Return where the tangent of a tensor stands; None for a constant.

        `TapeUnsupported` is raised for one that depends on a parameter by what the tape has not seen.
        """
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor:
            if known[1] < self._maps.parameters:  # of which a write leaves other weights, and the same tangent
                self.seen.add(id(tensor))
            elif known[2] != version_of(tensor):
                return self._unknown(tensor, "a tensor that was written to")
            return known[1]
        if tensor.requires_grad and not tensor.is_leaf:
            constant = self._constant.get(id(tensor))
            if constant is None or constant[0]() is not tensor:
                return self._unknown(tensor, "a result of code that torch functions cannot see into")
            if constant[1] != version_of(tensor):
                return self._unknown(tensor, "a tensor that was written to")
        return None

    def _unknown(self, tensor: Tensor, reason: str) -> int:
        """Refuse a tensor; where there is an observer, return its slot, as it is known from now on."""
        if tensor.grad_fn is not None and tensor.grad_fn.name() == "CheckpointFunctionBackward":
            reason = "gradient checkpointing with use_reentrant=True"
        if self._observer is None:
            raise TapeUnsupported(reason)
        self._observer.on_unknown(tensor, reason)
        self._adopt(tensor, reason)
        return self._known[id(tensor)][1]

    def _refuse(self, func: Any, reason: str, go_on: Callable[[], Any]) -> Any:
        """Refuse a call; where there is an observer, return its result, which is known from now on."""
        if self._observer is None:
            raise TapeUnsupported(reason)
        self._observer.on_refused(func, reason)
        result = go_on()
        self._adopt(result, reason)
        return result

    def _adopt(self, result: Any, reason: str) -> None:
        """Take tensors for known although their tangents are not."""

        def no_map(_: Tangents) -> Tensor:
            raise TapeUnsupported(reason)

        for tensor in tensors((result,)):
            self._add("", tensor, no_map, RuleContext({}, self._backend))

    def _by_rule(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], ctx: RuleContext) -> Any:
        rule = RULES.get(func) or IN_PLACE.get(func)
        if rule is None:
            return NotImplemented
        try:
            recorded = rule(ctx, *args, **kwargs)
        except TypeError:  # arguments that the rule does not know, or wrong ones, which the function itself will refuse
            return NotImplemented
        if recorded is NotImplemented:
            return NotImplemented
        result, maps = recorded
        self._maps.saved += ctx.saved
        if isinstance(result, Tensor):
            self._add(_name(func), result, maps, ctx)
        else:
            for one, tangent_map in zip(result, maps, strict=True):
                self._add(_name(func), one, tangent_map, ctx)
        if self._observer is not None:
            self._observer.on_handled(func, IN_PLACE_RULE if func in IN_PLACE else OWN_RULE)
        return None if func is torch.Tensor.__setitem__ else result

    def _add(self, name: str, result: Tensor, tangent_map: Map, ctx: RuleContext) -> None:
        if result.requires_grad:
            if torch.is_autocast_enabled(self._maps.device_type):
                tangent_map = _under_autocast(tangent_map, self._maps.device_type)
            slot = self._maps.add(name, tangent_map, ctx.slots.values(), result)
            self._known[id(result)] = (weakref.ref(result), slot, version_of(result))
            self.functions.add(name)

    def _by_calling_again(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor], ctx: RuleContext
    ) -> Any:
        """Follow a function without a rule: its map runs it again."""
        name = _name(func)
        if name in _MOVES_STATISTICS and kwargs.get("running_mean", args[1] if len(args) > 1 else None) is not None:
            reason = f"{name} with running statistics, in mixed precision or over instances"
            return self._refuse(func, reason, partial(func, *args, **kwargs))
        versions, drawn = [version_of(t) for t in inputs], positions(inputs[0].device)
        with self._kernels(func, args, kwargs):
            result = func(*args, **kwargs)
        if versions != [version_of(t) for t in inputs]:
            return self._refuse(func, f"{name} writes to its argument", lambda: result)
        results = [t for t in tensors((result,)) if t.requires_grad]
        if not results:
            return result  # a shape, a comparison
        if not all(any(t is known for known in inputs) for t in results):
            if drawn != positions(inputs[0].device):
                return self._refuse(func, f"{name} draws random numbers", lambda: result)
            if not isinstance(result, (Tensor, tuple, list)):
                return self._refuse(func, f"{name} returns {type(result).__name__}", lambda: result)
            call = CallMaps(func, args, kwargs, ctx)
            self._maps.saved += ctx.saved
            for index, one in enumerate((result,) if isinstance(result, Tensor) else result):
                if isinstance(one, Tensor):
                    self._add(name, one, call.map_of(None if isinstance(result, Tensor) else index), ctx)
            if self._observer is not None:
                _report(self._observer, func, call, result)
        elif self._observer is not None:
            self._observer.on_handled(func, DUAL_NUMBERS)
        return result


def _report(observer: Observer, func: Any, call: CallMaps, result: Any) -> None:
    """Tell an observer by what a call without a rule is followed, which is found out by products with zero."""
    try:
        with torch.no_grad():
            call.try_maps(result)
    except (RuntimeError, TypeError, ValueError) as error:
        observer.on_refused(func, first_line(error))
    else:
        observer.on_handled(func, call.followed_by)


def _refusal(func: Any) -> str:
    """Return why a function cannot be called within the model, or an empty string."""
    if in_dual_level():
        return "forward mode inside the model"
    if has_saved_tensor_hooks():
        return "gradient checkpointing, or other hooks on saved tensors"
    return f"{func.__name__} inside the model" if func in _OUT_OF_SIGHT else ""


def _creates_graph(
    outputs: Any, inputs: Any, grad_outputs: Any = None, retain_graph: Any = None, create_graph: bool = False, **_: Any
) -> bool:
    """Return whether a call of `torch.autograd.grad` makes gradients that can be differentiated."""
    return create_graph


def _under_autocast(tangent_map: Map, device_type: str) -> Map:
    """Return the map in the precision that autocast, as it is now, chooses for its function."""
    lower = torch.get_autocast_dtype(device_type)

    def tangent_map_under_autocast(tangents: Tangents) -> Tensor:
        with torch.autocast(device_type, lower):
            return tangent_map(tangents)

    return tangent_map_under_autocast


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))
