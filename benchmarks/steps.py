"""Training steps of the alternatives, as callables on the same network and data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.nets import Case
from benchmarks.plain import PlainCurveBall
from curveball_fused import CurveBall

Step = Callable[[], Tensor]
INTERVAL = 5  # CurveBall adapts λ once in so many steps, so only a multiple of it has the average cost


def sgd(case: Case, batch: int | None = None) -> Step:
    """Momentum SGD, the fused one; each step returns the loss before it."""
    return first_order(case, lambda net: [torch.optim.SGD(net.parameters(), 1e-3, 0.9, fused=True)], batch)


def adamw(case: Case, batch: int | None = None) -> Step:
    """AdamW, the fused one."""
    return first_order(case, lambda net: [torch.optim.AdamW(net.parameters(), fused=True)], batch)


def first_order(
    case: Case, make: Callable[[nn.Module], Sequence[torch.optim.Optimizer]], batch: int | None = None
) -> Step:
    """Optimizers that read gradients, made of the net; each step returns the loss before it."""
    model, x, y = case.make(batch)
    optimizers = make(model)

    def step() -> Tensor:
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss.detach()

    return step


def curveball(case: Case, batch: int | None = None, curvature: str = "auto", preconditioner: str | None = None) -> Step:
    """CurveBall with its defaults, on the native kernels."""
    model, x, y = case.make(batch)
    optimizer = CurveBall(model.parameters(), backend="cpu", curvature=curvature, preconditioner=preconditioner)
    return lambda: optimizer.step(lambda: model(x), lambda out: F.cross_entropy(out, y))[0]


def plain(case: Case, batch: int | None = None) -> Step:
    """CurveBall in plain PyTorch."""
    model, x, y = case.make(batch)
    optimizer = PlainCurveBall(model.parameters())
    return lambda: optimizer.step(lambda: model(x), lambda out: F.cross_entropy(out, y))


def repeated(step: Callable[[], object], count: int) -> Callable[[], None]:
    """`count` steps."""

    def run() -> None:
        for _ in range(count):
            step()

    return run


FORWARD, PLAIN = 'CurveBall, curvature="forward"', "plain PyTorch CurveBall"
STEPS: dict[str, Callable[[Case, int | None], Step]] = {
    "SGD": sgd,
    "CurveBall": curveball,
    FORWARD: partial(curveball, curvature="forward"),
    PLAIN: plain,
}
