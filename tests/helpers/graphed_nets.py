"""A net to be trained by ordinary and by graphed steps, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall, make_graphed_step

BATCHES = 7
X = torch.randn(BATCHES, 16, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(BATCHES * 16).view(BATCHES, 16) % 4


def net(dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.GELU(), nn.Dropout(dropout), nn.LayerNorm(12), nn.Linear(12, 4)
    )


Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def eager(optimizer: CurveBall, model: Any, loss: Any = F.cross_entropy) -> Step:
    return lambda x, y: optimizer.step(lambda: model(x), lambda out: loss(out, y))


def graphed(optimizer: CurveBall, model: Any, loss: Any = F.cross_entropy) -> Step:
    return make_graphed_step(optimizer, model, loss, (X[3], Y[3]))
