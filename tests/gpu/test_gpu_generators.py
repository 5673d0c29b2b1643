"""torch's own generators and graphs go by the rules of the fakes in tests/cuda_graphs/test_capture.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.gpu.device import DEVICE


@pytest.fixture
def generator() -> Iterator[torch.Generator]:
    """The handle that functions draw from; with its usual state again afterwards."""
    torch.cuda.init()  # before it there are no generators
    torch.manual_seed(5)
    default = torch.cuda.default_generators[DEVICE.index]
    usual = default.graphsafe_get_state()
    yield default
    default.graphsafe_set_state(usual)


def draw() -> Tensor:
    return torch.rand(1000, device=DEVICE)


def stands_where(a: torch.Generator, b: torch.Generator) -> bool:
    return torch.equal(a.get_state(), b.get_state())


def test_handles_share_a_state_and_clones_have_their_own(generator: torch.Generator) -> None:
    usual, clone = generator.graphsafe_get_state(), generator.clone_state()
    assert stands_where(clone, generator)
    draw()
    assert stands_where(usual, generator) and not stands_where(clone, generator)
    generator.graphsafe_set_state(clone)
    for _ in range(2):
        draw()
    assert stands_where(clone, generator) and not stands_where(usual, generator)


@pytest.mark.parametrize("current", ["usual", "own", "another"])
def test_a_replay_draws_from_where_each_registered_state_stands(generator: torch.Generator, current: str) -> None:
    """And moves each by what was drawn from it, whatever has become current meanwhile."""
    usual, own = generator.graphsafe_get_state(), generator.clone_state()
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(own)  # the usual one is registered by itself
    draw()  # kernels are loaded
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        captured = [draw(), draw()]
        generator.graphsafe_set_state(own)
        captured.append(draw())
    generator.graphsafe_set_state({"usual": usual, "own": own, "another": own.clone_state()}[current])

    torch.manual_seed(6)  # of the current state alone
    begin = torch.cuda.get_rng_state(DEVICE)
    for state in (usual, own):
        state.set_state(begin)
    graph.replay()
    after = usual.get_state(), own.get_state()

    generator.graphsafe_set_state(usual)
    for numbers, end in ((captured[:2], after[0]), (captured[2:], after[1])):
        generator.set_state(begin)
        assert all(torch.equal(draw(), one) for one in numbers)
        assert torch.equal(generator.get_state(), end)
