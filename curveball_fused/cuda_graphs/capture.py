"""One CUDA graph, with all of torch that is needed to make and replay it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from curveball_fused.replay import Unrepeatable, generators


class Pool:
    """What the graphs of one step share: memory, since they never run at once, and a stream to be captured on.

    Args:
        device: of the parameters.

    Attributes:
        device: as above.
        memory: the handle of torch's memory pool.

    Raises:
        RuntimeError: `device` has no CUDA.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise RuntimeError(
                f"CUDA graphs need parameters on a CUDA device; these are on {device}. Move the model there, or call "
                "optimizer.step, which does the same."
            )
        self.device = device
        self.memory = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Use the side stream within the block, as warm-up steps must; ordered with the current one."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def graph(self, graph: torch.cuda.CUDAGraph) -> torch.cuda.graph:
        """Return the context in which `graph` is captured."""
        # Relaxed: to allocate pinned memory, as a loader's thread or a backend may do, is no harm.
        return torch.cuda.graph(graph, pool=self.memory, stream=self._stream, capture_error_mode="relaxed")


class _OwnStates:
    """Random numbers of a captured step: each run of the model has a state of the generator of its own.

    The step's first run draws from the generator's usual state. To rewind is to go on with a state that has not been
    used; a replay begins with all of them at the same place.
    """

    def __init__(self, generator: torch.Generator, states: list[torch.Generator]) -> None:
        self._generator = generator
        self._unused = states
        self._marked: torch.Generator | None = None

    def mark(self) -> None:
        if self._marked is None:
            self._marked = self._generator.graphsafe_get_state()

    def rewind(self) -> None:
        if not self._unused:
            raise RuntimeError("the model runs more often in a step than the graph was made for.")
        self._generator.graphsafe_set_state(self._unused.pop())

    def finish(self) -> None:
        if self._marked is not None:
            self._generator.graphsafe_set_state(self._marked)

    def save_own(self, generator: torch.Generator) -> None:
        raise Unrepeatable(
            "the model draws from a generator of its own, which a CUDA graph cannot put back: let it draw from the "
            "default generator of the device."
        )


class Capture:
    """A graph of what runs in `recording`.

    Args:
        pool: shared with the other graphs.
        reruns: how often the model may run again there. Each takes a state, which replays must set.

    Raises:
        RuntimeError: of CUDA, for what cannot be captured.
    """

    def __init__(self, pool: Pool, reruns: int) -> None:
        self._pool = pool
        index = torch.cuda.current_device() if pool.device.index is None else pool.device.index
        self._generator = torch.cuda.default_generators[index]
        self._usual = self._generator.graphsafe_get_state()
        self._states = [self._generator.clone_state() for _ in range(reruns)]
        self._last = self._usual  # from which the step's first run has drawn
        self._graph = torch.cuda.CUDAGraph()
        for one in self._states:
            self._graph.register_generator_state(one)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs in the block, instead of executing it."""
        unused = list(self._states)
        try:
            with self._pool.graph(self._graph), generators.captured(lambda: _OwnStates(self._generator, unused)):
                yield
            self._last = self._generator.graphsafe_get_state()
        finally:
            self._generator.graphsafe_set_state(self._usual)

    def replay(self) -> None:
        """Run the graph on the current stream, with the random numbers that an ordinary step would draw."""
        now = self._generator.get_state()
        for one in self._states:
            one.set_state(now)
        self._graph.replay()
        self._generator.set_state(self._last.get_state())
