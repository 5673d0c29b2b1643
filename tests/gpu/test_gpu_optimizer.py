"""Whole steps of the optimizer on the GPU, against the same on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall
from tests.gpu.device import BACKENDS, DEVICE, every_backend
from tests.helpers import nets

STEPS = 10
# λ is adapted often and moves much.
SETTINGS: dict[str, Any] = dict(lambd=0.7, lambda_low=0.9, lambda_high=1.1, lambda_factor=0.97, lambda_interval=3)
DETERMINISTIC = [name for name in nets.NETS if name != "dropout"]  # devices draw other random numbers


def optimizer_of(model: nn.Module, **options: Any) -> CurveBall:
    parameters = list(model.parameters())
    half = len(parameters) // 2
    groups = [
        dict(params=parameters[:half], lr=0.8, weight_decay=0.03),
        dict(params=parameters[half:], lr=0.5, weight_decay=0.1),
    ]
    return CurveBall(groups, **SETTINGS, **options)


def losses_of(device: torch.device) -> dict[str, Any]:
    """Each of a loss with a fused kernel, on outputs with three to five columns."""
    target = (torch.arange(6) % 3).to(device)
    return {
        "cross-entropy": lambda out: F.cross_entropy(out, target[: len(out)], label_smoothing=0.1),
        "squared error": lambda out: F.mse_loss(out, F.one_hot(target[: len(out)], out.shape[1]).to(out)),
        "binary": lambda out: F.binary_cross_entropy_with_logits(
            out, F.one_hot(target[: len(out)], out.shape[1]).to(out)
        ),
    }


@pytest.mark.parametrize("backend", [*BACKENDS, "torch", "auto"])
@pytest.mark.parametrize("loss", ["cross-entropy", "squared error", "binary"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_ten_steps_equal_those_on_the_cpu(name: str, loss: str, backend: str) -> None:
    model, x = nets.make(name)
    on_gpu, x_gpu = copy.deepcopy(model).to(DEVICE), x.to(DEVICE)
    ours, expected = optimizer_of(on_gpu, backend=backend), optimizer_of(model, backend="torch")
    for step in range(STEPS):
        gpu_loss, outputs = ours.step(lambda: on_gpu(x_gpu), losses_of(DEVICE)[loss])
        cpu_loss, cpu_outputs = expected.step(lambda: model(x), losses_of(x.device)[loss])
        torch.testing.assert_close(gpu_loss.cpu(), cpu_loss, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(outputs.cpu(), cpu_outputs, rtol=1e-9, atol=1e-9)
        stats = expected.stats()
        for key, value in ours.stats().items():
            assert value.item() == pytest.approx(stats[key].item(), rel=1e-8, abs=1e-10, nan_ok=True), (step, key)
    for (key, value), wanted in zip(on_gpu.state_dict().items(), model.state_dict().values()):
        torch.testing.assert_close(value.cpu(), wanted, rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("backend", [*BACKENDS, "torch", "auto"])
@pytest.mark.parametrize("direction", ["gradient", "residual"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_steps_in_the_metric_equal_those_on_the_cpu(name: str, direction: str, backend: str) -> None:
    """Through all refreshes of the first steps, and steps that solve for nothing."""
    model, x = nets.make(name)
    on_gpu, x_gpu = copy.deepcopy(model).to(DEVICE), x.to(DEVICE)
    options: dict[str, Any] = dict(preconditioner="kronecker", direction=direction)
    options |= dict(solve_interval=3) if direction == "gradient" else {}
    ours, expected = optimizer_of(on_gpu, backend=backend, **options), optimizer_of(model, backend="torch", **options)
    for _ in range(2 * STEPS):
        gpu_loss, _ = ours.step(lambda: on_gpu(x_gpu), losses_of(DEVICE)["cross-entropy"])
        cpu_loss, _ = expected.step(lambda: model(x), losses_of(x.device)["cross-entropy"])
        torch.testing.assert_close(gpu_loss.cpu(), cpu_loss, rtol=1e-7, atol=1e-9)
    for (key, value), wanted in zip(on_gpu.state_dict().items(), model.state_dict().values()):
        torch.testing.assert_close(value.cpu(), wanted, rtol=1e-6, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}")


@every_backend
def test_a_checkpoint_goes_on_with_the_same_bits(backend: str) -> None:
    model, x = nets.make("attention")
    model, x = model.to(DEVICE).float(), x.to(DEVICE).float()
    optimizer, loss = optimizer_of(model, backend=backend), losses_of(DEVICE)["cross-entropy"]
    for _ in range(3):
        optimizer.step(lambda: model(x), loss)
    twin = copy.deepcopy(model)
    resumed = optimizer_of(twin, backend=backend)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        optimizer.step(lambda: model(x), loss)
        resumed.step(lambda: twin(x), loss)
    for a, b in zip(model.parameters(), twin.parameters()):
        assert torch.equal(a, b)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_training_lowers_the_loss(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 5)).to(DEVICE, dtype)
    x, y = torch.randn(128, 20, device=DEVICE).to(dtype), torch.randint(5, (128,), device=DEVICE)
    optimizer = CurveBall(model.parameters(), backend=backend)
    losses: list[Tensor] = [optimizer.step(lambda: model(x), lambda out: F.cross_entropy(out, y))[0] for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    assert optimizer.stats()["skipped_steps"] == 0
    assert all(state["z"].dtype == torch.float32 for p, state in optimizer.state.items() if isinstance(p, Tensor))
