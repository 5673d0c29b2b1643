"""A loss that reads what depends on the parameters beside the outputs: refused, in the same words by every method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curveball_fused import CurveBall
from tests.helpers.oracle import DenseCurveBall

METHODS = ["auto", "linearize", "forward", "double_backward"]
X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(12) % 3


class Gated(nn.Module):
    """A mixture of experts that keeps what losses like to read."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.gate, self.experts, self.norm = nn.Linear(6, 4), nn.Linear(6, 12), nn.Linear(3, 3)
        self.checkpointed = checkpointed
        self.register_buffer("kept", torch.zeros(()))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(1)
        self.balance = p.mean(0).square().sum()
        self.of_weights = self.gate.weight.square().sum()
        self.several = {"list": [p.unbind(1)]}
        self.kept = torch.zeros((), dtype=x.dtype)
        self.kept.add_(p.square().mean())
        experts = checkpoint(self.experts, x, use_reentrant=False) if self.checkpointed else self.experts(x)
        self.last = self.norm((experts.view(-1, 4, 3) * p[:, :, None]).sum(1))
        return self.last


READS: dict[str, Callable[[Gated], Tensor]] = {
    "attribute": lambda net: net.balance,
    "attribute of weights": lambda net: net.of_weights,
    "structure": lambda net: net.several["list"][0][1].square().mean(),
    "view": lambda net: net.several["list"][0][1][2:4].exp().sum(),
    "written in place": lambda net: net.kept,
    "outputs themselves": lambda net: net.last.square().mean(),
    "parameter": lambda net: net.gate.weight.square().sum(),
    "view of a parameter": lambda net: net.gate.weight[0].square().sum(),
}


def make(checkpointed: bool = False) -> Gated:
    torch.manual_seed(1)
    return Gated(checkpointed)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("curvature", METHODS)
def test_refused_by_every_method(curvature: str, read: str) -> None:
    net = make()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = CurveBall(net.parameters(), curvature=curvature)
    with pytest.raises(RuntimeError, match=r"beside the outputs.*torch\.cat.*weight_decay="):
        optimizer.step(lambda: net(X), lambda out: F.cross_entropy(out, Y) + 50 * READS[read](net))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("read", READS)
def test_refused_between_solves(read: str, checkpointed: bool) -> None:
    """By the same words, and before anything has changed."""
    net = make(checkpointed)
    optimizer = CurveBall(net.parameters(), preconditioner="kronecker")
    for _ in range(3):
        optimizer.step(lambda: net(X), lambda out: F.cross_entropy(out, Y))
    before = [p.detach().clone() for p in net.parameters()]
    for loss_fn in (
        lambda out: F.cross_entropy(out, Y) + 50 * READS[read](net),
        lambda out: F.mse_loss(out, READS[read](net).expand(out.shape)),
        lambda out: READS[read](net),
    ):
        with pytest.raises(RuntimeError, match=r"beside the outputs.*torch\.cat.*weight_decay="):
            optimizer.step(lambda: net(X), loss_fn)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    optimizer.step(lambda: net(X), lambda out: F.cross_entropy(out, Y))


def test_a_graph_that_is_gone_is_refused_between_solves() -> None:
    net = make()
    optimizer = CurveBall(net.parameters(), preconditioner="kronecker")
    for _ in range(3):
        optimizer.step(lambda: net(X), lambda out: F.cross_entropy(out, Y))
    kept = net.gate(X).exp()
    kept.sum().backward()
    with pytest.raises(RuntimeError, match="beside the outputs"):
        optimizer.step(lambda: net(X), lambda out: F.cross_entropy(out, Y) + kept.square().mean())


@pytest.mark.parametrize("curvature", METHODS)
def test_what_a_hook_has_kept_is_refused(curvature: str) -> None:
    net, features = make(), []
    net.gate.register_forward_hook(lambda module, inputs, output: features.append(output))
    optimizer = CurveBall(net.parameters(), curvature=curvature)
    with pytest.raises(RuntimeError, match="beside the outputs"):
        optimizer.step(lambda: net(X), lambda out: F.cross_entropy(out, Y) + features[0].square().mean())


def test_checkpointing_does_not_hide_it() -> None:
    net = make(checkpointed=True)
    optimizer = CurveBall(net.parameters())
    with pytest.raises(RuntimeError, match="beside the outputs"):
        optimizer.step(lambda: net(X), lambda out: F.cross_entropy(out, Y) + net.balance)


@pytest.mark.parametrize("curvature", METHODS)
def test_as_the_target_of_a_recognized_loss(curvature: str) -> None:
    net = make()
    optimizer = CurveBall(net.parameters(), curvature=curvature)
    with pytest.raises(RuntimeError, match="beside the outputs"):
        optimizer.step(lambda: net(X), lambda out: F.mse_loss(out, net.last.exp()))


@pytest.mark.parametrize("curvature", METHODS)
def test_beside_parameters_of_another_optimizer(curvature: str) -> None:
    """By dual numbers what is kept then has a graph, which leads to those parameters only."""
    net = make()
    optimizer = CurveBall(net.gate.parameters(), curvature=curvature)
    with pytest.raises(RuntimeError, match="beside the outputs"):
        optimizer.step(lambda: net(X), lambda out: F.cross_entropy(out, Y) + net.last.square().mean())


@pytest.mark.parametrize("curvature", METHODS)
def test_constants_may_be_read(curvature: str) -> None:
    """What was detached, read on the host, or computed without gradients, with the same steps by every method."""

    def rows(curvature: str) -> list[list[float]]:
        net = make()
        optimizer = CurveBall(net.parameters(), curvature=curvature, lambd=0.5)
        seen = []

        def loss_fn(out: Tensor) -> Tensor:
            with torch.no_grad():
                scale = 1 + net.balance
            return F.mse_loss(out * scale, net.last.detach() + net.balance.item())

        for _ in range(3):
            optimizer.step(lambda: net(X), loss_fn)
            seen.append([float(optimizer.stats()[name]) for name in ("loss", "beta", "rho")])
        return seen

    torch.testing.assert_close(rows(curvature), rows("double_backward"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("curvature", METHODS)
def test_returned_with_the_outputs_it_is_right(curvature: str) -> None:
    """As the error says, against dense matrices."""
    net, reference = make(), make()

    def model(net: Gated) -> Tensor:
        everything = torch.cat([net(X).flatten(), net.balance.view(1), net.of_weights.view(1)])
        del net.balance, net.of_weights, net.several, net.last  # which cannot be copied
        net.kept = torch.zeros(())
        return everything

    def loss_fn(out: Tensor) -> Tensor:
        return F.cross_entropy(out[:-2].view(-1, 3), Y) + 5 * out[-2].square() + 1e-3 * out[-1].square()

    names = [name for name, _ in reference.named_parameters()]
    oracle = DenseCurveBall(reference, [names], [0.8], [0.03], 0.7, 0.9, 1.1, 0.97, 3)
    options: dict[str, Any] = dict(lambd=0.7, lambda_low=0.9, lambda_high=1.1, lambda_factor=0.97, lambda_interval=3)
    optimizer = CurveBall(net.parameters(), 0.8, weight_decay=0.03, curvature=curvature, **options)
    for _ in range(4):
        loss, _ = optimizer.step(lambda: model(net), loss_fn)
        expected, _ = oracle.step(model, loss_fn)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
        for key, value in oracle.log[-1].items():
            assert optimizer.stats()[key].item() == pytest.approx(value, rel=1e-8, abs=1e-10), key


def test_kept_tensors_that_cannot_be_dual_are_no_obstacle() -> None:
    """Of another layout, or wrapped by torch.func."""
    net, kept = make(), []

    def row(x: Tensor) -> Tensor:
        kept.append(2 * x)
        return kept[-1].sum()

    def model_fn() -> Tensor:
        kept.append(torch.eye(3).to_sparse() * 2)
        kept.append(torch.vmap(row)(X).argmax())
        return net(X)

    optimizer = CurveBall(net.parameters(), curvature="forward")
    for _ in range(2):
        optimizer.step(model_fn, lambda out: F.cross_entropy(out, Y))
    assert optimizer.stats()["skipped_steps"] == 0
