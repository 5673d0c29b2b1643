"""The linearized run: equal to dual numbers for whatever it follows, and a clear refusal of what it can't."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curveball_fused import CurveBall
from curveball_fused.curvature.rules.composites import weight_norm
from tests.helpers.traceable_models import FOLLOWED, IMAGES, Double, Model, X, steps


@pytest.mark.parametrize("name", list(FOLLOWED))
def test_equals_dual_numbers(name: str) -> None:
    """Losses, outputs, β, ρ, λ, γ, weights, buffers, and where the generator stands."""
    (ours, state), (expected, expected_state) = (
        steps(*FOLLOWED[name], curvature) for curvature in ("linearize", "forward")
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, equal_nan=True)
    for key, value in expected_state.items():
        torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")


def test_the_model_runs_once() -> None:
    net, calls = nn.Linear(6, 2).double(), []
    optimizer = CurveBall(net.parameters(), curvature="linearize", auto_lambda=False)
    for _ in range(2):
        optimizer.step(lambda: calls.append(0) or net(X), lambda out: out.square().mean())
    assert len(calls) == 2


def index_that_moves(net: Any) -> Tensor:
    out, t, h = torch.zeros(5, 2, dtype=torch.float64), torch.tensor(0), net(X)
    for i in range(4):
        out[t] = h[i]
        t += 1
    return out


def constant_written_through_a_view(net: Any) -> Tensor:
    other = torch.ones(4, 2, dtype=torch.float64, requires_grad=True) * 2
    other[:, 0].add_(net(X)[:, 0])
    return 2 * other + net(X)


def written_later(net: Any) -> Tensor:
    scale = torch.ones(2, dtype=torch.float64)
    out = net(X) * scale
    scale.mul_(2)
    return out


def base_of_a_view_written_to(net: Any) -> Tensor:
    out = net(X)
    view = out.view(-1)
    view.mul_(2)
    return out


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda net: net(X).mul_(net(X)), "mul_ writes to its argument"),
        (lambda net: net(checkpoint(net, X[:, :2], use_reentrant=False)), "gradient checkpointing"),
        (base_of_a_view_written_to, "written to"),
        (written_later, "written to after it was used"),
        (index_that_moves, "written to after it was used"),
        (constant_written_through_a_view, "written to"),
        (lambda net: F.rrelu(net(X), training=True), "rrelu.*random"),
        (lambda net: Double.apply(net(X)).tanh(), "cannot see into"),
        (lambda net: Double.apply(net(X)), "cannot see into"),
        (lambda net: torch.func.vmap(net)(X), "torch.func"),
        (lambda net: torch.autograd.grad(net(X).square().sum(), net.weight, create_graph=True)[0], "grad inside"),
    ],
)
def test_what_it_cannot_follow_is_refused_and_nothing_changes(run: Model, words: str) -> None:
    net = nn.Linear(2 if "checkpoint" in words else 6, 2).double()
    before = copy.deepcopy(net.state_dict())
    optimizer = CurveBall(net.parameters(), curvature="linearize")
    with pytest.raises(RuntimeError, match=rf'curvature="linearize" cannot follow this model: .*{words}.*"auto"'):
        optimizer.step(lambda: run(net), lambda out: out.square().mean())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    optimizer.step(lambda: net(X[:, : net.in_features]), lambda out: out.square().mean())


class Mixed(nn.Module):
    """All that autocast treats in its own way: products in bfloat16, norms whose weights stay in float32, sums."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.batch_norm, self.group_norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
        self.linear, self.layer_norm, self.rms_norm = nn.Linear(16, 24), nn.LayerNorm(24), nn.RMSNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.group_norm(F.relu(self.batch_norm(self.conv(x))))).flatten(2)
        q, k, v = self.layer_norm(self.linear(x)).chunk(3, -1)
        x = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0] + self.rms_norm(q)
        return torch.log_softmax(x.mean(1) + (x @ x.mT).exp().sum((1, 2))[:, None].tanh(), -1)


def test_autocast_rounds_as_the_dual_numbers_do() -> None:
    """Both against float32: the tape's error is no more than twice that of dual numbers, or of one rounding."""
    stats = {}
    for curvature, mixed in (("forward", False), ("forward", True), ("linearize", True)):
        torch.manual_seed(2)
        net, x = Mixed(), IMAGES.float()
        optimizer = CurveBall(net.parameters(), curvature=curvature, lambda_interval=1)

        def model(net: nn.Module = net, x: Tensor = x, mixed: bool = mixed) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                return net(x)

        for _ in range(3):
            _, outputs = optimizer.step(model, lambda out: F.nll_loss(out.float(), torch.tensor([0, 3, 1, 2])))
        assert outputs.dtype == (torch.bfloat16 if mixed else torch.float32)
        products = [optimizer.stats()[key] for key in ("loss", "beta", "rho", "predicted_change")]
        stats[curvature, mixed] = torch.stack(products)
    exact, dual, ours = stats.values()
    assert ((ours - exact).abs() <= 2 * (dual - exact).abs() + 2**-8 * exact.abs()).all(), (exact, dual, ours)


@pytest.mark.parametrize("dim", [0, 1, 2, -2, -1])
def test_weight_norm(dim: int) -> None:
    v, g = torch.randn(2, 3, 4), torch.rand(2, 3, 4).amax([d for d in range(3) if d != dim % 3], keepdim=True)
    g = g if dim != -1 else torch.rand(1, 1, 1)
    torch.testing.assert_close(weight_norm(v, g, dim), torch._weight_norm(v, g, dim))


def mixed_sum(net: Any) -> Tensor:
    """float32 added to bfloat16 in place, then a product in bfloat16; and float32 where autocast is switched off."""
    x = net(X.float()).bfloat16()
    x += X[:, :2].float()
    x *= torch.ones(2)
    with torch.autocast("cpu", enabled=False):
        return (x @ net.weight[:, :3].bfloat16()).float() @ net.weight[:, :3].T + net(X.float()).float()


def normalized_input(net: Any) -> Tensor:
    return net[1](net[0](X.bfloat16())).float()


@pytest.mark.parametrize(
    ("make", "run"),
    [
        (lambda: nn.Linear(6, 2), mixed_sum),
        (lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2)).bfloat16(), normalized_input),
    ],
)
def test_dtypes_that_meet(make: Callable[[], nn.Module], run: Model) -> None:
    """Followed under autocast as without, to the rounding of the lowest precision."""
    outcomes = []
    for curvature in ("linearize", "forward"):
        torch.manual_seed(0)
        optimizer = CurveBall((net := make()).parameters(), curvature=curvature)
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.step(lambda: run(net), lambda out: (out - 0.3).square().mean())
        outcomes.append(torch.stack([optimizer.stats()[key] for key in ("loss", "beta", "predicted_change")]))
    torch.testing.assert_close(*outcomes, rtol=2e-2, atol=0)


def test_outputs_without_parameters() -> None:
    net = nn.Linear(6, 2).double()
    with pytest.raises(RuntimeError, match="does not depend on any parameter"):
        CurveBall(net.parameters(), curvature="linearize").step(lambda: net(X).detach(), lambda out: out.sum())


def test_nothing_outlives_a_step() -> None:
    """Without the help of the garbage collector: tape, maps and graph hang together without a cycle."""
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten(), nn.Linear(75, 3)).double()
    optimizer = CurveBall(net.parameters())

    def tensors_after_a_step() -> int:
        optimizer.step(lambda: net(IMAGES), lambda out: out.square().mean())
        return sum(isinstance(t, Tensor) for t in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        counts = [tensors_after_a_step() for _ in range(4)]
    finally:
        gc.enable()
    assert counts[1:] == counts[1:2] * 3
