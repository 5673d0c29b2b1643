"""A step of the optimizer beside one with dense matrices, of everything that a step leaves behind."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall
from tests.helpers.oracle import DenseCurveBall

METHODS = ("auto", "linearize", "forward", "double_backward")
_OPTIONS = {"lr": 0.7, "lambd": 0.4, "weight_decay": 0.03, "lambda_interval": 2}


def targets(outputs: int, classes: int) -> Callable[[Tensor], Tensor]:
    """A loss: cross-entropy with fixed classes."""
    wanted = torch.arange(outputs) % classes
    return lambda out: F.cross_entropy(out, wanted)


def assert_like_oracle(
    make: Callable[[], nn.Module],
    forward: Callable[[nn.Module], Tensor],
    loss_fn: Callable[[Tensor], Tensor],
    method: str,
    *,
    reference: Callable[[], nn.Module] | None = None,
    steps: int = 4,
    atol: float = 1e-9,
) -> nn.Module:
    """Compare steps on `make()` with those of the oracle on the same net, or on an equal one; return the net.

    Every second step adapts λ, so that the run at the new weights is compared too: λ follows from its loss.
    """
    torch.manual_seed(2)
    net = make().double()
    torch.manual_seed(2)
    twin = (reference or make)().double()
    names = [name for name, _ in twin.named_parameters()]
    oracle = DenseCurveBall(twin, [names], [0.7], [0.03], lambd=0.4, low=0.5, high=1.5, factor=0.999, interval=2)
    optimizer = CurveBall(net.parameters(), curvature=method, **_OPTIONS)  # type: ignore[arg-type]
    for step in range(steps):
        torch.manual_seed(step)
        loss, outputs = oracle.step(forward, loss_fn)
        drawn = torch.rand(2)
        torch.manual_seed(step)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="curveball_fused: curvature=")
            ours = optimizer.step(lambda: forward(net), loss_fn)
        torch.testing.assert_close(ours, (loss.detach(), outputs), rtol=0, atol=atol)
        assert torch.equal(torch.rand(2), drawn)
        stats = optimizer.stats()
        for name, value in oracle.log[-1].items():
            assert abs(float(stats[name]) - value) <= atol * (1 + abs(value)), (step, name, float(stats[name]), value)
        assert_same_state(net, twin, atol)
    return net


def assert_same_state(net: nn.Module, twin: nn.Module, atol: float = 1e-9) -> None:
    """Compare parameters and buffers, of whatever names."""
    for ours, theirs in ((net.parameters(), twin.parameters()), (net.buffers(), twin.buffers())):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=atol)


def after_one_run(net: nn.Module, forward: Callable[[nn.Module], Tensor]) -> nn.Module:
    """Return a copy of the net that has run once."""
    once = copy.deepcopy(net)
    with torch.enable_grad():
        forward(once)
    return once
