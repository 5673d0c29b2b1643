"""Draw random numbers again: put generators back to where a step began, then to where its first run left them.

Outside of a CUDA graph, states are saved and restored on the host. While a graph is captured no state can be read, and
what is put back on the host would not be put back in a replay: there each run of the model gets a generator state of
its own, registered with the graph, and before every replay all of them are set to the same place.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor


class Generators(Protocol):
    """What `Replay` asks of the generators, from where they stand when this is made."""

    def mark(self) -> None:
        """Note, when first called, where the first run has left them."""

    def rewind(self) -> None:
        """Put them back to where they stood."""

    def finish(self) -> None:
        """Put them to the mark, if there is one."""

    def save_own(self, generator: torch.Generator) -> None:
        """Include a generator that the model passes to a torch function, which is about to draw."""


class Saved:
    """Python's, NumPy's, the CPU's and the device's generator, and those that the model holds.

    Args:
        device: of the parameters.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own: dict[int, tuple[torch.Generator, Tensor]] = {}
        self._own_marked: list[tuple[torch.Generator, Tensor]] = []
        self._before = self._states()
        self._marked: tuple[Any, ...] | None = None

    def mark(self) -> None:
        """Save the states, when first called."""
        if self._marked is None:
            self._marked = self._states()
            self._own_marked = [(g, g.get_state()) for g, _ in self._own.values()]

    def rewind(self) -> None:
        """Restore the states in which this was made."""
        self._set(self._before, list(self._own.values()))

    def finish(self) -> None:
        """Restore the states that were marked, if any."""
        if self._marked is not None:
            self._set(self._marked, self._own_marked)

    def save_own(self, generator: torch.Generator) -> None:
        """Save the state of a generator that the model holds, when first called for it."""
        self._own.setdefault(id(generator), (generator, generator.get_state()))

    def _states(self) -> tuple[Any, ...]:
        host = (random.getstate(), _numpy_state(), torch.get_rng_state())
        return (*host, torch.cuda.get_rng_state(self._device)) if self._device.type == "cuda" else host

    def _set(self, states: tuple[Any, ...], own: list[tuple[torch.Generator, Tensor]]) -> None:
        random.setstate(states[0])
        if states[1] is not None:
            sys.modules["numpy.random"].set_state(states[1])
        torch.set_rng_state(states[2])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(states[3], self._device)
        for generator, state in own:
            generator.set_state(state)


_captured: Callable[[], Generators] | None = None


def generators(device: torch.device) -> Generators:
    """Return the generators as they stand now; those of the graph, while one is captured."""
    return Saved(device) if _captured is None else _captured()


@contextmanager
def captured(make: Callable[[], Generators]) -> Iterator[None]:
    """Let `generators` return what `make` makes until the end of the block, while a graph is captured."""
    global _captured
    _captured = make
    try:
        yield
    finally:
        _captured = None


def positions(device: torch.device) -> list[bytes]:
    """Return where the CPU's and the device's generator stand; [] while a graph is captured, as none can be read."""
    if _captured is not None:
        return []
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return [state.numpy().tobytes() for state in states]


def host_positions(device: torch.device) -> tuple[Any, ...]:
    """Return where those generators stand whose numbers a graph cannot draw anew: the host's, where `device` is not."""
    numpy_state = _numpy_state()
    of_numpy = None if numpy_state is None else (numpy_state[1].tobytes(), *numpy_state[2:])
    return random.getstate(), of_numpy, b"" if device.type == "cpu" else torch.get_rng_state().numpy().tobytes()


def _numpy_state() -> Any:
    """Return the state of NumPy's global generator; None where NumPy is not used."""
    numpy_random = sys.modules.get("numpy.random")
    return None if numpy_random is None else numpy_random.get_state()
