"""What a tape has recorded: maps of tangents in the order of the calls that left them, and their replay, Jv."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from curveball_fused._torch_private import version_of

from .rules import Map, Tangents
from .torch_modes import first_line


class TapeUnsupported(Exception):
    """The model does what the tape cannot follow; other methods can."""


class TangentMaps:
    """Maps of tangents; slots 0, 1, … hold the parameters' tangents, and each map that is added has the next one.

    Args:
        params: the parameters, whose tangents the maps begin with.

    Attributes:
        parameters: how many.
        device_type: of the parameters.
        saved: what the maps read, with the version at which it must stay.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.parameters = len(params)
        self.device_type = params[0].device.type
        self.saved: list[tuple[Tensor, int]] = []
        self._maps: list[_Entry] = []

    def add(self, name: str, tangent_map: Map, slots: Iterable[int | None], result: Tensor) -> int:
        """Add the map of a call.

        Args:
            name: of the function, for errors.
            tangent_map: the map from all tangents to the result's.
            slots: those that the map reads; None for a constant.
            result: of the call.

        Returns:
            The slot of the result's tangent.
        """
        reads = list({slot for slot in slots if slot is not None})
        self._maps.append(_Entry(name, tangent_map, reads, result.shape, result.dtype))
        return self.parameters + len(self._maps) - 1

    def jvp(self, tangents: Sequence[Tensor], last: int) -> Tensor:
        """Compute the tangent in a slot.

        Args:
            tangents: of the parameters, in their shapes and dtypes.
            last: the slot.

        Returns:
            The tangent, of the shape and dtype of its tensor.

        Raises:
            TapeUnsupported: a map cannot be computed, or what it reads is not what it was when the tape saw it.
        """
        if any(version_of(t) != version for t, version in self.saved):
            raise TapeUnsupported("a tensor that was written to after it was used")
        values: Tangents = [*tangents, *[None] * len(self._maps)]
        with torch.no_grad(), torch.autocast(self.device_type, enabled=False):
            for slot, entry, spent in self._order(last):
                values[slot] = entry.tangent(values)
                for read in spent:  # the memory of a tangent that nobody reads any more
                    values[read] = None
        tangent = values[last]
        assert tangent is not None
        values.clear()  # maps that make several results at once hold the list
        return tangent

    def _order(self, last: int) -> list[tuple[int, _Entry, list[int]]]:
        """Return what leads to the slot `last`: slots, their entries, and the slots that are not read after them."""
        needed, order = {last}, []
        for slot in range(last, self.parameters - 1, -1):
            if slot in needed:
                entry = self._maps[slot - self.parameters]
                spent = [read for read in entry.reads if read not in needed]
                needed.update(entry.reads)
                order.append((slot, entry, spent))
        return order[::-1]


class _Entry(NamedTuple):
    """How to compute one tangent: the name of the function, the map, the slots that it reads; shape and dtype."""

    name: str
    map: Map
    reads: list[int]
    shape: torch.Size
    dtype: torch.dtype

    def tangent(self, tangents: Tangents) -> Tensor:
        """Return the tangent in the dtype of the result."""
        try:
            tangent = self.map(tangents)
        except torch.OutOfMemoryError:
            raise
        except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise TapeUnsupported(f"{self.name}: {first_line(error)}") from error
        if tangent.shape != self.shape:
            raise TapeUnsupported(f"{self.name}: its tangent has another shape")
        return tangent if tangent.dtype == self.dtype else tangent.to(self.dtype)
