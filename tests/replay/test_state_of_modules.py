"""State in plain attributes, caches of parametrizations, NumPy's generator: one move a step, by every method."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from curveball_fused import CurveBall
from tests.helpers.against_oracle import METHODS, assert_like_oracle, targets

X = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Attributes(nn.Module):
    """Keeps state in attributes of every kind, some of which appear in the first run."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(5, 4), nn.Linear(4, 3)
        self.hidden: Tensor | None = None
        self.calls, self.rate = 0, 1.0
        self.means: list[Tensor] = []
        self.by_name: dict[str, Tensor] = {"scale": torch.ones(3, dtype=torch.float64)}
        self.recent: deque[float] = deque(maxlen=2)
        self.seen: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.cell(x, torch.zeros(4, 4, dtype=x.dtype) if self.hidden is None else self.hidden)
        if not hasattr(self, "late"):
            self.late = 1.0
        self.late *= 1.1
        self.hidden = hidden.detach()
        self.calls += 1
        self.rate = 1 / self.calls
        self.means.append(self.hidden.mean(0))
        self.by_name["scale"] = self.by_name["scale"] * 0.9
        self.recent.append(self.rate)
        self.seen.add(self.calls)
        scale = self.by_name["scale"] * self.late + sum(self.recent) + len(self.seen)
        return self.out(hidden + torch.stack(self.means).sum(0)) * scale


@pytest.mark.parametrize("method", METHODS)
def test_attributes_move_once_a_step(method: str) -> None:
    net = assert_like_oracle(Attributes, lambda net: net(X), targets(4, 3), method)
    assert net.calls == 4 and len(net.means) == 4 and net.seen == {1, 2, 3, 4} and list(net.recent) == [1 / 3, 1 / 4]


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_fails_leaves_its_attributes(method: str) -> None:
    net = Attributes().double()

    def model() -> Tensor:
        net(X)
        raise ArithmeticError("no")

    with pytest.raises(ArithmeticError, match="no"):
        CurveBall(net.parameters(), curvature=method).step(model, targets(4, 3))
    assert net.hidden is None and net.calls == 0 and not hasattr(net, "late")
    assert net.means == [] and not net.recent and not net.seen and (net.by_name["scale"] == 1).all()


class NumPyNoise(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.from_numpy(np.random.rand(3)) + float(np.random.normal())


@pytest.mark.parametrize("method", METHODS)
def test_numpy_draws_the_same_numbers_in_every_run_and_goes_on_as_after_one(method: str) -> None:
    net = NumPyNoise(5, 3).double()
    optimizer = CurveBall(net.parameters(), curvature=method, lambda_interval=1, lr=1e-6)
    for step in range(3):
        np.random.seed(step)
        expected = copy.deepcopy(net)(X).detach()
        drawn = np.random.rand()
        np.random.seed(step)
        _, outputs = optimizer.step(lambda: net(X), lambda out: out.square().mean())
        torch.testing.assert_close(outputs, expected)
        assert np.random.rand() == drawn
        assert optimizer.stats()["ratio"].item() == pytest.approx(1, abs=1e-4)  # of one function at two points


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * torch.sinh(w)


def custom() -> nn.Module:
    layer = nn.Linear(5, 4)
    parametrize.register_parametrization(layer, "weight", Doubled())
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


PARAMETRIZED: dict[str, Callable[[], nn.Module]] = {
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(5, 4)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(5, 4)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(5, 4)),
    "custom": custom,
}


class Cached(nn.Module):
    """Reads each weight twice."""

    def __init__(self, layer: nn.Module, inside: bool) -> None:
        super().__init__()
        self.layer, self.out, self.inside = layer, nn.Linear(4, 3), inside

    def forward(self, x: Tensor) -> Tensor:
        with parametrize.cached() if self.inside else nullcontext():
            hidden = torch.tanh(self.layer(x))
            return self.out(hidden + 0.1 * self.layer.weight.sum())


@pytest.mark.parametrize("method", ["auto", "forward", "double_backward"])
@pytest.mark.parametrize("where", ["before", "around", "inside"])
@pytest.mark.parametrize("name", PARAMETRIZED)
def test_a_cache_of_parametrizations_does_not_outlive_a_run(name: str, where: str, method: str) -> None:
    """The weights and figures are those without a cache; spectral norm moves its vectors with each read, so not its."""
    if name == "spectral norm" and where != "inside":
        pytest.skip("a cached read is another function")
    if name == "weight norm" and method == "forward":
        pytest.skip("torch has no forward mode for it")
    torch.manual_seed(0)
    net = Cached(PARAMETRIZED[name](), where == "inside").double()
    twin = copy.deepcopy(net)
    before = [p.detach().clone() for p in net.parameters()]
    ours = CurveBall(net.parameters(), curvature=method, lambda_interval=1)
    theirs = CurveBall(twin.parameters(), curvature=method, lambda_interval=1)
    for _ in range(3):
        with nullcontext() if where == "inside" else parametrize.cached():
            if where == "before":
                net(X)
            ours.step(lambda: net(X), targets(4, 3))
            if where != "inside":
                with torch.no_grad():
                    fresh = copy.deepcopy(net.layer.parametrizations.weight)
                assert torch.equal(net.layer.weight, fresh())
        theirs.step(lambda: twin(X), targets(4, 3))
        for figure in ("loss", "beta", "rho", "ratio"):
            torch.testing.assert_close(ours.stats()[figure], theirs.stats()[figure], rtol=1e-9, atol=1e-12)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    assert not any(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", ["auto", "double_backward"])
def test_weight_norm_of_the_older_kind(method: str) -> None:
    """It keeps the weight that it has computed as an attribute of the module."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = torch.nn.utils.weight_norm(nn.Linear(5, 3))
            self.bias, self.weight_g, self.weight_v = layer.bias, layer.weight_g, layer.weight_v

        def forward(self, x: Tensor) -> Tensor:
            v = self.weight_v
            return F.linear(x, self.weight_g * v / v.norm(dim=1, keepdim=True), self.bias)

    assert_like_oracle(
        lambda: torch.nn.utils.weight_norm(nn.Linear(5, 3)),
        lambda net: net(X),
        targets(4, 3),
        method,
        reference=Plain,
    )
