"""Products of a model's linear map with random vectors, and finite differences to hold them against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from curveball_fused.curvature.double_backward import DoubleBackward
from curveball_fused.curvature.dual_numbers import DualNumbers
from curveball_fused.curvature.linearized import Linearized
from curveball_fused.replay.replay import Replay

MODES = [DualNumbers, DoubleBackward, Linearized]


def linearized(mode: Any, model_fn: Callable[[], Tensor], params: list[Tensor]) -> Any:
    return mode(model_fn, params, Replay(params, params[0].device))


def dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([(u * v).sum() for u, v in zip(a, b, strict=True)]).sum()


def products(
    mode: Any, model: nn.Module, x: Tensor
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, list[Tensor], Tensor]:
    params = list(model.parameters())
    torch.manual_seed(3)
    z = [torch.randn_like(p) for p in params]
    map_ = linearized(mode, lambda: model(x), params)
    outputs, jz = map_.jvp(z)
    u = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(4), dtype=outputs.dtype)
    r = map_.vjp(u)
    return outputs, jz, r, map_.jvp(r)[1], z, u


def finite_difference(model_fn: Callable[[], Tensor], params: list[Tensor], z: list[Tensor], h: float = 1e-6) -> Tensor:
    values = []
    for sign in (1, -1):
        torch._foreach_add_(params, z, alpha=sign * h)
        values.append(model_fn())
        torch._foreach_add_(params, z, alpha=-sign * h)
    return (values[0] - values[1]) / (2 * h)
