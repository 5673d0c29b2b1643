"""Steps that could go wrong: not finite, not convex, stale, interrupted."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall
from curveball_fused.backends.scalars import LAMBD
from tests.helpers.training import BACKENDS, SETTINGS, advance, assert_equal, everything, small


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", ["input", "loss", "infinite loss"])
@pytest.mark.parametrize("curvature", ["forward", "double_backward"])
def test_a_step_that_is_not_finite_costs_nothing(backend: str, bad: str, curvature: str) -> None:
    net, x, y = small()
    net[1].track_running_stats = False  # torch itself would put NaN into running statistics
    optimizer = CurveBall(net.parameters(), backend=backend, curvature=curvature, **SETTINGS)
    advance(optimizer, net, x, y, 3)
    twin, other = copy.deepcopy((net, optimizer))
    before = [t.clone() for t in everything(optimizer, net)]
    factor = {"input": 1.0, "loss": float("nan"), "infinite loss": float("inf")}[bad]
    broken = x.clone()
    broken[0, 0] = float("nan") if bad == "input" else 0.0
    optimizer.step(lambda: net(broken), lambda out: F.cross_entropy(out, y) * factor)
    stats = optimizer.stats()
    assert stats["skipped_steps"] == 1 and stats["beta"] == 0 and stats["rho"] == 0
    assert_equal(before[: -len(stats)], everything(optimizer, net)[: -len(stats)])
    other._shared["step"] += 1
    for o, model in ((optimizer, net), (other, twin)):
        torch.manual_seed(9)
        advance(o, model, x, y, 4)
    assert_equal(everything(optimizer, net)[: -len(stats)], everything(other, twin)[: -len(stats)])


def test_not_convex_loss_goes_down() -> None:
    """-x² + x⁴ in the outputs, from near its maximum: Gauss-Newton is negative, and plain steps would climb."""
    w = nn.Parameter(torch.tensor([0.05, -0.02], dtype=torch.float64))
    optimizer = CurveBall([w], lambd=0.3)
    losses = [optimizer.step(lambda: w * 1.0, lambda out: (out**4 - out**2).sum())[0].item() for _ in range(60)]
    assert optimizer.stats()["safe_steps"] > 0
    assert losses[-1] == pytest.approx(-0.5, abs=1e-3)


def test_not_convex_loss_does_not_explode() -> None:
    """On inputs of size 10 a step of rate 1/λ is far too long, and the curvature along it negative."""
    x = 10 * torch.randn(60, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)).double()
    optimizer, losses = CurveBall(net.parameters()), []
    for _ in range(100):
        loss, _ = optimizer.step(lambda: net(x), lambda out: F.triplet_margin_loss(out[:20], out[20:40], out[40:]))
        losses.append(float(loss))
    assert optimizer.stats()["safe_steps"] > 0
    assert losses[-1] < losses[0] and max(losses) < 100 * losses[0]


def test_autocast_around_the_step_looks_at_the_new_weights() -> None:
    """Autocast caches half-precision copies of the weights, which the update makes stale."""
    torch.manual_seed(0)
    net, x, y = nn.Linear(4, 3), torch.randn(10, 4), torch.randint(0, 3, (10,))
    optimizer = CurveBall(net.parameters(), lambda_interval=1)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            advance(optimizer, net, x, y)
        assert optimizer.stats()["ratio"] > 0.1


def test_gradient_hooks_are_accounted_for() -> None:
    """With r scaled by 0.1, β is ten times larger: unless r·r is taken from Jr·c, which the hook has not seen."""
    betas = []
    for scale in (1.0, 0.1):
        net, x, y = small(dtype=torch.float64)
        for p in net.parameters():
            p.register_hook(lambda g: scale * g)
        optimizer = CurveBall(net.parameters(), lambd=2.0)
        advance(optimizer, net, x, y)
        betas.append(optimizer.stats()["beta"])
    torch.testing.assert_close(betas[1], 10 * betas[0])


def test_an_error_in_the_look_at_the_new_weights_leaves_a_complete_step() -> None:
    net, x, y = small()
    twin, calls = copy.deepcopy(net), []

    def fails_the_second_time() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("no such thing")
        return net(x)

    optimizer, other = CurveBall(net.parameters()), CurveBall(twin.parameters())
    torch.manual_seed(3)
    with pytest.raises(KeyError):
        optimizer.step(fails_the_second_time, lambda out: F.cross_entropy(out, y))
    torch.manual_seed(3)
    advance(other, twin, x, y)
    keys = ("beta", "rho", "loss", "predicted_change")
    assert_equal([optimizer.stats()[k] for k in keys], [other.stats()[k] for k in keys])
    for o, model in ((optimizer, net), (other, twin)):
        o._shared["scalars"][LAMBD] = 1.0  # λ, the only thing that the damping update would have changed
        torch.manual_seed(4)
        advance(o, model, x, y, 2)
    assert_equal(list(net.state_dict().values()), list(twin.state_dict().values()))
