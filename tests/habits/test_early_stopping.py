"""Back to an earlier state of model and optimizer, and on from there: as if nothing had come between."""

from __future__ import annotations

import copy

import pytest
import torch

from curveball_fused import CurveBall
from tests.helpers.training import SETTINGS, advance, assert_equal, everything, small


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("preconditioner", [None, "kronecker"])
def test_a_rollback_leaves_no_trace(preconditioner: str | None, steps: int) -> None:
    options = SETTINGS if preconditioner is None else dict(preconditioner=preconditioner, solve_interval=3)
    net, x, y = small()
    optimizer = CurveBall(net.parameters(), **options)
    advance(optimizer, net, x, y, 4)
    # A copy, as a state_dict has the tensors themselves, which later steps move.
    best = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    ends = []
    for _ in range(3):  # one state serves several rollbacks
        torch.manual_seed(2)
        advance(optimizer, net, x, y, steps)
        ends.append(copy.deepcopy([*everything(optimizer, net), *optimizer.history().values()]))
        net.load_state_dict(best[0])
        optimizer.load_state_dict(best[1])
    for end in ends[1:]:
        assert_equal(ends[0], end)
    assert len(optimizer.history()["loss"]) == 4
