"""A tape of operators: it follows what autograd's engine, or a transform of torch.func, computes within the model.

`Tape` sees the torch functions that a model calls. A gradient that the model takes of its own results, as
physics-informed nets, forces, penalties on gradients and meta-learning do, is computed by autograd's engine, out of its
sight. What functions and engine come down to are operators, each of which is seen here: at a price in Python, and
without the fused tangents of whole functions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from curveball_fused._torch_private import (
    OperatorMode,
    OpOverload,
    base_of,
    has_saved_tensor_hooks,
    schema_of,
)

from .arguments import map_nested
from .call_maps import CallMaps
from .rules import COMPOSITES, Map, Tangents, tensors
from .rules.operators import LINEAR, RULES, OperatorContext, Part
from .tangent_maps import TangentMaps, TapeUnsupported
from .torch_modes import Decompose

# What changes gradients where only Jᵀu sees it, or computes those of the parameters.
UNFOLLOWED = frozenset((torch.Tensor.backward, torch.Tensor.register_hook))
aten = torch.ops.aten
_MOVES_STATISTICS = frozenset((aten.native_batch_norm.default, aten.cudnn_batch_norm.default))


class OperatorTape:
    """Record the maps of operators while the model runs, gradients enabled, within a `with` statement.

    A tensor is known by the node of autograd's graph whose result it is, whatever object it is: autograd makes new ones
    of what it has saved. What requires a gradient is a leaf, known, or refused. The tape keeps the nodes, and with them
    what they hold, until the step ends.

    Args:
        params: the parameters, whose tangents the maps begin with.

    Attributes:
        seen: ids of the parameters that reached an operator.
        functions: names of the operators that have a map.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.seen: set[int] = set()
        self.functions: set[str] = set()
        self._maps = TangentMaps(params)
        self._params = {id(p): slot for slot, p in enumerate(params)}
        self._nodes: dict[tuple[Any, int], int | None] = {}
        self._same: dict[tuple[Any, ...], list[int | None]] = {}
        self._last: _Call | None = None
        self._modes = ExitStack()

    def __enter__(self) -> Self:
        self._modes.enter_context(_Functions(every_call=True))
        self._modes.enter_context(_Operators(self))
        return self

    def __exit__(self, *exception: object) -> None:
        self._modes.close()

    def jvp(self, tangents: Sequence[Tensor], outputs: Tensor) -> Tensor:
        """Compute J v.

        Args:
            tangents: v, in the parameters' shapes and dtypes.
            outputs: what the taped run returned.

        Returns:
            J v, of the shape and dtype of `outputs`.

        Raises:
            TapeUnsupported: the tangent of the outputs is not known, or what a map reads has been written to.
        """
        self._settle()
        last = self._slot(outputs)
        if last is None:
            raise TapeUnsupported("outputs that do not depend on a parameter")
        return self._maps.jvp(tangents, last)

    def call(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the call of an operator, and note it where its results may depend on a parameter."""
        self._settle()
        inputs = [t for t in tensors((*args, *kwargs.values())) if t.requires_grad]
        # Detached is also what was saved, when autograd takes it up again: its node says which tensor it is.
        if not inputs or func is aten.detach.default or not torch.is_grad_enabled():
            if func is aten._efficientzerotensor.default:  # to add one is a copy, which autograd takes for a sum
                func = aten.zeros.default
            return func(*args, **kwargs)
        if _is_mutable(func):
            return self._call_in_place(func, args, kwargs, {id(t): self._slot(t) for t in inputs})
        result = func(*args, **kwargs)
        self._last = _Call(func, args, kwargs, inputs, {}, result)
        return result

    def _call_in_place(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], slots: dict[int, int | None]
    ) -> Any:
        """Make a call that writes to its first argument: the map is that of the operator that returns a new tensor."""
        if all(slot is None for slot in slots.values()):
            result = func(*args, **kwargs)
            self._last = _Call(func, args, kwargs, [], slots, result)
            return result
        copying = _out_of_place(func)
        if copying is None:
            raise TapeUnsupported(f"{func.name()} writes to its arguments")
        target = args[0]
        base = base_of(target)
        whole = None if base is None else _Whole(base, self._slot(base) if base.requires_grad else None, target)

        def before(value: Any) -> Any:
            if not isinstance(value, Tensor) or not _share_memory(value, target):
                return value
            copy = value.detach().clone()
            slots[id(copy)] = slots.get(id(value))
            return copy

        copies, named = map_nested(before, args), map_nested(before, kwargs)
        result = func(*args, **kwargs)
        self._last = _Call(copying, copies, named, [], slots, result, whole)
        return result

    def _slot(self, tensor: Tensor) -> int | None:
        """Return where the tangent of a tensor that requires a gradient stands; None for a constant."""
        if tensor.is_leaf:
            slot = self._params.get(id(tensor))
            if slot is not None:
                self.seen.add(id(tensor))
            return slot  # None for a parameter, or an input, that isn't ours
        node: Any = tensor.grad_fn
        key = node, tensor.output_nr
        if key not in self._nodes:
            base = base_of(tensor)
            if base is None or node.name() != "AsStridedBackward0" or node.next_functions[0][0] is not base.grad_fn:
                raise TapeUnsupported(f"a result of code that cannot be seen into ({node.name()})")
            self._nodes[key] = self._view_again(tensor, base)
        return self._nodes[key]

    def _view_again(self, view: Tensor, base: Tensor) -> int | None:
        """Return the slot of a view which autograd has made anew, as its base was written to."""
        at = self._slot(base)
        if at is None:
            return None
        part = Part(base, view.shape, view.stride(), int(view.storage_offset()))
        return self._maps.add("a view", lambda tangents: part.of(part.laid_out(tangents[at])), (at,), view)

    def _settle(self) -> None:
        """Record the last call, whose results are in autograd's graph by now, if they are to be."""
        call, self._last = self._last, None
        if call is None:
            return
        results = call.result if isinstance(call.result, (tuple, list)) else (call.result,)
        nodes = [t.grad_fn if isinstance(t, Tensor) else None for t in results]
        if all(node is None for node in nodes):
            return
        for tensor in call.inputs:
            call.slots[id(tensor)] = self._slot(tensor)
        key = call.key()
        slots = self._same.get(key) if key else None
        if slots is None:
            slots = self._record(call, results, nodes)
            if key:
                self._same[key] = slots
        for node, result, slot in zip(nodes, results, slots, strict=True):
            if node is not None:
                self._nodes[node, result.output_nr] = slot
        if call.whole is not None and slots[0] is not None:
            self._settle_whole(call.whole, slots[0])

    def _record(self, call: _Call, results: Sequence[Any], nodes: Sequence[Any]) -> list[int | None]:
        """Record the maps of a call; return the slots of its results."""
        if all(slot is None for slot in call.slots.values()):
            return [None] * len(results)
        self.functions.add(_name(call.func))
        return [
            None if node is None else self._maps.add(_name(call.func), tangent_map, call.slots.values(), result)
            for result, node, tangent_map in zip(results, nodes, self._maps_of(call), strict=True)
        ]

    def _settle_whole(self, whole: _Whole, written: int) -> None:
        """Record what has become of a tensor, by writing to a view of it."""
        base, at, view = whole
        part = Part(base, view.shape, view.stride(), int(view.storage_offset()))

        def tangent_map(tangents: Tangents) -> Tensor:
            tangent = part.laid_out(None if at is None else tangents[at])
            part.of(tangent).copy_(tangents[written])  # type: ignore[arg-type]
            return tangent

        self._nodes[base.grad_fn, base.output_nr] = self._maps.add(
            "a write to a view", tangent_map, (at, written), base
        )

    def _maps_of(self, call: _Call) -> Sequence[Map]:
        ctx = OperatorContext(call.slots, call.result)
        rule = RULES.get(call.func)
        maps: Any = NotImplemented
        # Other rules take derivatives for numbers, which complex ones need not have.
        if rule is not None and (
            call.func in LINEAR or not any(t.is_complex() for t in tensors((*call.args, call.result)))
        ):
            try:
                maps = rule(ctx, *call.args, **call.kwargs)
            except NotImplementedError as error:
                raise TapeUnsupported(f"{call.func.name()} {error}") from error
        if maps is NotImplemented:
            maps = _by_calling_again(call, ctx)
        self._maps.saved += ctx.saved
        return (maps,) if callable(maps) else maps


class _Functions(Decompose):
    """What is to be said of a torch function, before operators are seen."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in UNFOLLOWED:
            raise TapeUnsupported(f"{func.__name__} inside the model")
        if has_saved_tensor_hooks() and torch.is_grad_enabled():
            raise TapeUnsupported("gradient checkpointing, or other hooks on saved tensors")
        composite = COMPOSITES.get(func)
        if composite is not None:
            return composite(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


class _Operators(OperatorMode):
    """Hand operators to the tape."""

    def __init__(self, tape: OperatorTape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tape = tape

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._tape.call(func, args, kwargs or {})


class _Whole(NamedTuple):
    """A tensor that is about to be written to by way of a view: where its tangent stands before that; the view."""

    base: Tensor
    slot: int | None
    view: Tensor


class _Call(NamedTuple):
    """A call that has been made: what it was given, where the tangents of that stand, and what it returned."""

    func: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Tensor]
    slots: dict[int, int | None]
    result: Any
    whole: _Whole | None = None

    def key(self) -> tuple[Any, ...] | None:
        """Return what other calls have in common that compute the same; None where that is not known.

        A second derivative is taken along each coordinate, and much of it is the same for all.
        """
        if self.kwargs or _is_random(self.func) or any(type(a) in (list, tuple) and tensors(a) for a in self.args):
            return None
        places = [self.slots.get(id(a)) if isinstance(a, Tensor) else repr(a) for a in self.args]
        return None if None in places else (self.func, *places)


def _by_calling_again(call: _Call, ctx: OperatorContext) -> Sequence[Map]:
    """Return the maps of an operator without a rule: they run it again."""
    func, args = call.func, call.args
    if _is_random(func):
        raise TapeUnsupported(f"{func.name()} draws random numbers")
    if func in _MOVES_STATISTICS and args[5]:
        args = (*args[:3], None, None, *args[5:])  # which the call has moved, once
    maps = CallMaps(func, args, call.kwargs, ctx)
    return [maps.map_of(None)] if isinstance(call.result, Tensor) else [*map(maps.map_of, range(len(call.result)))]


@functools.cache
def _is_random(func: OpOverload) -> bool:
    """Return whether an operator draws random numbers."""
    return torch.Tag.nondeterministic_seeded in func.tags


@functools.cache
def _name(func: OpOverload) -> str:
    return str(func.name())


@functools.cache
def _is_mutable(func: OpOverload) -> bool:
    """Return whether an operator writes to an argument."""
    return bool(schema_of(func).is_mutable)


def _out_of_place(func: OpOverload) -> OpOverload | None:
    """Return the operator that does the same without writing to its first argument; None where there is none."""
    written = [a.alias_info is not None and a.alias_info.is_write for a in schema_of(func).arguments]
    if func is aten.transpose_.default:
        return aten.transpose.int
    name, overload = schema_of(func).name.split("::")[1], schema_of(func).overload_name or "default"
    if not written[0] or any(written[1:]) or not name.endswith("_"):
        return None
    return getattr(getattr(aten, name[:-1], None), overload, None)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
