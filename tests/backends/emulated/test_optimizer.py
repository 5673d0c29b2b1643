"""The whole optimizer with the text of the CUDA kernels, run on the CPU, against twenty steps with dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from curveball_fused import CurveBall, backends
from tests.helpers import nets
from tests.helpers.emulated import operators
from tests.helpers.tiers import slow
from tests.optimizer import test_oracle


@pytest.fixture(autouse=True)
def emulated_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU tensor counts as one on a GPU that has the CUDA kernels."""
    monkeypatch.setattr(backends, "choose", lambda backend, where: "cuda")
    for holder in ("kernels", "loss_kernels"):
        monkeypatch.setattr(backends, holder, lambda chosen: operators)


def mse(out: Tensor) -> Tensor:
    return F.mse_loss(out, test_oracle.target(3, out.numel()).view_as(out).to(out))


def bce(out: Tensor) -> Tensor:
    labels = (torch.arange(out.numel()) % 2).view_as(out).to(out)
    weights = torch.linspace(0.5, 2.0, out.shape[1]).to(out)
    return F.binary_cross_entropy_with_logits(out, labels, pos_weight=weights, reduction="sum")


@pytest.mark.parametrize("loss_of", [test_oracle.cross_entropy, slow(mse), slow(bce)])
@pytest.mark.parametrize("name", list(nets.NETS))
def test_twenty_steps(device: Any, name: str, loss_of: Any) -> None:
    device.launches()
    test_oracle.run(name, "auto", "auto", loss_of)
    assert device.launches(), "the kernels did not run"


def test_launches_of_a_step(device: Any) -> None:
    """Five for the loss, three for the parameter arithmetic, one for the damping.

    At first two for z·z, and six where the guard looks.
    """
    net = torch.nn.Linear(4, 3)
    x, y = torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0])
    optimizer = CurveBall(net.parameters(), lambda_interval=2)
    counts = []
    for _ in range(3):
        device.launches()
        optimizer.step(lambda: net(x), lambda out: F.cross_entropy(out, y))
        counts.append(len(device.launches()))
    assert counts == [17, 8, 9]
