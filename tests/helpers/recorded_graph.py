"""A fake of CUDA graphs on a CPU: the operators that ran while a step was recorded, run again.

It shares what matters with a graph: numbers from the host are those of the recording, tensors stay where they were,
nothing is executed while it is recorded, as far as any tensor shows, no Python runs in a replay, generators move on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from curveball_fused._torch_private import TorchDispatchMode, tree_leaves, tree_map
from curveball_fused.replay import Unrepeatable, generators


class Pool:
    def __init__(self, device: torch.device) -> None:
        pass

    @contextmanager
    def stream(self) -> Iterator[None]:
        yield


class Capture:
    """Record, and put back all that the operators have written to and drawn."""

    def __init__(self, pool: Pool, reruns: int) -> None:
        self._reruns = reruns
        self.calls: list[Callable[[], None]] = []
        self._positions: dict[str, Tensor] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        self._positions = {"start": torch.get_rng_state()}
        recorder = _Recorder(self.calls)
        counted = iter(range(self._reruns))
        with recorder, generators.captured(lambda: _RecordedGenerators(self.calls, self._positions, counted)):
            yield
        for tensor, value in recorder.before.values():
            tensor.detach().copy_(value)
        torch.set_rng_state(self._positions["start"])

    def replay(self) -> None:
        self._positions.clear()
        self._positions["start"] = torch.get_rng_state()
        for call in self.calls:
            call()


class _RecordedGenerators:
    """A recorded rewind is one in every replay."""

    def __init__(self, calls: list[Callable[[], None]], positions: dict[str, Tensor], reruns: Iterator[int]) -> None:
        self._calls, self._positions, self._reruns = calls, positions, reruns

    def mark(self) -> None:
        self._now(lambda: self._positions.setdefault("end", torch.get_rng_state()))

    def rewind(self) -> None:
        next(self._reruns)  # raises where there are more than were announced
        self._now(lambda: torch.set_rng_state(self._positions["start"]))

    def finish(self) -> None:
        self._now(lambda: "end" in self._positions and torch.set_rng_state(self._positions["end"]))

    def save_own(self, generator: torch.Generator) -> None:
        raise Unrepeatable("a generator of its own")

    def _now(self, call: Callable[[], Any]) -> None:
        call()
        self._calls.append(call)


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[Callable[[], None]]) -> None:
        super().__init__()
        self._calls = calls
        self._made: set[int] = set()
        self._kept: list[Tensor] = []  # so that no memory is used twice
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        memories = {t.untyped_storage().data_ptr() for t in given}
        for t in given:
            memory = t.untyped_storage().data_ptr()
            if memory not in self._made and memory not in self.before:
                whole = t.detach().as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
                self.before[memory] = (whole, whole.clone())
        results = func(*args, **kwargs)
        fresh = [t for t in _tensors(results) if t.untyped_storage().data_ptr() not in memories]
        self._made |= {t.untyped_storage().data_ptr() for t in fresh}
        self._kept += fresh
        places = [t.detach() for t in fresh]
        sources = [i for i, t in enumerate(_tensors(results)) if t.untyped_storage().data_ptr() not in memories]
        # A graph knows addresses: what a parameter's `data` is later does not matter.
        held_args, held_kwargs = tree_map(lambda a: a.detach() if isinstance(a, Tensor) else a, (args, kwargs))

        def again() -> None:
            new = _tensors(func(*held_args, **held_kwargs))
            for place, source in zip(places, sources, strict=True):
                place.copy_(new[source])

        self._calls.append(again)
        return results


def _tensors(values: Any) -> list[Tensor]:
    """All tensors that have memory."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and not leaf._is_zerotensor()]
