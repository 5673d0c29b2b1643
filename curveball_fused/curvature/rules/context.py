"""What a rule is given and what it returns.

A rule is given a `RuleContext` and the arguments of the function that it stands for, which are ordinary tensors that
autograd follows. It returns the result and the map from all tangents to the result's, which reads only what
`RuleContext.save` has returned; or `NotImplemented`, before it has done anything, for a case that it leaves to torch's
dual numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from curveball_fused._torch_private import version_of

Tangents = list[Tensor | None]
Map = Callable[[Tangents], Tensor]
Rule = Callable[..., Any]


class RuleContext:
    """One call of a function on the way from the parameters to the outputs.

    Args:
        slots: where the tangent of each tensor among the arguments stands, by the tensor's identity; None: constant.
        backend: whose kernels the rules may use.

    Attributes:
        saved: what the map reads, with the version at which it must stay.
    """

    def __init__(self, slots: dict[int, int | None], backend: str) -> None:
        self.slots = slots
        self.backend = backend
        self.saved: list[tuple[Tensor, int]] = []

    def tangent_index(self, argument: Any) -> int | None:
        """Return the slot of an argument's tangent; None for a constant and for what is no tensor."""
        return self.slots.get(id(argument))

    def save(self, tensor: Tensor) -> Tensor:
        """Return `tensor` for the map to read, without autograd's graph; writing to it later is an error."""
        self.saved.append((tensor.detach(), version_of(tensor)))
        return self.saved[-1][0]

    def constant(self, *arguments: Any) -> bool:
        """Return whether no tensor in `arguments`, lists included, has a tangent."""
        return all(self.tangent_index(t) is None for t in tensors(arguments))


def tensors(values: Any) -> list[Tensor]:
    """Return all tensors in nested lists and tuples."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors(value)
    return found


def snapshot(value: Any) -> Any:
    """Return arguments as they are now, for a map to use when the model may have changed its lists and slices."""
    if isinstance(value, slice):
        bounds = (value.start, value.stop, value.step)
        return slice(*(int(bound) if isinstance(bound, Tensor) else bound for bound in bounds))
    if isinstance(value, dict):
        return {key: snapshot(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([snapshot(v) for v in value]) if type(value) in (list, tuple) else value
    return value.copy() if hasattr(value, "copy") else value  # an array


def tangent_at(tangents: Tangents, slot: int | None) -> Tensor | None:
    """Return the tangent in a slot; None for a constant."""
    return None if slot is None else tangents[slot]
