"""Training steps of the alternatives, as callables on the same network and data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.nets import Case
from benchmarks.plain import PlainCurveBall
from curveball_fused import CurveBall

Step = Callable[[], Tensor]
INTERVAL = 5  # CurveBall adapts λ once in so many steps, so only a multiple of it has the average cost


def sgd(case: Case, batch: int | None = None) -> Step:
    """Momentum SGD, the fused one; each step returns the loss before it."""
    return first_order(case, partial(torch.optim.SGD, lr=1e-3, momentum=0.9, fused=True), batch)


def first_order(case: Case, make: Callable[..., torch.optim.Optimizer], batch: int | None = None) -> Step:
    """An optimizer that reads gradients, made of the parameters; each step returns the loss before it."""
    model, x, y = case.make(batch)
    optimizer = make(model.parameters())

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def curveball(case: Case, batch: int | None = None, curvature: str = "auto") -> Step:
    """CurveBall with its defaults, on the native kernels."""
    model, x, y = case.make(batch)
    optimizer = CurveBall(model.parameters(), backend="cpu", curvature=curvature)
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
