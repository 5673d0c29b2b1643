"""The guard against Jacobian products that are not each other's transpose says nothing of ordinary models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from curveball_fused import CurveBall, guard

torch.manual_seed(0)
X, Y = torch.randn(64, 8), torch.randint(5, (64,))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))


def test_net_that_fits_its_data() -> None:
    """Its gradient p - 1 is a small difference, of few digits in float32."""
    net = mlp()

    def loss_fn(out: Tensor) -> Tensor:
        return F.cross_entropy(out, Y)

    trained = CurveBall(net.parameters(), lambd=1e-6)
    for _ in range(120):
        loss, _ = trained.step(lambda: net(X), loss_fn)
    assert 0 < float(loss) < 1e-3
    for _ in range(20):
        again = CurveBall(net.parameters(), lambd=1e-6)  # whose first step is judged on the host
        again.step(lambda: net(X), loss_fn)
        again.step(lambda: net(X), loss_fn)
        assert float(again.stats()["adjoint_error"]) < 1e-5
        assert float(again.stats()["mismatched_steps"]) == 0


@pytest.mark.parametrize("factor", [1e-20, 1e-12, 1e12])
def test_scale_of_the_loss(factor: float) -> None:
    net = mlp()
    optimizer = CurveBall(net.parameters())
    optimizer.step(lambda: net(X), lambda out: factor * F.cross_entropy(out, Y))
    assert float(optimizer.stats()["adjoint_error"]) < 1e-5


@contextmanager
def precision(products: Any, name: str) -> Iterator[None]:
    before = products.fp32_precision
    products.fp32_precision = name
    try:
        yield
    finally:
        products.fp32_precision = before


class Tf32(TorchDispatchMode):
    """A GPU's matrix products of float32: of operands that are rounded to 10 bits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            args = [self.rounded(t) for t in args]
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rounded(t: Tensor) -> Tensor:
        bits = t.contiguous().view(torch.int32)
        return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.weight = nn.Parameter(4 * torch.randn(32, 32) / 32**0.5)
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for _ in range(60):
            h = torch.tanh(h @ self.weight)
        return self.last(h)


def test_tf32_in_a_recurrent_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state is chaotic, and gradients grow on their way: so do the errors of rounding."""
    with precision(torch.backends.cuda.matmul, "tf32"):
        tolerance = guard._tolerance({torch.float32}, torch.device("cuda"))
    net = Recurrent()
    optimizer = CurveBall(net.parameters())
    monkeypatch.setattr(guard, "_tolerance", lambda *_: tolerance)
    with Tf32():
        optimizer.step(lambda: net(X), lambda out: F.cross_entropy(out, Y))
    assert float(optimizer.stats()["adjoint_error"]) < tolerance / 3


def test_precision_by_its_new_name() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    with precision(torch.backends.cuda.matmul, "tf32"), precision(torch.backends.mkldnn.matmul, "bf16"):
        assert guard._tolerance({torch.float32}, cuda) > 0.02
        assert guard._tolerance({torch.float32}, cpu) == guard._tolerance({torch.bfloat16}, cpu) > 0.1
        assert guard._tolerance({torch.float64}, cuda) < 1e-7
