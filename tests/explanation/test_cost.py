"""What a function costs: multiply-adds, memory, time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from curveball_fused.explanation.cost import counted, median_seconds

CPU = torch.device("cpu")


def test_peak_memory_by_hand() -> None:
    given = torch.zeros(100)

    def run() -> None:
        a, b = given + 1, given + 1  # 800 bytes
        del a
        c = b.repeat(3)  # 400 + 1200
        view = c.view(3, -1)
        del b, c
        given.add_(1)
        view.add_(1)  # 1200 still: neither views nor what was given count
        del view
        given + 1

    assert counted(run, CPU) == (0, 1600)

    x, w = torch.randn(10, 30), torch.randn(20, 30, requires_grad=True)

    def train() -> None:
        torch.autograd.grad(F.linear(x, w).sum(), w)

    # The result (800 bytes) dies; the sum, its gradient (4 each, the latter expanded) and w's gradient remain.
    multiply_adds, peak = counted(train, CPU)
    assert multiply_adds == 2 * 10 * 20 * 30
    assert 2400 <= peak <= 2400 + 800 + 16


def test_times_are_medians_of_runs_in_turn() -> None:
    log: list[str] = []
    seconds = median_seconds([lambda: log.append("a"), lambda: log.append("b")], lambda: log.append("-"), CPU)
    assert log[:4] == ["-", "a", "-", "b"] and len(log) >= 12
    assert all(0 < s < 1 for s in seconds)
