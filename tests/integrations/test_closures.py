"""Accelerate and Fabric hand one closure on: with which precision and scaler, and what comes of a classical one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall
from tests.helpers.trainers import batches, fresh_accelerate, net, numbers_of, plain_loop, required

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def own_precision() -> Iterator[None]:
    with fresh_accelerate():
        yield


def trained(optimizer: Any, run: Callable[[Tensor], Any], loader: Any) -> Any:
    returned = None
    for _ in range(3):
        for x, y in loader:
            returned = optimizer.step(lambda: (run(x), lambda outputs: F.cross_entropy(outputs, y)))
    return returned


@pytest.mark.parametrize("precision", PRECISIONS)
def test_accelerate(precision: str) -> None:
    accelerator = required("accelerate").Accelerator(cpu=True, mixed_precision=precision)
    model = net()
    model, optimizer, loader = accelerator.prepare(model, CurveBall(model.parameters()), batches())
    assert trained(optimizer, model, loader) is None  # it drops what the step returns
    assert torch.equal(numbers_of(model), plain_loop(PRECISIONS[precision]))
    assert optimizer.optimizer.stats()["loss"] < 1.1


def fabric(precision: str) -> Any:
    lightning = required("lightning.fabric")
    if precision == "fp16":  # which it has for GPUs only
        half = required("lightning.fabric.plugins.precision").MixedPrecision("16-mixed", "cpu")
        return lightning.Fabric(accelerator="cpu", devices=1, plugins=[half])
    return lightning.Fabric(accelerator="cpu", devices=1, precision={"no": "32-true", "bf16": "bf16-mixed"}[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fabric(precision: str) -> None:
    trainer, model = fabric(precision), net()
    model, optimizer = trainer.setup(model, CurveBall(model.parameters()))

    def run(x: Tensor) -> Tensor:
        with trainer.autocast():
            outputs: Tensor = model.module(x)
        return outputs

    loss, outputs = trained(optimizer, run, batches())
    assert loss.shape == () and outputs.shape == (16, 3)
    assert torch.equal(numbers_of(model.module), plain_loop(PRECISIONS[precision]))


def test_fabrics_own_module_has_hooks_that_cost_time() -> None:
    """So the recipe takes the one inside; the steps are right all the same."""
    trainer, model = fabric("no"), net()
    model, optimizer = trainer.setup(model, CurveBall(model.parameters()))
    with pytest.warns(UserWarning, match="register_hook inside the model; dual numbers are used instead"):
        trained(optimizer, model, batches())
    torch.testing.assert_close(numbers_of(model.module), plain_loop(), rtol=1e-3, atol=1e-4)


def test_fabrics_scaler_is_passed_by() -> None:
    trainer, model = fabric("fp16"), net()
    model, optimizer = trainer.setup(model, CurveBall(model.parameters()))

    def run(x: Tensor) -> Tensor:
        with trainer.autocast():
            outputs: Tensor = model.module(x)
        return outputs

    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        trained(optimizer, run, batches())
    trained(optimizer.optimizer, run, batches())
    assert torch.equal(numbers_of(model.module), plain_loop(torch.float16))


def test_accelerates_scaler_is_passed_by() -> None:
    wrapper = required("accelerate.optimizer").AcceleratedOptimizer
    required("accelerate").Accelerator(cpu=True)
    model = net()
    optimizer = wrapper(CurveBall(model.parameters()), scaler=torch.amp.GradScaler("cpu"))

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            outputs: Tensor = model(x)
        return outputs

    with pytest.raises(AssertionError, match="scaler"):
        trained(optimizer, run, batches())
    trained(optimizer.optimizer, run, batches())
    assert torch.equal(numbers_of(model), plain_loop(torch.float16))


@pytest.mark.parametrize("package", ["accelerate", "lightning.fabric"])
def test_a_classical_closure_is_told_what_to_write(package: str) -> None:
    required(package)
    model: nn.Module = net()
    optimizer: Any = CurveBall(model.parameters())
    if package == "accelerate":
        optimizer = required(package).Accelerator(cpu=True).prepare(optimizer)
    else:
        model, optimizer = fabric("no").setup(model, optimizer)
    x, y = next(iter(batches()))

    def closure() -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with pytest.raises(TypeError, match="let it return both and leave out backward"):
        optimizer.step(closure)
