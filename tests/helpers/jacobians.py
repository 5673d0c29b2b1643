"""Products of a model's linear map with random vectors, and finite differences to hold them against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from curveball_fused.curvature.double_backward import DoubleBackward
from curveball_fused.curvature.dual_numbers import DualNumbers
from curveball_fused.curvature.linearized import Linearized
from curveball_fused.curvature.torch_modes import force_eager
from curveball_fused.replay.replay import Replay

MODES = [DualNumbers, DoubleBackward, Linearized]


def linearized(mode: Any, model_fn: Callable[[], Tensor], params: list[Tensor]) -> Any:
    return mode(model_fn, params, Replay(params, params[0].device))


def assert_products(mode: Any, run: Callable[[list[Tensor]], Tensor], params: list[Tensor]) -> None:
    """Jv and Jᵀu against the matrix, by one backward pass for each output."""
    torch.manual_seed(1)
    v = [torch.randn_like(p) for p in params]
    expected = run(params)
    rows = [
        torch.autograd.grad(value, params, retain_graph=True, materialize_grads=True) for value in expected.flatten()
    ]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    with force_eager():
        linear = linearized(mode, lambda: run(params), params)
        outputs, jv = linear.jvp(v)
        u = torch.randn_like(outputs)
        jtu = torch.cat([g.flatten() for g in linear.vjp(u)])
    torch.testing.assert_close(outputs, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(jv.flatten(), jacobian @ torch.cat([t.flatten() for t in v]), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(jtu, u.flatten() @ jacobian, rtol=1e-9, atol=1e-10)


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
