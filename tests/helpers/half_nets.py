"""A small net in float16 and bfloat16, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall

HALVES = [torch.bfloat16, torch.float16]
METHODS = ["linearize", "forward", "double_backward"]
X = torch.randn(24, 6, generator=torch.Generator().manual_seed(2))
Y = torch.arange(24) % 4


def net() -> nn.Module:
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def under(half: torch.dtype | None, model: nn.Module, x: Tensor = X) -> Callable[[], Tensor]:
    def model_fn() -> Tensor:
        with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
            return model(x)

    return model_fn


def cross_entropy(out: Tensor) -> Tensor:
    return F.cross_entropy(out, Y)


def one_step(half: torch.dtype | None, size: float = 1.0, **options: Any) -> dict[str, Tensor]:
    """The figures of a step on a batch of its own, after some in float32; `size` shrinks gradient and state alike."""
    model = net()
    optimizer = CurveBall(model.parameters(), lambd=0.3, auto_lambda=False, **options)

    def loss_fn(out: Tensor) -> Tensor:
        return size * cross_entropy(out)

    for _ in range(6):
        optimizer.step(under(None, model), loss_fn)
    if half is not None:
        optimizer._shared["compute_dtype"] = half
    optimizer.step(under(half, model, X.flip(1)), loss_fn)
    return optimizer.stats()
