"""Steps in a metric: equal to dense matrices in float64, for all metrics, directions and averages."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall
from curveball_fused.preconditioners import blocks
from curveball_fused.preconditioners.bases import due_after
from tests.helpers.preconditioned_oracle import DensePreconditioned
from tests.helpers.training import BACKENDS

X = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


class Net(nn.Module):
    """Vectors, matrices, a convolution, an empty parameter, one of one row, and one without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Linear(5, 8)
        self.conv = nn.Conv1d(2, 3, 3, padding=1)
        self.row = nn.Parameter(torch.randn(1, 12))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.last = nn.Linear(12, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)).view(-1, 2, 4)
        h = torch.tanh(self.conv(h)).flatten(1) + self.row
        out: Tensor = self.last(h * self.scale) + self.empty.sum()
        return out


def loss_of(out: Tensor) -> Tensor:
    return F.cross_entropy(out, Y[: len(out)], label_smoothing=0.1)


CASES: list[dict[str, Any]] = [
    dict(preconditioner=preconditioner, direction=direction, average=average, solve_interval=interval)
    for preconditioner in (None, "kronecker")
    for direction, average, interval in (
        ("residual", 0.0, 1), ("residual", 0.7, 1), ("gradient", 0.0, 1), ("gradient", 0.8, 3), ("gradient", 0.0, 4),
    )
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())))
def test_equals_dense_matrices(
    case: dict[str, Any], partial: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "LARGEST_SIDE", 9)  # the last layer has a side of 12
    monkeypatch.setattr(blocks, "LARGEST_BASIS", 4)  # sides of 5 have pieces of 3, sides of 8 and 9 others
    net = Net()
    options = case | {"theta": 1.0 if case["direction"] == "residual" else 0.0}
    del options["direction"]
    dense = DensePreconditioned(
        copy.deepcopy(net), loss_of, lambd=2.0, lr=0.8, weight_decay=0.02, largest=9, longest=4, **options
    )
    optimizer = CurveBall(
        net.parameters(), lr=0.8, lambd=2.0, weight_decay=0.02, auto_lambda=False, backend=backend, **case
    )
    for step in range(20):
        batch = X[step % 5 * 8 :][:8]
        part = batch[:5] if partial else None
        curvature_batch = (lambda part=part: net(part), loss_of) if partial else None
        loss, _ = optimizer.step(lambda batch=batch: net(batch), loss_of, curvature_batch=curvature_batch)
        expected, _ = dense.step(batch, part)
        _refresh_as(dense, step)
        ours = torch.stack([p.detach().double() for p in (loss, optimizer.stats()["beta"], optimizer.stats()["rho"])])
        theirs = torch.tensor([float(expected), *dense.used], dtype=torch.float64)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        w = torch.cat([p.detach().flatten() for p in net.parameters()])
        torch.testing.assert_close(w, dense.w, rtol=1e-9, atol=1e-9)
    assert optimizer.stats()["skipped_steps"] == 0


def _refresh_as(dense: DensePreconditioned, step: int) -> None:
    """Refresh the dense blocks in the schedule of the package, which lists the sides of all blocks in order."""
    sides = [
        (i, n) for i, b in enumerate(dense.blocks) for n in b.matrix if len(b.shape) > 1 and b.matrix[0] and 1 < n <= 9
    ]
    pieces = [math.ceil(n / 4) for _, n in sides]
    works = tuple(k * math.ceil(n / k) ** 3 for k, (_, n) in zip(pieces, sides, strict=True))
    due = {sides[i] for i in due_after(step, works)}
    dense.refresh(lambda block, n: (block, n) in due)


def test_a_gradient_whose_squares_are_finite_but_not_their_sum_spoils_no_factor() -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(400, 2), torch.randn(4, 400).sign()
    optimizer = CurveBall(net.parameters(), preconditioner="kronecker")
    for scale in (3e19, 1.0, 1.0):
        optimizer.step(lambda: net(x), lambda out, scale=scale: scale * F.cross_entropy(out, torch.arange(4) % 2))
    assert optimizer.stats()["skipped_steps"] == 0
    assert all(t.isfinite().all() for name, t in optimizer.state[net.weight].items() if "_" in name)


def test_bases_of_a_model_that_becomes_double_are_orthogonal_in_double_precision() -> None:
    torch.manual_seed(0)
    net = nn.Linear(5, 3)
    optimizer = CurveBall(net.parameters(), preconditioner="kronecker", debug=True)
    for step in range(11):
        if step == 9:
            net.double()  # of whose next step the debug checks have more to ask
        optimizer.step(lambda: net(X.to(net.weight.dtype)), lambda out: F.cross_entropy(out, torch.arange(40) % 3))
    for name in ("left_basis", "right_basis"):
        q = optimizer.state[net.weight][name]
        torch.testing.assert_close(q.mT @ q, torch.eye(len(q), dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("before", [None, "kronecker"])
def test_the_metric_cannot_change_in_training(before: str | None) -> None:
    """A checkpoint's options win, as in torch, and with them its metric; an option that is set by hand is refused."""
    net = Net()
    optimizer = CurveBall(net.parameters(), preconditioner=before)
    optimizer.step(lambda: net(X[:8]), loss_of)
    after = "kronecker" if before is None else None
    other = CurveBall(net.parameters(), preconditioner=after)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["preconditioner"] == before
    other.step(lambda: net(X[:8]), loss_of)
    optimizer.param_groups[0]["preconditioner"] = after
    with pytest.raises(RuntimeError, match="construct a new CurveBall"):
        optimizer.step(lambda: net(X[:8]), loss_of)


def test_an_interval_that_is_set_in_training_needs_the_direction_too() -> None:
    net = Net()
    optimizer = CurveBall(net.parameters())
    optimizer.param_groups[0]["solve_interval"] = 5
    with pytest.raises(ValueError, match='direction="gradient"'):
        optimizer.step(lambda: net(X[:8]), loss_of)


def test_a_state_with_sides_in_one_piece_goes_on_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As earlier versions had them, of up to 1024."""
    nets = [Net(), Net()]
    first, second = (CurveBall(net.parameters(), preconditioner="kronecker", debug=True) for net in nets)
    for step in range(14):
        if step == 7:
            nets[1].load_state_dict(nets[0].state_dict())
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            monkeypatch.setattr(blocks, "LARGEST_BASIS", 4)
        for net, optimizer in zip(nets, (first, second), strict=True):
            optimizer.step(lambda net=net: net(X[:8]), loss_of)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)
    assert second.state[nets[1].first.weight]["left_basis"].shape == (8, 8)


def test_debug_mode_checks_the_bases_of_pieces() -> None:
    net, x = nn.Linear(131, 3), torch.randn(8, 131)
    optimizer = CurveBall(net.parameters(), preconditioner="kronecker", debug=True)
    for _ in range(2):
        optimizer.step(lambda: net(x), lambda out: F.cross_entropy(out, torch.arange(8) % 3))
    assert optimizer.state[net.weight]["right_basis"].shape == (2, 66, 66)
    optimizer.state[net.weight]["right_basis"][1, 0, 0] += 1e-3
    with pytest.raises(RuntimeError, match="orthogonality"):
        optimizer.step(lambda: net(x), lambda out: F.cross_entropy(out, torch.arange(8) % 3))
