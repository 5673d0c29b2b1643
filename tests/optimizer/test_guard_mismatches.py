"""The guard: what later steps and unusual ones compare; tests/curvature/test_right_or_refused.py has the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall, guard, ops
from curveball_fused.backends.scalars import SCALARS

torch.manual_seed(0)
X, Y = torch.randn(24, 6, dtype=torch.float64), torch.randint(0, 3, (24,))


class Scaled(torch.autograd.Function):
    """The identity, whose tangent is wrong by `factor`."""

    factor = 1.0

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 1 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return Scaled.factor * tangent


@pytest.fixture
def wrong() -> Any:
    """Makes the tangent wrong from now on."""

    def set_factor(factor: float = 1.5) -> None:
        Scaled.factor = factor

    yield set_factor
    Scaled.factor = 1.0


def made(**options: Any) -> tuple[nn.Module, CurveBall, Callable[[], Tensor]]:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = CurveBall(net.parameters(), curvature="forward", **options)
    return net, optimizer, lambda: Scaled.apply(net(X))


def cross_entropy(out: Tensor) -> Tensor:
    return F.cross_entropy(out, Y)


def test_a_later_mismatch_is_a_skipped_step_with_its_reason(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "INTERVAL", 2)
    net, optimizer, model = made(lambda_interval=1)
    for _ in range(2):
        optimizer.step(model, cross_entropy)
    assert optimizer.stats()["adjoint_error"] < 1e-12
    wrong()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step(model, cross_entropy)  # the third, which compares
    stats = optimizer.stats()
    assert (stats["mismatched_steps"], stats["skipped_steps"]) == (1, 1) and 0.1 < stats["adjoint_error"] < 1
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    wrong(1.0)
    for _ in range(2):
        optimizer.step(model, cross_entropy)
    stats = optimizer.stats()
    assert (stats["mismatched_steps"], stats["skipped_steps"]) == (1, 1) and stats["adjoint_error"] < 1e-12
    assert not any(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("options", "compared"),
    [({}, [0, 100]), (dict(lambda_interval=3, direction="gradient", solve_interval=7), [0, 105])],
)
def test_how_often_it_looks(options: dict[str, Any], compared: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    net, looked = nn.Linear(6, 3).double(), []
    optimizer = CurveBall(net.parameters(), **options)
    compare = guard.compare
    monkeypatch.setattr(guard, "compare", lambda *args: looked.append(step) or compare(*args))
    for step in range(106):  # noqa: B007 (`looked` takes it)
        optimizer.step(lambda: net(X), cross_entropy)
    assert looked == compared


def test_other_functions_are_looked_at_in_their_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    net, looked = nn.Linear(6, 3).double(), []
    optimizer = CurveBall(net.parameters())
    compare = guard.compare
    monkeypatch.setattr(guard, "compare", lambda *args: looked.append(step) or compare(*args))
    for step in range(8):
        optimizer.step(lambda step=step: torch.tanh(net(X)) if step in (3, 5, 6) else net(X), cross_entropy)
    assert looked == [0, 3]


def test_a_hook_hides_nothing(wrong: Any) -> None:
    """A gradient that a hook has altered is no fault of the model; a wrong tangent beside it is."""
    for factor, raised in ((1.0, False), (1.5, True)):
        net, optimizer, model = made()
        calls: list[Tensor] = []
        net[0].weight.register_hook(lambda g, calls=calls: calls.append(g) or 0.5 * g)
        wrong(factor)
        if raised:
            with pytest.raises(RuntimeError, match="transpose"):
                optimizer.step(model, cross_entropy)
        else:
            optimizer.step(model, cross_entropy)
            assert len(calls) == 1 and optimizer.stats()["skipped_steps"] == 0


def test_the_part_that_the_curvature_is_of(wrong: Any) -> None:
    for factor, raised in ((1.0, False), (1.5, True)):
        _, optimizer, model = made()
        part = (lambda model=model: model()[:8], lambda out: F.cross_entropy(out, Y[:8]))
        wrong(factor)
        if raised:
            with pytest.raises(RuntimeError, match="transpose"):
                optimizer.step(model, cross_entropy, curvature_batch=part)
        else:
            optimizer.step(model, cross_entropy, curvature_batch=part)
            assert optimizer.stats()["skipped_steps"] == 0


@pytest.mark.parametrize("method", ["linearize", "forward", "double_backward"])
def test_a_small_share_of_the_gradient_that_is_lost_is_found(method: str) -> None:
    """A path through an autograd.Function without a graph, that carries a thousandth of the gradient."""

    class Raw(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor) -> Tensor:
            return 1e-3 * a

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 1e-3 * g.detach()

    net = nn.Linear(6, 3).double()
    with pytest.raises(RuntimeError, match="cannot follow this model"):
        CurveBall(net.parameters(), curvature=method).step(lambda: net(X) + Raw.apply(net(X)), cross_entropy)


def test_rounding_is_no_mismatch() -> None:
    """Deep, in float32, near a minimum, where r is what is left of large terms that cancel."""
    torch.manual_seed(3)
    net = nn.Sequential(*[layer for _ in range(12) for layer in (nn.Linear(16, 16), nn.Tanh())], nn.Linear(16, 1))
    x = torch.randn(8, 16)
    optimizer = CurveBall(net.parameters(), lambda_interval=1)
    worst = 0.0
    for _ in range(3):
        for _ in range(100):
            optimizer.step(lambda: net(x), lambda out: out.square().mean())
        worst = max(worst, float(optimizer.stats()["adjoint_error"]))
    assert optimizer.stats()["mismatched_steps"] == 0 and worst < 1e-5


def test_what_is_at_rest_has_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where z = 0, products with Jz are of rounding: a solve does not take them for a direction."""
    z_dot_z = torch.zeros(len(SCALARS), dtype=torch.float64)
    z_dot_z[2] = 1e-20  # λ, by which nothing is damped
    rounding = torch.tensor([1e-17, 1e-34, 0.5, 1e-17, 0.25], dtype=torch.float64)
    exact = torch.tensor([0.0, 0.0, 0.5, 0.0, 0.25], dtype=torch.float64)
    loss = torch.ones((), dtype=torch.float64)
    for backend in ("torch", "cpu"):
        ours, expected = (
            ops.solve(z_dot_z, loss, products, None, beta=None, rho=None, lr=1.0, backend=backend)
            for products in (rounding, exact)
        )
        assert torch.equal(ours, expected) and ours[1] == 0
