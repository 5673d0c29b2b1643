"""A linearized run: the model runs once, as in training, and leaves a tape of tangent maps beside autograd's graph.

Jᵀu is autograd's backward pass through that graph. Jv goes through the tape: each call on the way from the parameters
to the outputs has left a map from the tangents of its arguments to that of its result, which reads what the call has
computed instead of computing it again. So a step costs one forward pass, one backward pass, and for each Jv the linear
part alone: 7 forward-equivalents of multiply-adds, against 9 with dual numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from curveball_fused._torch_private import dual_level, has_saved_tensor_hooks, in_functorch_transform, version_of
from curveball_fused.replay.generators import positions

from .rules import COMPOSITES, IN_PLACE, RULES, Call, Map, Tangents, frozen, tensors, without_override
from .torch_modes import Decompose

_MOVES_STATISTICS = frozenset(("batch_norm", "instance_norm"))
# What is read off a tensor without being computed from its elements.
_READS = frozenset("__get__ size dim stride numel is_contiguous is_floating_point __len__ get_device".split())
_DIFFERENTIATES = frozenset((torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward))


class TapeUnsupported(Exception):
    """The model does what the tape cannot follow; other ways can."""


class Tape(Decompose):
    """Records the maps while the model runs, gradients enabled.

    A tensor is known by its identity and version: one that was written to, by whatever call, is not the one that the
    tape knows. What depends on a parameter requires a gradient, so that nothing can slip past the tape. The tape keeps
    alive what the maps read, which is what autograd's graph holds too, and nothing else.
    """

    def __init__(self, params: Sequence[Tensor], backend: str) -> None:
        super().__init__(every_call=False)
        self._backend = backend
        self._known = {id(p): (weakref.ref(p), place, version_of(p)) for place, p in enumerate(params)}
        self._constant: dict[
            int, tuple[weakref.ref[Tensor], int]
        ] = {}  # requires a gradient, but of parameters that aren't ours
        self._maps: list[_Entry] = []
        self._kept: list[tuple[Tensor, int]] = []
        self._parameters = len(params)
        self._device_type = params[0].device.type
        self.seen: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() or (getattr(func, "__name__", "") in _READS and func not in RULES):
            return func(*args, **kwargs)
        inputs = tensors((args, list(kwargs.values())))
        if not any(t.requires_grad for t in inputs):
            return func(*args, **kwargs)
        call = Call({id(t): self._place(t) for t in inputs}, self._backend)
        if not any(place is not None for place in call.places.values()):
            result = func(*args, **kwargs)
            self._constant |= {id(t): (weakref.ref(t), version_of(t)) for t in tensors((result,)) if t.requires_grad}
            return result
        self._refuse(func)
        # Rules take derivatives for numbers, which complex ones need not have.
        real = not any(t.dtype.is_complex for t in inputs)
        result = self._by_rule(func, args, kwargs, call) if real else NotImplemented
        if result is not NotImplemented:
            return result
        inside = COMPOSITES.get(func) or without_override(func)
        if inside is not None:
            with self:
                return inside(*args, **kwargs)
        return self._by_dual_numbers(func, args, kwargs, inputs, call)

    def jvp(self, tangents: Sequence[Tensor], outputs: Tensor) -> Tensor:
        """J v, of the shape of `outputs`, which the taped run returned.

        Raises:
            TapeUnsupported: the outputs, or what a map reads, is not what it was when the tape saw it.
        """
        if any(version_of(t) != version for t, version in self._kept):
            raise TapeUnsupported("a tensor that was written to after it was used")
        last = self._place(outputs)
        if last is None:
            raise TapeUnsupported("outputs that do not depend on a parameter")
        values: Tangents = [*tangents, *[None] * len(self._maps)]
        with torch.no_grad(), torch.autocast(self._device_type, enabled=False):
            for place, entry, spent in self._order(last):
                values[place] = entry.tangent(values)
                for read in spent:  # a tangent that nobody reads any more makes room
                    values[read] = None
        tangent = values[last]
        assert tangent is not None
        return tangent

    def _order(self, last: int) -> list[tuple[int, _Entry, list[int]]]:
        """What leads to the place `last`: places, their entries, and the places that are not read after them."""
        needed, order = {last}, []
        for place in range(last, self._parameters - 1, -1):
            if place in needed:
                entry = self._maps[place - self._parameters]
                spent = [read for read in entry.reads if read not in needed]
                needed.update(entry.reads)
                order.append((place, entry, spent))
        return order[::-1]

    def _place(self, tensor: Tensor) -> int | None:
        """Where the tangent of a tensor stands; None for a constant."""
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor:
            if known[2] != version_of(tensor):
                raise TapeUnsupported("a tensor that was written to")
            if known[1] < self._parameters:
                self.seen.add(id(tensor))
            return known[1]
        if tensor.requires_grad and not tensor.is_leaf:
            constant = self._constant.get(id(tensor))
            if constant is None or constant[0]() is not tensor:
                raise TapeUnsupported("a result of code that torch functions cannot see into")
            if constant[1] != version_of(tensor):
                raise TapeUnsupported("a tensor that was written to")
        return None

    def _refuse(self, func: Any) -> None:
        if in_functorch_transform():
            raise TapeUnsupported("a transform of torch.func")
        if has_saved_tensor_hooks():
            raise TapeUnsupported("gradient checkpointing, or other hooks on saved tensors")
        if func in _DIFFERENTIATES:
            raise TapeUnsupported(f"{func.__name__} inside the model")

    def _by_rule(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], call: Call) -> Any:
        rule = RULES.get(func) or IN_PLACE.get(func)
        if rule is None:
            return NotImplemented
        try:
            recorded = rule(call, *args, **kwargs)
        except TypeError:  # arguments that the rule does not know, or wrong ones, which the function itself will tell
            return NotImplemented
        if recorded is NotImplemented:
            return NotImplemented
        result, maps = recorded
        self._kept += call.kept
        if isinstance(result, Tensor):
            self._add(_name(func), result, maps, call)
        else:
            for one, tangent_map in zip(result, maps, strict=True):
                self._add(_name(func), one, tangent_map, call)
        return None if func is torch.Tensor.__setitem__ else result

    def _add(self, name: str, result: Tensor, tangent_map: Map, call: Call) -> None:
        if result.requires_grad:
            if torch.is_autocast_enabled(self._device_type):
                tangent_map = _under_autocast(tangent_map, self._device_type)
            reads = list({place for place in call.places.values() if place is not None})
            self._known[id(result)] = (weakref.ref(result), self._parameters + len(self._maps), version_of(result))
            self._maps.append(_Entry(name, tangent_map, reads, result.shape, result.dtype))

    def _by_dual_numbers(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor], call: Call
    ) -> Any:
        """For a function without a rule: its map runs it again, on dual numbers."""
        name = _name(func)
        if name in _MOVES_STATISTICS and kwargs.get("running_mean", args[1] if len(args) > 1 else None) is not None:
            raise TapeUnsupported(f"{name} with running statistics, in mixed precision or over instances")
        versions, drawn = [version_of(t) for t in inputs], positions(inputs[0].device)
        with self._kernels(func, args, kwargs):
            result = func(*args, **kwargs)
        if versions != [version_of(t) for t in inputs]:
            raise TapeUnsupported(f"{name} writes to its argument")
        results = [t for t in tensors((result,)) if t.requires_grad]
        if not results or all(any(t is known for known in inputs) for t in results):
            return result  # a shape, a comparison; or the argument itself
        if drawn != positions(inputs[0].device):
            raise TapeUnsupported(f"{name} draws random numbers")
        if not isinstance(result, Tensor) and not isinstance(result, (tuple, list)):
            raise TapeUnsupported(f"{name} returns {type(result).__name__}")
        dual = _DualMaps(func, args, kwargs, call)
        self._kept += call.kept
        for index, one in enumerate((result,) if isinstance(result, Tensor) else result):
            if isinstance(one, Tensor):
                self._add(name, one, dual.map_of(None if isinstance(result, Tensor) else index), call)
        return result


class _Entry(NamedTuple):
    """How one tangent comes about: the name of the function, the map, the places that it reads; shape and dtype."""

    name: str
    map: Map
    reads: list[int]
    shape: torch.Size
    dtype: torch.dtype

    def tangent(self, tangents: Tangents) -> Tensor:
        """What the map gives, in the dtype of the result."""
        try:
            tangent = self.map(tangents)
        except torch.OutOfMemoryError:
            raise
        except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise TapeUnsupported(f"{self.name}: {_first_line(error)}") from error
        if tangent.shape != self.shape:
            raise TapeUnsupported(f"{self.name}: its tangent has another shape")
        return tangent if tangent.dtype == self.dtype else tangent.to(self.dtype)


def _under_autocast(tangent_map: Map, device_type: str) -> Map:
    """The map, in the precision that autocast, as it is now, chooses for its function."""
    lower = torch.get_autocast_dtype(device_type)

    def tangent_map_under_autocast(tangents: Tangents) -> Tensor:
        with torch.autocast(device_type, lower):
            return tangent_map(tangents)

    return tangent_map_under_autocast


class _DualMaps:
    """ẏ = ∂f ẋ, by torch's own forward mode."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], call: Call) -> None:
        self._func = func
        self._places: dict[int, int | None] = {}  # by the identities of the kept tensors
        self._args, self._kwargs = self._kept(args, call), self._kept(kwargs, call)

    def map_of(self, index: int | None) -> Map:
        """The map of the result, or of one of several."""

        def tangent_map(tangents: Tangents) -> Tensor:
            with dual_level(), Decompose(every_call=True):
                result = self._func(*self._dual(self._args, tangents), **self._dual(self._kwargs, tangents))
                primal, tangent = fwAD.unpack_dual(result if index is None else result[index])
                return torch.zeros_like(primal) if tangent is None else tangent

        return tangent_map

    def _kept(self, value: Any, call: Call) -> Any:
        if isinstance(value, Tensor):
            kept = call.keep(value)
            self._places[id(kept)] = call.at(value)
            return kept
        if type(value) is dict:
            return {key: self._kept(v, call) for key, v in value.items()}
        return type(value)([self._kept(v, call) for v in value]) if type(value) in (list, tuple) else frozen(value)

    def _dual(self, value: Any, tangents: Tangents) -> Any:
        if isinstance(value, Tensor):
            place = self._places[id(value)]
            return value if place is None else fwAD.make_dual(value, tangents[place])
        if type(value) is dict:
            return {key: self._dual(v, tangents) for key, v in value.items()}
        return type(value)([self._dual(v, tangents) for v in value]) if type(value) in (list, tuple) else value


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0]
