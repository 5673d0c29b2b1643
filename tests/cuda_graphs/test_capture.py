"""Random numbers in captured steps, with torch's CUDA graphs and generators played by fakes of the same rules.

A generator's state has an offset. While a graph is captured, draws count from zero in each registered state, and states
cannot be read; a replay adds to each state's offset what was drawn from it, whatever has become current meanwhile.
tests/gpu/test_gpu_generators.py asks torch itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from curveball_fused.cuda_graphs import capture
from curveball_fused.replay.generators import Generators, generators

DEVICE = torch.device("cuda", 0)


class State:
    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.captured: int | None = None  # draws since the capture began


class Generator:
    """The handle; several may share a state."""

    def __init__(self, state: State) -> None:
        self.state = state

    def clone_state(self) -> Generator:
        return Generator(State(self.state.offset))

    def graphsafe_get_state(self) -> Generator:
        return Generator(self.state)

    def graphsafe_set_state(self, other: Generator) -> None:
        self.state = other.state

    def get_state(self) -> torch.Tensor:
        assert self.state.captured is None, "read while capturing"
        return torch.tensor(self.state.offset)

    def set_state(self, value: torch.Tensor) -> None:
        assert self.state.captured is None, "set while capturing"
        self.state.offset = int(value)


class Graph:
    def __init__(self) -> None:
        self.states: list[State] = []
        self.increments: list[int] = []
        self.draws: list[tuple[State, int]] = []

    def register_generator_state(self, generator: Generator) -> None:
        assert generator.state.captured is None
        self.states.append(generator.state)

    def replay(self) -> None:
        LOG.extend(state.offset + before for state, before in self.draws)
        for state, increment in zip(self.states, self.increments, strict=True):
            state.offset += increment


LOG: list[int] = []  # the positions that numbers were drawn at
DEFAULT = Generator(State(0))
capturing: Graph | None = None


@contextmanager
def graph(one: Graph, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
    global capturing
    one.register_generator_state(DEFAULT)
    for state in one.states:
        state.captured = 0
    capturing = one
    try:
        yield
    finally:
        capturing = None
        one.increments = [state.captured or 0 for state in one.states]
        for state in one.states:
            state.captured = None


def draw(count: int) -> None:
    for _ in range(count):
        if capturing is None:
            LOG.append(DEFAULT.state.offset)
            DEFAULT.state.offset += 1
        else:
            assert DEFAULT.state.captured is not None, "a state that the graph does not know"
            capturing.draws.append((DEFAULT.state, DEFAULT.state.captured))
            DEFAULT.state.captured += 1


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    LOG.clear()
    DEFAULT.state = State(0)
    cuda = SimpleNamespace(
        CUDAGraph=Graph, graph=graph, graph_pool_handle=lambda: 1, Stream=lambda device: None,
        default_generators=(DEFAULT,), current_device=lambda: 0,
        get_rng_state=lambda device: DEFAULT.get_state(), set_rng_state=lambda value, device: DEFAULT.set_state(value),
    )  # fmt: skip
    for name, value in vars(cuda).items():
        monkeypatch.setattr(torch.cuda, name, value)


def without_a_rerun() -> None:
    made = generators(DEVICE)
    draw(3)
    made.finish()


def runs(count: int) -> Any:
    """One first run and some others, as steps by dual numbers have them."""

    def step() -> None:
        made = generators(DEVICE)
        draw(3)
        for _ in range(count):
            made.mark()
            made.rewind()
            draw(4)
        made.finish()

    return step


def a_run_aside_first() -> None:
    """As in steps between full solves: of a first run nothing stays, and the next is the one that counts."""
    main = generators(DEVICE)
    aside = generators(DEVICE)
    draw(3)
    aside.rewind()
    draw(3)
    main.mark()
    main.rewind()
    draw(3)
    main.finish()


def raises_within() -> None:
    made: Generators = generators(DEVICE)
    draw(2)
    made.rewind()
    raise KeyError


@pytest.mark.parametrize("step", [without_a_rerun, runs(0), runs(1), runs(3), a_run_aside_first])
def test_replays_draw_what_ordinary_steps_draw(step: Any) -> None:
    DEFAULT.state.offset = 100
    for _ in range(5):
        step()
        draw(1)
    expected, end = list(LOG), DEFAULT.state.offset
    LOG.clear()
    DEFAULT.state.offset = 100
    one = capture.Capture(capture.Pool(DEVICE), 3)
    with one.recording():
        step()
    assert not LOG and DEFAULT.state.offset == 100
    for _ in range(5):
        one.replay()
        draw(1)
    assert expected == LOG and end == DEFAULT.state.offset


def test_two_graphs_take_turns() -> None:
    pool = capture.Pool(DEVICE)
    made = []
    for step in (runs(1), without_a_rerun):
        one = capture.Capture(pool, 2)
        with one.recording():
            step()
        made.append(one)
    for i in range(6):
        made[i % 2].replay()
    graphed = list(LOG)
    LOG.clear()
    DEFAULT.state.offset = 0
    for i in range(6):
        (runs(1), without_a_rerun)[i % 2]()
    assert graphed == LOG


def test_an_error_while_recording_leaves_the_generator() -> None:
    usual = DEFAULT.state
    with pytest.raises(KeyError), capture.Capture(capture.Pool(DEVICE), 3).recording():
        raises_within()
    assert DEFAULT.state is usual
    runs(2)()  # as if nothing had been


def test_too_many_runs_are_told() -> None:
    with (
        pytest.raises(RuntimeError, match="more often in a step"),
        capture.Capture(capture.Pool(DEVICE), 3).recording(),
    ):
        runs(4)()


def test_a_cpu_is_refused() -> None:
    with pytest.raises(RuntimeError, match="need parameters on a CUDA device"):
        capture.Pool(torch.device("cpu"))
