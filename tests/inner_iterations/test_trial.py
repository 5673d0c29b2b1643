"""Steps that are taken back, skipped, resumed or refused."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall, TrainingWarning
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


def test_weights_decay_and_have_no_part_in_the_judgement() -> None:
    _, x, y = problem()
    net = nn.Linear(3, 2)  # which is at its minimum soon: from there on each decay raises the loss
    optimizer = CurveBall(net.parameters(), iterations=8)
    for _ in range(10):
        optimizer.step(lambda: net(x), lambda out: F.mse_loss(out, y))
    optimizer.param_groups[0].update(weight_decay=0.05, lr=0.5)
    length = sum(float(w.square().sum()) for w in weights(net))
    for _ in range(20):
        optimizer.step(lambda: net(x), lambda out: F.mse_loss(out, y))
    assert sum(float(w.square().sum()) for w in weights(net)) < 0.95 * length
    assert float(optimizer.stats()["lambd"]) < 1
    before = weights(net)
    calls = iter((0.0, 100.0))
    optimizer.step(lambda: net(x), lambda out: F.mse_loss(out, y) + next(calls))  # taken back, but for the decay
    for p, was in zip(net.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), 0.975 * was)


@pytest.mark.filterwarnings("ignore:curveball_fused. loss_fn has no curvature")
def test_without_damping_and_curvature_nothing_explodes() -> None:
    for loss_fn in (lambda out: (out - 5).abs().mean(), lambda out: -torch.exp(-(out - 9).square() / 50).mean()):
        net, x, _ = problem()
        optimizer = CurveBall(net.parameters(), iterations=3, lambd=0.0, auto_lambda=False)
        for _ in range(3):
            optimizer.step(lambda: net(x), loss_fn)
        assert all(w.isfinite().all() for w in weights(net))


def test_outputs_more_precise_than_the_weights_do_not_keep_it_going() -> None:
    net, x, y = problem()
    optimizer = CurveBall(net.parameters(), iterations=100, auto_lambda=False)
    losses = [
        float(optimizer.step(lambda: net(x).double(), lambda out: F.mse_loss(out, y.double()))[0]) for _ in range(6)
    ]
    assert losses == sorted(losses, reverse=True)


def test_autocast_around_a_model_in_full_precision_is_no_matter() -> None:
    found = []
    for enabled in (False, True):
        net, x, y = problem()

        def model_fn(net: nn.Module = net, x: Tensor = x) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return net(x)

        optimizer = CurveBall(net.parameters(), iterations=5)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for _ in range(3):
                optimizer.step(model_fn, lambda out, y=y: F.mse_loss(out, y))
        found.append(weights(net))
    # torch's backward pass rounds products to bfloat16 within autocast, whatever the forward pass has done.
    torch.testing.assert_close(*found, atol=5e-3, rtol=0)


def test_steps_that_are_all_taken_back_are_told_of() -> None:
    net, x, y = problem()
    optimizer = CurveBall(net.parameters(), iterations=5, lambd=0.1, lambda_max=0.1)
    optimizer.step(lambda: net(x), lambda out: F.mse_loss(out, y))
    assert optimizer.history()["step"].tolist() == [1]
    counter = iter(range(1000))
    for _ in range(60):
        optimizer.step(lambda: net(x), lambda out: F.mse_loss(out, y) + next(counter))
    with pytest.warns(TrainingWarning, match="were taken back, as they raised the loss"):
        optimizer.history()


def test_a_checkpoint_that_has_lost_the_factors_is_refused() -> None:
    net, x, y = problem()
    optimizer = CurveBall(net.parameters(), iterations=3)
    optimizer.step(lambda: net(x), lambda out: F.mse_loss(out, y))
    saved = optimizer.state_dict()
    lost = {k: {n: t for n, t in e.items() if "_" not in n or n == "compute_dtype"} for k, e in saved["state"].items()}
    with pytest.raises(ValueError, match="options have iterations=3, and its state has lost"):
        CurveBall(net.parameters(), iterations=3).load_state_dict(saved | {"state": lost})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "zero": (dict(iterations=0), "whole number"),
    "a fraction": (dict(iterations=2.5), "whole number"),
    "truth": (dict(iterations=True), "whole number"),
    "a metric": (dict(iterations=2, preconditioner="kronecker"), "leave out preconditioner='kronecker'"),
    "the gradient": (dict(iterations=2, direction="gradient"), "leave out direction='gradient'"),
    "β and ρ": (dict(iterations=2, beta=0.1, rho=0.9), "leave out beta=0.1, rho=0.9"),
    "averages": (dict(iterations=2, average=0.5), "leave out average=0.5"),
    "debug mode": (dict(iterations=2, debug=True), "leave out debug=True"),
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
    learned = CurveBall(net.parameters(), preconditioner="kronecker")
    learned.step(*part)
    learned.param_groups[0].update(iterations=2, preconditioner=None, direction="residual", solve_interval=1, average=0)
    with pytest.raises(RuntimeError, match="iterations=2 is not what the steps so far were taken with"):
        learned.step(*part)
    optimizer.param_groups[0]["iterations"] = 1
    with pytest.raises(RuntimeError, match="iterations=1 is not what the steps so far were taken with"):
        optimizer.step(*part)
    optimizer.param_groups[0]["iterations"] = 2.5
    with pytest.raises(ValueError, match=r"iterations must be a whole number, at least 1; got 2.5"):
        optimizer.step(*part)
    optimizer.param_groups[0].update(iterations=2, average=0.5)
    with pytest.raises(ValueError, match=r"leave out average=0\.5"):
        optimizer.step(*part)
    optimizer.param_groups[0]["average"] = 0.0
    hook = net[0].weight.register_hook(lambda g: g * 0)
    with pytest.raises(RuntimeError, match="cannot be combined with hooks that alter gradients"):
        optimizer.step(*part)
    hook.remove()
    optimizer.step(*part)
    with pytest.raises(ValueError, match="iterations=2 cannot be captured"):
        make_graphed_step(CurveBall(net.parameters(), iterations=2), net, F.mse_loss, (x, y))
