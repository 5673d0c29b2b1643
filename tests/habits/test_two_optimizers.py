"""One model, two optimizers: each takes the parameters of the other for constants, and leaves them alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall
from tests.helpers.against_oracle import METHODS
from tests.helpers.training import assert_equal

X = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
Y = torch.arange(12) % 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 6), nn.GELU())
        self.head = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(x))
        return outputs


class Between(nn.Module):
    """The parameters of the other optimizer come first, and stand between."""

    def __init__(self) -> None:
        super().__init__()
        first, between, last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        self.body, self.head = nn.ModuleList([between, last]), nn.ModuleList([first, nn.Linear(6, 6)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.body[0](self.head[0](x).tanh())
        outputs: Tensor = self.body[1](self.head[1](h).tanh())
        return outputs


NETS: list[Callable[[], nn.Module]] = [Net, Between]
OPTIONS: list[dict[str, Any]] = [*(dict(curvature=name) for name in METHODS), dict(preconditioner="kronecker")]


def made(net: Callable[[], nn.Module], options: dict[str, Any]) -> tuple[nn.Module, CurveBall, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = net().double()
    return model, CurveBall(model.body.parameters(), **options), torch.optim.AdamW(model.head.parameters(), lr=0.03)


def newton(model: nn.Module, curveball: CurveBall) -> Tensor:
    return curveball.step(lambda: model(X), lambda outputs: F.cross_entropy(outputs, Y))[0]


def at_the_same_weights(model: nn.Module, curveball: CurveBall, adamw: torch.optim.AdamW) -> None:
    F.cross_entropy(model(X), Y).backward(inputs=list(model.head.parameters()))
    newton(model, curveball)
    adamw.step()
    adamw.zero_grad()


def one_after_the_other(model: nn.Module, curveball: CurveBall, adamw: torch.optim.AdamW) -> None:
    newton(model, curveball)
    F.cross_entropy(model(X), Y).backward(inputs=list(model.head.parameters()))
    adamw.step()
    adamw.zero_grad()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("iteration", [at_the_same_weights, one_after_the_other])
def test_each_steps_as_if_the_other_part_were_frozen(
    iteration: Callable[..., None], net: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    """Both parts of a training, taken apart: CurveBall beside a frozen head, AdamW beside a frozen body."""
    model, curveball, adamw = made(net, options)
    apart, beside_frozen, alone = made(net, options)
    losses = []
    for _ in range(4):
        iteration(model, curveball, adamw)
        losses.append(F.cross_entropy(model(X), Y).detach())

        earlier = copy.deepcopy(apart.state_dict())
        apart.head.requires_grad_(False)
        newton(apart, beside_frozen)
        apart.head.requires_grad_(True)
        stepped = copy.deepcopy(apart.body.state_dict())
        if iteration is at_the_same_weights:
            apart.load_state_dict(earlier)
        apart.body.requires_grad_(False)
        F.cross_entropy(apart(X), Y).backward()
        alone.step()
        alone.zero_grad()
        apart.body.requires_grad_(True)
        apart.body.load_state_dict(stepped)
    torch.testing.assert_close(model.state_dict(), apart.state_dict(), rtol=1e-9, atol=1e-12)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.filterwarnings("ignore:.*neither reads nor clears")
def test_gradients_of_either_part_outlive_a_step(options: dict[str, Any]) -> None:
    """Also those that a plain backward() leaves in the parameters of CurveBall, which changes no step."""
    model, curveball, _ = made(Net, options)
    twin, other, _ = made(Net, options)
    for step in range(3):
        model.zero_grad()
        (F.cross_entropy(model(X), Y) * (step + 1)).backward()
        before = [p.grad for p in model.parameters()]
        values = copy.deepcopy(before)
        newton(model, curveball)
        newton(twin, other)
        assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))
        assert_equal(values, before)  # type: ignore[arg-type]
    assert_equal([*model.state_dict().values()], [*twin.state_dict().values()])


def test_a_graph_from_before_the_step_cannot_be_used_after_it() -> None:
    """It would mix gradients of two places; torch says so, as after any optimizer's step."""
    model, curveball, _ = made(Net, {})
    loss = F.cross_entropy(model(X), Y)
    newton(model, curveball)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_each_of_the_two_runs_moves_the_statistics_of_batch_norm_once() -> None:
    model, curveball, adamw = made(Net, {})
    model.body[1] = nn.BatchNorm1d(8).double()
    for iteration in (at_the_same_weights, one_after_the_other):
        iteration(model, curveball, adamw)
    assert model.body[1].num_batches_tracked == 4


def test_two_of_our_own_each_with_its_own_state() -> None:
    model, first, _ = made(Net, {})
    second = CurveBall(model.head.parameters(), preconditioner="kronecker")
    losses = []
    for _ in range(10):
        losses.append(float(newton(model, first)))
        newton(model, second)
    assert losses[-1] < 0.8 * losses[0]
    assert {id(p) for p in first.state}.isdisjoint({id(p) for p in second.state})
