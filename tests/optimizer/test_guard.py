"""The guard against Jacobian products that are not each other's transpose says nothing of ordinary models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall

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
