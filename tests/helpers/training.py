"""A small net in training, and comparisons of all that a step can change."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall, backends, state

NATIVE = backends.has_operators()


BACKENDS = ["torch"] + (["cpu"] if NATIVE else [])


SETTINGS: dict[str, Any] = dict(lr=0.8, lambd=0.5, weight_decay=0.02, lambda_interval=2, lambda_factor=0.9)


def small(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
    return net.to(dtype), torch.randn(10, 4).to(dtype), torch.randint(0, 3, (10,))


def advance(optimizer: CurveBall, net: nn.Module, x: Tensor, y: Tensor, steps: int = 1) -> tuple[Tensor, Tensor]:
    for _ in range(steps):
        loss, outputs = optimizer.step(lambda: net(x), lambda out: F.cross_entropy(out, y))
    return loss, outputs


def everything(optimizer: CurveBall, net: nn.Module) -> list[Tensor]:
    return [*net.state_dict().values(), *own_state(optimizer, net), *optimizer.stats().values()]


def own_state(optimizer: CurveBall, net: nn.Module) -> list[Tensor]:
    """z of each parameter, and its block of P."""
    shared = (*state.SHAPES, *state.ON_HOST)
    return [t for p in net.parameters() for name, t in sorted(optimizer.state[p].items()) if name not in shared]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
