"""The soak test sees memory that grows with the steps."""

from __future__ import annotations

import sys
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


def grown(memory: list[float]) -> float:
    return memory[-1] - memory[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", soak.METHODS)
def test_memory_stays(method: str) -> None:
    made = soak.soak(soak.METHODS[method], 1000, 500)
    assert len(made["memory"]) == soak.SAMPLES + 1
    assert grown(made["memory"]) < soak.BOUND
    assert made["losses"][1] < made["losses"][0]


@pytest.mark.slow
def test_a_leak_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "CurveBall", Leaking)
    assert grown(soak.soak({}, 1000, 500)["memory"]) > soak.BOUND
    kept.clear()
