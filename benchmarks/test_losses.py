"""The loss operators on the CPU, against the closed forms in torch and against the loss's own gradient; one thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.compare import compare
from benchmarks.report import Report
from curveball_fused.backends.reference import closed_form_losses
from curveball_fused.backends.reference.closed_form_losses import Products
from curveball_fused.losses import fused as fused_losses

LOSSES = [F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits]
SIZES = [(128, 10), (2048, 96)]
LARGE = (2048, 50257)
GRADIENT = "forward and backward of the loss"
OURS = "fused, loss and both products"


@pytest.mark.parametrize(
    ("loss", "rows", "columns"), [*((loss, *size) for loss in LOSSES for size in SIZES), (F.cross_entropy, *LARGE)]
)
def test_loss(
    loss: Any,
    rows: int,
    columns: int,
    report: Report,
    benchmark: BenchmarkFixture,
    set_threads: Callable[[int], None],
) -> None:
    """Everything that a step asks of a loss: c, and the five products."""
    set_threads(1)
    torch.manual_seed(0)
    x, v, u = (torch.randn(rows, columns) for _ in range(3))
    target = torch.randint(0, columns, (rows,)) if loss is F.cross_entropy else torch.rand(rows, columns)
    leaf = x.clone().requires_grad_()

    def step(products: Products | None) -> Tensor:
        assert products is not None
        _, products_with = products.at(v)
        return products_with(u)

    calls: dict[str, Callable[[], object]] = {
        GRADIENT: lambda: torch.autograd.grad(loss(leaf, target), leaf),
        OURS: lambda: step(fused_losses.fused(loss, (x, target), {}, 1.0, "cpu")),
        "closed form in torch": lambda: step(
            closed_form_losses.products(closed_form_losses.CLOSED_FORMS[loss](x, target), 1.0)
        ),
    }
    for call in calls.values():
        call()
    large = (rows, columns) == LARGE
    turns = 1 if large else 5
    timings = compare(calls, GRADIENT, rounds=3 if large else 40, turns=turns)
    table = [{"": name, **timing.columns()} for name, timing in timings.items()]
    note = "c = g + Hv and the five products of a step, against the loss and its gradient alone; float32, 1 thread."
    report.add(f"{loss.__name__}, {rows} x {columns}", note, table)
    benchmark.extra_info["comparison"] = table
    benchmark.pedantic(calls[OURS], rounds=1 if large else 10)
