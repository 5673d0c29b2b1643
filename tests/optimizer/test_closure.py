"""A step of one closure is that of the two functions that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall

OPTIONS: dict[str, dict[str, Any]] = {
    "published": dict(lambd=0.5, weight_decay=0.01),
    "kronecker": dict(preconditioner="kronecker", lambd=3.0, solve_interval=3),
    "forward": dict(curvature="forward"),
    "double_backward": dict(curvature="double_backward"),
}
Call = Callable[[CurveBall, Callable[[], Tensor], Callable[[Tensor], Tensor]], Any]
CALLS: dict[str, Call] = {
    "two functions": lambda optimizer, model_fn, loss_fn: optimizer.step(model_fn, loss_fn),
    "closure": lambda optimizer, model_fn, loss_fn: optimizer.step(lambda: (model_fn(), loss_fn)),
    "by name": lambda optimizer, model_fn, loss_fn: optimizer.step(closure=lambda: (model_fn(), loss_fn)),
    "a new function in each run": lambda optimizer, model_fn, loss_fn: optimizer.step(
        lambda: (model_fn(), lambda out: loss_fn(out))
    ),
}


def trained(call: Call, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Weights, and the losses and outputs of all steps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
    optimizer, seen = CurveBall(net.parameters(), **options), []
    for _ in range(12):
        x, y = torch.randn(16, 5), torch.randint(3, (16,))
        returned = call(optimizer, lambda x=x: net(x), lambda out, y=y: F.cross_entropy(out, y))
        seen += [t.flatten() for t in returned]
    return torch.cat([t.detach().flatten() for t in net.state_dict().values()]), torch.cat(seen)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("call", [name for name in CALLS if name != "two functions"])
def test_steps_are_those_of_two_functions(call: str, options: str) -> None:
    expected = trained(CALLS["two functions"], OPTIONS[options])
    torch.testing.assert_close(trained(CALLS[call], OPTIONS[options]), expected, rtol=0, atol=0)


def test_what_wraps_the_step_hands_the_closure_on() -> None:
    """Schedulers count it, and hooks see it."""
    net, x = nn.Linear(3, 2), torch.ones(4, 3)
    optimizer = CurveBall(net.parameters())
    scheduler, seen = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), []
    optimizer.register_step_post_hook(lambda *arguments: seen.append(arguments))
    optimizer.step(lambda: (net(x), lambda out: out.square().mean()))
    scheduler.step()
    assert len(seen) == 1 and optimizer.param_groups[0]["lr"] == 0.5


def test_outputs_of_a_closure_may_have_a_structure() -> None:
    found = []
    for structured in (False, True):
        torch.manual_seed(0)
        net, x = nn.Linear(3, 2), torch.randn(4, 3)
        optimizer = CurveBall(net.parameters())
        for _ in range(3):
            if structured:
                _, outputs = optimizer.step(lambda net=net, x=x: ((net(x), "text"), lambda out: out[0].square().mean()))
                assert outputs[1] == "text"
            else:
                optimizer.step(lambda net=net, x=x: (net(x), lambda out: out.square().mean()))
        found.append(net.weight.detach().clone())
    assert torch.equal(*found)


def test_a_closure_with_a_part_of_the_batch_for_the_curvature() -> None:
    net, x = nn.Linear(3, 2), torch.ones(4, 3)
    optimizer = CurveBall(net.parameters())
    loss_fn: Callable[[Tensor], Tensor] = lambda out: out.square().mean()  # noqa: E731
    loss, outputs = optimizer.step(lambda: (net(x), loss_fn), curvature_batch=(lambda: net(x[:2]), loss_fn))
    assert loss.shape == () and outputs.shape == (4, 2)
