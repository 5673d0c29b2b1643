"""Steps that are taken back, skipped, resumed or refused."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall
from curveball_fused.cuda_graphs import make_graphed_step


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 2))
    return net, torch.randn(20, 3), torch.randn(20, 2)


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def test_a_step_that_raises_the_loss_is_taken_back() -> None:
    net, x, y = problem()
    optimizer = CurveBall(net.parameters(), iterations=4, lambd=0.01)
    optimizer.step(lambda: net(x), lambda out: F.mse_loss(out, y))
    before, lambd = weights(net), float(optimizer.stats()["lambd"])
    calls = iter((0.0, 100.0))  # what the second evaluation adds, in which the step is judged
    optimizer.step(lambda: net(x), lambda out: F.mse_loss(out, y) + next(calls))
    assert all(map(torch.equal, before, weights(net)))
    assert not any(optimizer.state[p]["z"].any() for p in net.parameters())
    assert float(optimizer.stats()["lambd"]) == pytest.approx(8 * lambd)
    optimizer.step(lambda: net(x), lambda out: F.mse_loss(out, y))
    assert not all(map(torch.equal, before, weights(net)))


def test_the_loss_of_a_whole_batch_never_rises() -> None:
    net, x, y = problem()
    optimizer = CurveBall(net.parameters(), iterations=8, lambd=1e-9)  # steps too bold by far at first
    losses = [float(optimizer.step(lambda: (5 * net(x)).sin(), lambda out: F.mse_loss(out, y))[0]) for _ in range(30)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]
    assert float(optimizer.history()["ratio"].min()) < 0  # some were taken back


def test_a_step_without_a_number_changes_nothing() -> None:
    net, x, y = problem()
    optimizer = CurveBall(net.parameters(), iterations=4)
    optimizer.step(lambda: net(x), lambda out: F.mse_loss(out, y))
    before, state = weights(net), copy.deepcopy(optimizer.state)
    optimizer.step(lambda: net(x), lambda out: F.mse_loss(out, y * torch.nan))
    assert all(map(torch.equal, before, weights(net)))
    for p, entry in zip(net.parameters(), state.values(), strict=True):
        for name in set(entry) - {"scalars", "history", "step"}:
            assert torch.equal(optimizer.state[p][name], entry[name]), name
    assert float(optimizer.stats()["skipped_steps"]) == 1


def test_a_training_resumes_bit_for_bit_and_leaves_generators_alone() -> None:
    net, x, y = problem()
    optimizer = CurveBall(net.parameters(), iterations=3)

    def train(net: nn.Module, optimizer: CurveBall, steps: int) -> None:
        for _ in range(steps):
            optimizer.step(lambda: net(x), lambda out: F.mse_loss(out, y))

    position = torch.get_rng_state()
    train(net, optimizer, 3)
    assert torch.equal(position, torch.get_rng_state())
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict()], file)
    train(net, optimizer, 4)
    file.seek(0)
    saved = torch.load(file)
    other, _, _ = problem()
    resumed = CurveBall(other.parameters(), iterations=3)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(other, resumed, 4)
    assert all(map(torch.equal, weights(net), weights(other)))


def test_buffers_move_once_and_masks_are_the_same() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
    x, y = torch.randn(16, 3), torch.randn(16, 2)
    optimizer = CurveBall(net.parameters(), iterations=6)
    for step in range(4):
        before = net[0](x).mean(0)
        expected = 0.9 * net[1].running_mean + 0.1 * before
        optimizer.step(lambda: net(x), lambda out: F.mse_loss(out, y))
        torch.testing.assert_close(net[1].running_mean, expected.detach())
        assert int(net[1].num_batches_tracked) == step + 1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "zero": (dict(iterations=0), "whole number"),
    "a fraction": (dict(iterations=2.5), "whole number"),
    "truth": (dict(iterations=True), "whole number"),
    "a metric": (dict(iterations=2, preconditioner="kronecker"), "leave out preconditioner='kronecker'"),
    "the gradient": (dict(iterations=2, direction="gradient"), "leave out direction='gradient'"),
    "β and ρ": (dict(iterations=2, beta=0.1, rho=0.9), "leave out beta=0.1, rho=0.9"),
    "averages": (dict(iterations=2, average=0.5), "leave out average=0.5"),
    "the compiler": (dict(iterations=2, compile=True), "leave out compile=True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_options(case: str) -> None:
    options, message = REFUSED[case]
    net, _, _ = problem()
    with pytest.raises(ValueError, match=message):
        CurveBall(net.parameters(), **options)


def test_refused_steps() -> None:
    net, x, y = problem()
    optimizer = CurveBall(net.parameters(), iterations=2)
    part = (lambda: net(x), lambda out: F.mse_loss(out, y))
    before = weights(net)
    with pytest.raises(RuntimeError, match="cannot be combined with a batch in parts"):
        optimizer.step([part, part])
    with pytest.raises(RuntimeError, match="curvature_batch and a scaler"):
        optimizer.step(*part, curvature_batch=part, scaler=torch.amp.GradScaler("cpu"))
    with (
        pytest.raises(RuntimeError, match=r"float32 or float64, and this one does in torch.bfloat16"),
        torch.autocast("cpu", torch.bfloat16),
    ):
        optimizer.step(*part)
    assert all(map(torch.equal, before, weights(net)))
    optimizer.step(*part)
    optimizer.param_groups[0]["iterations"] = 1
    with pytest.raises(RuntimeError, match="iterations=1 is not what the steps so far were taken with"):
        optimizer.step(*part)
    with pytest.raises(ValueError, match="iterations=2 cannot be captured"):
        make_graphed_step(CurveBall(net.parameters(), iterations=2), net, F.mse_loss, (x, y))
