"""The soak test sees memory that grows with the steps.

Each soak has a process of its own: where tests ran before there is free memory that a leak would fill first, unseen.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from benchmarks.evidence import soak

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
kept: list[torch.Tensor] = []


class Leaking(soak.CurveBall):
    def step(self, *args: Any, **kwargs: Any) -> Any:
        kept.append(torch.ones(4000))
        return super().step(*args, **kwargs)


def leak() -> dict[str, Any]:
    soak.CurveBall = Leaking  # type: ignore[misc]
    return soak.soak({}, 1000, 500)


def in_a_fresh_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        return processes.submit(function, *arguments).result()


def grown(memory: list[float]) -> float:
    return memory[-1] - memory[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", soak.METHODS)
def test_memory_stays(method: str) -> None:
    made = in_a_fresh_process(soak.soak, soak.METHODS[method], 1000, 500)
    assert len(made["memory"]) == soak.SAMPLES + 1
    assert grown(made["memory"]) < soak.BOUND
    assert made["losses"][1] < made["losses"][0]


@pytest.mark.slow
def test_a_leak_is_seen() -> None:
    assert grown(in_a_fresh_process(leak)["memory"]) > soak.BOUND
