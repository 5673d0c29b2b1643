"""The compiled step: its products are those of the uncompiled one, whatever path the model takes; clear refusals."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import nets
import oracle
import pytest
import test_oracle
import torch
import torch.nn.functional as F
from test_tape import FOLLOWED, IMAGES, Double, Model, X, steps
from torch import Tensor, fx, nn

from curveball_fused import CurveBall, compiled

pytestmark = pytest.mark.filterwarnings("ignore:curveball_fused. compiling")
TRACES: list[fx.GraphModule] = []


def as_traced(graph: fx.GraphModule, examples: Sequence[Any]) -> Callable[[list[Any]], Sequence[Any]]:
    """Runs a graph as it is; what is tested is which graphs there are, not Inductor."""
    TRACES.append(graph)
    run = lambda values: graph(*values)  # noqa: E731
    run._boxed_call = True
    return run


@pytest.fixture(autouse=True)
def uncached(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    TRACES.clear()
    if "inductor" not in request.keywords:
        monkeypatch.setattr(compiled, "backend", compiled.Backend(as_traced))


def square(out: Tensor) -> Tensor:
    return (out - 0.3).square().mean()


@pytest.mark.parametrize("name", list(nets.NETS))
def test_twenty_steps_equal_dense_matrices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_oracle, "CurveBall", functools.partial(CurveBall, compile=True))
    test_oracle.run(name, "auto", "auto", test_oracle.cross_entropy)
    assert len(TRACES) == 3, "traced more than once"
