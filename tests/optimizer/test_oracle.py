"""Twenty steps of the optimizer equal twenty steps with dense matrices, in float64, to 1e-9."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from curveball_fused import CurveBall, backends
from tests.helpers import nets
from tests.helpers.oracle import DenseCurveBall

STEPS = 20
BACKENDS = ["torch"] + (["cpu"] if backends.has_operators() else [])
SETTINGS = dict(lambd=0.7, lambda_low=0.9, lambda_high=1.1, lambda_factor=0.97, lambda_interval=3)


def run(
    name: str,
    curvature: str,
    backend: str,
    loss_of: Any,
    maximize: bool = False,
    batches: int = 3,
    **fixed: float,
) -> None:
    model, x = nets.make(name)
    reference = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    names = list(parameters)
    groups = [names[: len(names) // 2], names[len(names) // 2 :]]
    lr, decay = [0.8, 0.5], [0.03, 0.1]
    optimizer = CurveBall(
        [dict(params=[parameters[n] for n in g], lr=r, weight_decay=d) for g, r, d in zip(groups, lr, decay)],
        curvature=curvature, backend=backend, maximize=maximize, **SETTINGS, **fixed,
    )  # fmt: skip
    oracle = DenseCurveBall(
        reference, groups, lr, decay, SETTINGS["lambd"], SETTINGS["lambda_low"], SETTINGS["lambda_high"],
        SETTINGS["lambda_factor"], int(SETTINGS["lambda_interval"]), maximize=maximize, **fixed,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    data = [x] + [x[torch.randperm(len(x), generator=generator)] for _ in range(batches - 1)]
    lambdas = set()
    for step in range(STEPS):
        batch = data[step % batches]
        torch.manual_seed(step)
        loss, outputs = optimizer.step(lambda: model(batch), loss_of)
        drawn = torch.rand(())
        torch.manual_seed(step)
        expected_loss, expected_outputs = oracle.step(lambda net: net(batch), loss_of)
        assert drawn == torch.rand(()), "the generator does not stand where one run of the model leaves it"
        torch.testing.assert_close(outputs, expected_outputs, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-9)
        stats = optimizer.stats()
        for key, value in oracle.log[-1].items():
            assert stats[key].item() == pytest.approx(value, rel=1e-8, abs=1e-10), (step, key)
        lambdas.add(oracle.lambd)
    for (key, ours), expected in zip(model.state_dict().items(), reference.state_dict().values()):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")
    assert len(lambdas) > 2, "λ did not move: the test does not test it"


def target(classes: int = 3, rows: int = 6) -> Tensor:
    return torch.arange(rows) % classes


def cross_entropy(out: Tensor) -> Tensor:
    return F.cross_entropy(out, target(out.shape[1], len(out)), label_smoothing=0.1)


def log_cosh(out: Tensor) -> Tensor:
    return torch.log(torch.cosh(out - target(3, out.numel()).view_as(out))).mean()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("curvature", ["forward", "linearize", "double_backward"])
@pytest.mark.parametrize("name", list(nets.NETS))
def test_cross_entropy(name: str, curvature: str, backend: str) -> None:
    run(name, curvature, backend, cross_entropy)


@pytest.mark.parametrize("curvature", ["forward", "linearize", "double_backward"])
@pytest.mark.parametrize("name", ["convolution + batch norm", "dropout"])
def test_a_loss_without_closed_form(name: str, curvature: str) -> None:
    run(name, curvature, "auto", log_cosh)


def test_mean_squared_error() -> None:
    run("attention", "auto", "auto", lambda out: F.mse_loss(out, target(3, out.numel()).view_as(out).to(out)))


def test_maximize() -> None:
    run("attention", "auto", "auto", lambda out: -cross_entropy(out), maximize=True)


@pytest.mark.parametrize("fixed", [dict(beta=0.2), dict(rho=0.85), dict(beta=0.15, rho=0.8)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fixed_values(fixed: dict[str, float], backend: str) -> None:
    run("dropout", "auto", backend, cross_entropy, **fixed)
