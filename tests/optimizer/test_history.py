"""The figures of the last steps, kept on the device and read at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from curveball_fused import CurveBall, state
from curveball_fused.backends.scalars import SCALARS
from curveball_fused.cuda_graphs.host_reads import NoHostReads
from tests.helpers.training import advance, assert_equal, small


def test_holds_the_figures_of_every_step() -> None:
    net, x, y = small()
    optimizer = CurveBall(net.parameters(), lambda_interval=2)
    assert all(v.shape == (0,) for v in optimizer.history().values())
    seen = []
    for _ in range(7):
        advance(optimizer, net, x, y)
        seen.append(optimizer.stats())
    for n, expected in ((3, seen[4:]), (7, seen), (100, seen)):
        history = optimizer.history(n)
        assert set(history) == set(seen[0]) - {"mismatched_steps", "adjoint_error"} | {"step"}  # without the guard's
        assert history.pop("step").tolist() == list(range(8 - len(expected), 8))
        for name, values in history.items():
            assert_equal([values], [torch.stack([figures[name] for figures in expected])])


def test_keeps_the_last_1024(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "HISTORY", 4)
    monkeypatch.setitem(state.SHAPES, "history", (4, len(SCALARS)))
    net, x, y = small()
    optimizer = CurveBall(net.parameters(), maximize=True)
    seen = []
    for _ in range(10):
        optimizer.step(lambda: net(x), lambda out: -F.cross_entropy(out, y))
        seen.append(optimizer.stats()["loss"])
    assert optimizer.history(3)["loss"].tolist() == torch.stack(seen[-3:]).tolist()
    assert optimizer.history(1000)["loss"].tolist() == torch.stack(seen[-4:]).tolist()
    assert optimizer.history()["step"].tolist() == [7, 8, 9, 10]


def test_is_saved_and_loaded() -> None:
    net, x, y = small()
    optimizer, other = CurveBall(net.parameters()), CurveBall(net.parameters())
    advance(optimizer, net, x, y, 3)
    other.load_state_dict(optimizer.state_dict())
    before = optimizer.history()
    advance(optimizer, net, x, y)
    assert_equal(list(before.values()), list(other.history().values()))


def test_a_step_that_raised_is_not_in_it() -> None:
    net, x, y = small()
    optimizer = CurveBall(net.parameters())
    advance(optimizer, net, x, y, 2)
    with pytest.raises(TypeError):
        optimizer.step(lambda: None, lambda out: F.cross_entropy(out, y))  # type: ignore[arg-type, return-value]
    assert len(optimizer.history()["loss"]) == 2


@pytest.mark.parametrize("n", [0, -1, 1025, 2.0, True, None])
def test_a_length_that_cannot_be_is_told(n: Any) -> None:
    with pytest.raises(ValueError, match="whole number of steps, from 1 to 1024"):
        CurveBall(small()[0].parameters()).history(n)


def test_reading_it_is_what_waits() -> None:
    net, x, y = small()
    optimizer = CurveBall(net.parameters())
    advance(optimizer, net, x, y)
    with NoHostReads(torch.device("cpu")):
        advance(optimizer, net, x, y, 3)
        figures = optimizer.stats()
    assert len(figures) - 2 == len(optimizer.history()) - 1 == 8
