"""Steps of several iterations against dense Newton steps, -(G + λ)⁻¹Jᵀg, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall
from tests.helpers import nets

LAMBD, LR, DECAY = 0.37, 0.8, 0.05


def poisson_like(out: Tensor) -> Tensor:
    return (out.exp() - 1.3 * out).mean()  # no closed form, and H differs from output to output


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "MSE": lambda out: F.mse_loss(out, torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)),
    "cross-entropy": lambda out: F.cross_entropy(out, torch.arange(len(out)) % out.shape[1]),
    "no closed form": poisson_like,
}


def dense_step(net: nn.Module, x: Tensor, loss_fn: Callable[[Tensor], Tensor], lambd: float) -> Tensor:
    """-(JᵀHJ + λ)⁻¹Jᵀg of a net that leaves nothing behind."""
    params = list(net.parameters())
    out = net(x)
    rows = []
    for value in out.flatten():
        row = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([(torch.zeros_like(p) if r is None else r).flatten() for p, r in zip(params, row)]))
    jacobian, flat = torch.stack(rows), out.detach().flatten()
    g = torch.autograd.functional.jacobian(lambda o: loss_fn(o.view(out.shape)), flat)
    h = torch.autograd.functional.hessian(lambda o: loss_fn(o.view(out.shape)), flat)
    matrix = jacobian.T @ h @ jacobian + lambd * torch.eye(jacobian.shape[1], dtype=jacobian.dtype)
    return -torch.linalg.solve(matrix, jacobian.T @ g)


def z_of(optimizer: CurveBall) -> Tensor:
    return torch.cat([optimizer.state[p]["z"].flatten() for p in optimizer.param_groups[0]["params"]])


@pytest.mark.parametrize("curvature", ["auto", "linearize_operators", "forward", "double_backward"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["attention", "tied weights"])
def test_enough_iterations_are_a_newton_step(name: str, loss: str, curvature: str) -> None:
    net, x = nets.make(name)
    options = dict(lr=LR, weight_decay=DECAY, lambd=LAMBD, auto_lambda=False, curvature=curvature)
    optimizer = CurveBall(net.parameters(), iterations=40, **options)
    loss_fn = LOSSES[loss]
    for _ in range(2):  # the second begins with the first one's z
        weights = torch.cat([p.detach().flatten() for p in net.parameters()])
        expected = dense_step(copy.deepcopy(net), x, loss_fn, LAMBD)
        before = loss_fn(net(x)).detach()
        returned, _ = optimizer.step(lambda: net(x), loss_fn)
        torch.testing.assert_close(returned, before)
        torch.testing.assert_close(z_of(optimizer), expected, rtol=1e-6, atol=1e-8)
        moved = torch.cat([p.detach().flatten() for p in net.parameters()])
        torch.testing.assert_close(moved, (1 - LR * DECAY) * weights + LR * expected, rtol=1e-6, atol=1e-8)


def test_each_iteration_lowers_the_model_of_the_loss() -> None:
    promised = []
    for iterations in (1, 2, 3, 5, 9):
        net, x = nets.make("attention")
        optimizer = CurveBall(net.parameters(), iterations=iterations, lambd=LAMBD, auto_lambda=False)
        optimizer.step(lambda: net(x), LOSSES["cross-entropy"])
        promised.append(float(optimizer.stats()["predicted_change"]))
    assert promised == sorted(promised, reverse=True)
    assert promised[-1] < promised[0] - 0.01 < 0


def test_what_is_promised_is_the_model_at_the_step() -> None:
    net, x = nets.make("tied weights")
    loss_fn = LOSSES["MSE"]
    before = copy.deepcopy(net)
    optimizer = CurveBall(net.parameters(), iterations=4, lambd=LAMBD, lr=LR, auto_lambda=False)
    optimizer.step(lambda: net(x), loss_fn)
    d = {name: LR * optimizer.state[p]["z"] for name, p in net.named_parameters()}
    weights = {name: p.detach() for name, p in before.named_parameters()}
    out, jd = torch.func.jvp(lambda w: torch.func.functional_call(before, w, x), (weights,), (d,))
    curved = F.mse_loss(jd, torch.zeros_like(jd))  # ½ d·Gd
    slope = torch.func.jvp(loss_fn, (out,), (jd,))[1]
    damped = 0.5 * LAMBD * sum(float(t.square().sum()) for t in d.values())
    promised = float(optimizer.stats()["predicted_change"])
    assert promised == pytest.approx(float(slope + curved) + damped, rel=1e-9)


def test_two_groups_and_maximizing() -> None:
    found = []
    for maximize in (False, True):
        net, x = nets.make("attention")
        sign = -1 if maximize else 1
        groups = [
            dict(params=net.norm.parameters(), lr=0.5),
            dict(params=[*net.qkv.parameters(), *net.out.parameters()]),
        ]
        optimizer = CurveBall(groups, iterations=5, maximize=maximize)
        for _ in range(3):
            optimizer.step(lambda: net(x), lambda out, sign=sign: sign * LOSSES["no closed form"](out))
        found.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.filterwarnings("ignore:curveball_fused. loss_fn has no curvature")
def test_a_loss_without_curvature_takes_the_first_iteration_alone() -> None:
    found = []
    for iterations in (1, 7):
        net, x = nets.make("attention")
        optimizer = CurveBall(net.parameters(), iterations=iterations, auto_lambda=False)
        optimizer.step(lambda: net(x), lambda out: (out - 5).abs().mean())
        found.append(z_of(optimizer))
    torch.testing.assert_close(found[0], found[1])
