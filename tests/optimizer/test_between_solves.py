"""Steps between solves: what they compute, return and refuse is what a step that solves does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curveball_fused import CurveBall
from curveball_fused.backends.scalars import AVERAGE_BETA
from tests.helpers.training import small

SOLVES, BETWEEN = 10, 11  # steps taken before


def after(steps: int) -> tuple[CurveBall, nn.Module, Tensor, Tensor]:
    net, x, y = small()
    optimizer = CurveBall(net.parameters(), preconditioner="kronecker")
    for _ in range(steps):
        optimizer.step(lambda: net(x), lambda out: F.cross_entropy(out, y))
    return optimizer, net, x, y


@pytest.mark.parametrize(
    "wrong",
    [
        lambda out, w: out.detach().square().sum(),
        lambda out, w: torch.tensor(1.0),
        lambda out, w: out.square().sum() + w.square().sum(),
        lambda out, w: out.mul_(2).square().sum(),
        lambda out, w: out,
        lambda out, w: 1.0,
    ],
)
def test_a_loss_that_a_solve_refuses_is_refused(wrong: Callable[..., Tensor]) -> None:
    errors = []
    for steps in (SOLVES, BETWEEN):
        optimizer, net, x, _ = after(steps)
        w = next(net.parameters())
        with pytest.raises((RuntimeError, TypeError)) as error:
            optimizer.step(lambda: net(x), partial(wrong, w=w))
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("steps", [SOLVES, BETWEEN])
def test_a_loss_that_is_the_parameter_is_that_before_the_step(steps: int) -> None:
    w = nn.Parameter(torch.tensor(2.0))
    optimizer = CurveBall([w], preconditioner="kronecker")
    for _ in range(steps):
        optimizer.step(lambda: w * 1, torch.square)
    before = w.item()
    loss, outputs = optimizer.step(lambda: w, lambda out: out)
    assert loss == before == outputs and w.item() != before


def test_a_model_that_was_converted_to_float16_after_the_last_solve_gets_a_loss_scale() -> None:
    net, x, y = small()
    optimizer = CurveBall(net.parameters(), preconditioner="kronecker", beta=0.01, rho=0.0)
    for step in range(BETWEEN + 3):
        if step == BETWEEN:
            net.half()
        optimizer.step(lambda: net(x.to(next(net.parameters()).dtype)), lambda out: 1e-7 * F.cross_entropy(out, y))
        z = torch.cat([optimizer.state[p]["z"].flatten() for p in net.parameters()])
        assert z.abs().max() > 1e-4, step  # an underflow leaves zeros


@pytest.mark.filterwarnings("ignore:.*cannot follow this model")
@pytest.mark.parametrize("method", ["auto", "forward", "double_backward"])
@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_a_checkpointed_model_steps_as_the_plain_one(norm: str, method: str) -> None:
    runs = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        first = nn.Linear(4, 8)
        normed = nn.utils.parametrizations.spectral_norm(first) if norm == "spectral" else nn.BatchNorm1d(8)
        block = nn.Sequential(normed, nn.Tanh()) if norm == "spectral" else nn.Sequential(first, normed, nn.Tanh())
        last, x = nn.Linear(8, 3).double(), torch.randn(10, 4, dtype=torch.float64)
        net = nn.ModuleList([block.double(), last])
        optimizer = CurveBall(net.parameters(), preconditioner="kronecker", curvature=method)

        def run(block=block, last=last, x=x, checkpointed=checkpointed) -> Tensor:  # type: ignore[no-untyped-def]
            hidden = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
            out: Tensor = last(hidden)
            return out

        for _ in range(15):
            optimizer.step(run, lambda out: F.cross_entropy(out, torch.arange(10) % 3))
        runs.append(list(net.state_dict().values()))
    torch.testing.assert_close(*runs, rtol=1e-8, atol=1e-10)


def own_loss(out: Tensor, y: Tensor) -> Tensor:
    """One whose bound at zero nobody knows."""
    return (out - y).square().mean()


def cross_entropy(out: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(out, y.argmax(1), weight=weight)


BOUNDS = {
    "the loss": lambda loss, g, out: loss,
    "|loss| or outputs": lambda loss, g, out: max(loss.abs(), (g * out).abs().sum()),
    "none": None,
}


@pytest.mark.parametrize("preconditioner", [None, "kronecker"])
@pytest.mark.parametrize(
    ("loss_fn", "options", "bound"),
    [(F.mse_loss, {}, "the loss"), (lambda out, y: F.mse_loss(out.transpose(0, 1), y.T), {}, "the loss"),
     (own_loss, {}, "|loss| or outputs"), (lambda out, y: own_loss(out, y) - 2, {}, "|loss| or outputs"),
     (F.mse_loss, {"maximize": True, "lambd": 3.0}, "|loss| or outputs"),
     (F.mse_loss, {"beta": 0.7}, "none"),
     (partial(cross_entropy, weight=torch.tensor([1.0, 2.0, 0.5]).double()), {}, "the loss"),
     (partial(cross_entropy, weight=torch.tensor([1.0, 2.0, -0.5]).double()), {}, "|loss| or outputs"),
     (lambda out, y: F.binary_cross_entropy_with_logits(out, y.sigmoid()), {}, "the loss"),
     (lambda out, y: F.binary_cross_entropy_with_logits(out, y.sigmoid() + 0.2), {}, "|loss| or outputs"),
     (lambda out, y: F.binary_cross_entropy_with_logits(out, y.sigmoid() - 0.2), {}, "|loss| or outputs"),
     (lambda out, y: F.nll_loss(out, y.argmax(1)), {}, "|loss| or outputs")],
    ids=["closed form", "rearranged", "own", "negative", "maximized", "fixed", "weights", "negative weights", "binary",
         "above one", "below zero", "densities"],
)  # fmt: skip
def test_beta_promises_no_more_than_the_loss_has_to_give(
    loss_fn: Callable[[Tensor, Tensor], Tensor], options: dict[str, Any], bound: str, preconditioner: str | None
) -> None:
    """The β that was kept is one that would go far too far; ρ = 0, so that the step is -βu."""
    torch.manual_seed(0)
    net, x = nn.Linear(6, 3).double(), torch.randn(20, 6, dtype=torch.float64)
    y = torch.randn(20, 3, dtype=torch.float64)
    optimizer = CurveBall(
        net.parameters(), rho=0.0, preconditioner=preconditioner, direction="gradient", solve_interval=10, average=0.9,
        **options,
    )  # fmt: skip
    for _ in range(BETWEEN):
        optimizer.step(lambda: net(x), lambda out: loss_fn(out, y))
    optimizer._shared["scalars"][AVERAGE_BETA] = options.get("beta", 1e3)
    before = torch.cat([p.detach().flatten() for p in net.parameters()])
    out = net(x)
    loss = loss_fn(out, y) * (-1 if "maximize" in options else 1)
    (g,) = torch.autograd.grad(loss, out, retain_graph=True)
    r = torch.cat([t.flatten() for t in torch.autograd.grad(loss, list(net.parameters()))])
    optimizer.step(lambda: net(x), lambda out: loss_fn(out, y))
    promised = r @ (before - torch.cat([p.detach().flatten() for p in net.parameters()]))
    room = BOUNDS[bound]
    if room is None:
        assert float(optimizer.stats()["beta"]) == 0.7
    else:
        torch.testing.assert_close(promised, room(loss.detach(), g, out.detach()), rtol=1e-9, atol=0)


def test_a_loss_of_zero_moves_nothing_by_its_gradient() -> None:
    net, x = nn.Linear(4, 2), torch.randn(8, 4)
    optimizer = CurveBall(net.parameters(), preconditioner="kronecker", rho=0.0)
    for _ in range(BETWEEN):
        optimizer.step(lambda: net(x), lambda out: F.mse_loss(out, torch.ones(8, 2)))
    before = net.weight.clone()
    optimizer.step(lambda: net(x), lambda out: F.mse_loss(out, out.detach()))
    assert torch.equal(net.weight, before) and optimizer.stats()["skipped_steps"] == 0


def test_outputs_of_minus_infinity_count_for_nothing() -> None:
    """Those of a masked softmax, in a loss without a closed form."""
    torch.manual_seed(0)
    net, x, mask = nn.Linear(4, 3), torch.randn(12, 4), torch.tensor([[False, False, True]])
    optimizer = CurveBall(net.parameters(), preconditioner="kronecker", rho=0.0)

    def step() -> None:
        optimizer.step(
            lambda: net(x).masked_fill(mask, -torch.inf), lambda out: 1.0 * F.cross_entropy(out, torch.arange(12) % 2)
        )

    for _ in range(BETWEEN):
        step()
    optimizer._shared["scalars"][AVERAGE_BETA] = 1e9
    step()
    assert 0 < float(optimizer.stats()["beta"]) < 1e6


@pytest.mark.parametrize("maximize", [False, True])
def test_the_history_has_the_loss_that_was_returned(maximize: bool) -> None:
    net, x = nn.Linear(4, 2), torch.randn(8, 4)
    optimizer = CurveBall(net.parameters(), preconditioner="kronecker", maximize=maximize)
    losses = [
        optimizer.step(lambda: net(x), lambda out: out.square().mean() * (-1 if maximize else 1))[0]
        for _ in range(BETWEEN + 1)
    ]
    assert torch.equal(optimizer.history()["loss"], torch.stack(losses).double())
