"""Steps between solves: what they compute, return and refuse is what a step that solves does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curveball_fused import CurveBall
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
