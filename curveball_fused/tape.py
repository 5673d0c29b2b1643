"""A linearised run: the model runs once, as in training, and leaves a tape of tangent maps beside autograd's graph.

Jᵀu is autograd's backward pass through that graph. Jv goes through the tape: each call on the way from the parameters
to the outputs has left a map from the tangents of its arguments to that of its result, which reads what the call has
computed instead of computing it again. So a step costs one forward pass, one backward pass, and for each Jv the linear
part alone: 7 forward-equivalents of multiply-adds, against 9 with dual numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from .modes import Decompose
from .tape_rules import RULES, Map, Places, Tangents

_MOVES_STATISTICS = frozenset(("batch_norm", "instance_norm"))


class Untaped(Exception):
    """The model does what the tape cannot follow; other ways can."""


class Tape(Decompose):
    """Records the maps while the model runs, gradients enabled.

    A tensor is known by its identity and version: one that was written to, by whatever call, is not the one that the
    tape knows. What depends on a parameter requires a gradient, so that nothing can slip past the tape.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__(every_call=False)
        self._tensors: list[Tensor] = list(params)  # by place; also keeps the identities from being used again
        self._known = {id(p): (place, p._version) for place, p in enumerate(params)}
        self._constant: dict[int, Tensor] = {}  # requires a gradient, but of parameters that are none of ours
        self._maps: list[tuple[Map, list[int]]] = []  # and the places that the map reads
        self._inputs: list[tuple[Tensor, int]] = []  # what maps read, with its version
        self._parameters = len(params)
        self.seen: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = list(_tensors((args, list(kwargs.values()))))
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in inputs):
            return func(*args, **kwargs)
        places: Places = {id(t): self._place(t) for t in inputs}
        if all(place is None for place in places.values()):
            result = func(*args, **kwargs)
            self._constant |= {id(t): t for t in _tensors((result,)) if t.requires_grad}
            return result
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise Untaped("autocast")
        if torch._C._are_functorch_transforms_active():
            raise Untaped("a transform of torch.func")
        recorded = RULES[func](places, *args, **kwargs) if func in RULES else NotImplemented
        if recorded is NotImplemented:
            return self._by_dual_numbers(func, args, kwargs, inputs, places)
        result, tangent_map = recorded
        self._inputs += [(t, t._version) for t in inputs if t is not result]
        self._add(result, tangent_map, places)
        return result

    def jvp(self, tangents: Sequence[Tensor], outputs: Tensor) -> Tensor:
        """J v, of the shape of `outputs`, which the taped run returned.

        Raises:
            Untaped: the outputs, or what a map reads, is not what it was when the tape saw it.
        """
        if any(t._version != version for t, version in self._inputs):
            raise Untaped("a tensor that was written to after it was used")
        last = self._place(outputs)
        if last is None:
            raise Untaped("outputs that do not depend on a parameter")
        last_use = {place: index for index, (_, reads) in enumerate(self._maps) for place in reads}
        values: Tangents = [*tangents, *[None] * len(self._maps)]
        with torch.no_grad():
            for index, (tangent_map, reads) in enumerate(self._maps[: last + 1 - self._parameters]):
                values[self._parameters + index] = tangent_map(values)
                for place in reads:  # a tangent that nobody reads any more makes room
                    if last_use[place] == index and place != last:
                        values[place] = None
        tangent = values[last]
        assert tangent is not None
        return tangent

    def _place(self, tensor: Tensor) -> int | None:
        """Where the tangent of a tensor stands; None for a constant."""
        known = self._known.get(id(tensor))
        if known is not None:
            if known[1] != tensor._version:
                raise Untaped("a tensor that was written to")
            if known[0] < self._parameters:
                self.seen.add(id(tensor))
            return known[0]
        if tensor.requires_grad and not tensor.is_leaf and id(tensor) not in self._constant:
            raise Untaped("a result of code that torch functions cannot see into")
        return None

    def _add(self, result: Tensor, tangent_map: Map, places: Places) -> None:
        self._known[id(result)] = (len(self._tensors), result._version)
        self._tensors.append(result)
        self._maps.append((tangent_map, [place for place in places.values() if place is not None]))

    def _by_dual_numbers(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor], places: Places
    ) -> Any:
        """For a function without a rule: its map runs it again, on dual numbers."""
        name = getattr(func, "__name__", "")
        if name in _MOVES_STATISTICS and kwargs.get("running_mean", args[1] if len(args) > 1 else None) is not None:
            raise Untaped(f"{name} with running statistics, on this device or without weights")
        versions, generators = [t._version for t in inputs], _generator_states(inputs[0].device)
        with self._kernels(func, args, kwargs):
            result = func(*args, **kwargs)
        if versions != [t._version for t in inputs]:
            raise Untaped(f"{name} writes to its argument")
        results = [t for t in _tensors((result,)) if t.requires_grad]
        if not results or all(any(t is known for known in inputs) for t in results):
            return result  # a shape, a comparison; or the argument itself
        if not all(map(torch.equal, generators, _generator_states(inputs[0].device))):
            raise Untaped(f"{name} draws random numbers")
        if not isinstance(result, Tensor) and not isinstance(result, (tuple, list)):
            raise Untaped(f"{name} returns {type(result).__name__}")
        self._inputs += zip(inputs, versions, strict=True)
        for index, one in enumerate((result,) if isinstance(result, Tensor) else result):
            if isinstance(one, Tensor) and one.requires_grad:
                pick = None if isinstance(result, Tensor) else index
                self._add(one, _dual_map(func, args, kwargs, places, pick), places)
        return result


def _dual_map(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], places: Places, pick: int | None) -> Map:
    """ẏ = ∂f ẋ, by torch's own forward mode."""

    def tangent_map(tangents: Tangents) -> Tensor:
        def dual(value: Any) -> Any:
            if isinstance(value, Tensor):
                place = places[id(value)]
                return value.detach() if place is None else fwAD.make_dual(value.detach(), tangents[place])
            return type(value)([dual(v) for v in value]) if type(value) in (list, tuple) else value

        with fwAD.dual_level(), Decompose(every_call=True):
            try:
                result = func(*dual(args), **{key: dual(value) for key, value in kwargs.items()})
            except (NotImplementedError, RuntimeError) as error:
                raise Untaped(f"{getattr(func, '__name__', func)}: {str(error).splitlines()[0]}") from error
            primal, tangent = fwAD.unpack_dual(result if pick is None else result[pick])
            return torch.zeros_like(primal) if tangent is None else tangent

    return tangent_map


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
