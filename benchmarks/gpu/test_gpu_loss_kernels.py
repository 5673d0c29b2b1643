"""The loss kernels against closed forms in torch, eager and compiled, and against a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.measure import Call, bandwidth_table
from benchmarks.report import Report
from curveball_fused.backends.reference import closed_form_losses
from curveball_fused.backends.reference.closed_form_losses import Quadratic
from curveball_fused.ops import losses as loss_ops
from tests.gpu.device import BACKENDS, DEVICE

LOSS_BAR = 1.3
EAGER, COMPILED = "torch", "torch.compile"
AT_LEAST = 10**9  # bytes of all sets of inputs: many times what the cache holds
ELEMENTS = 2**27
MAIN = (torch.bfloat16, 8192, 50257)
OTHERS = (
    (torch.float32, 8192, 50257),
    (torch.bfloat16, 8192, 128256),
    (torch.float32, 65536, 1000),
    (torch.float32, 2**20, 10),
)


def first(loss: Tensor, quadratic: Quadratic | None, v: Tensor) -> tuple[Tensor, ...]:
    """Loss, c and two products, as the first call gives them."""
    assert quadratic is not None
    gradient, center, product = quadratic
    seen = center(v.to(gradient.dtype))
    hv = product(seen)
    return loss, (gradient + hv).to(v.dtype), _dot(gradient, seen), _dot(hv, seen)


def second(quadratic: Quadratic | None, v: Tensor, u: Tensor) -> tuple[Tensor, ...]:
    """The other three products."""
    assert quadratic is not None
    gradient, center, product = quadratic
    v, u = center(v.to(gradient.dtype)), center(u.to(gradient.dtype))
    hu = product(u)
    return _dot(gradient, u), _dot(v, hu), _dot(u, hu)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dtype=torch.float64)


def entropy_first(x: Tensor, v: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return first(F.cross_entropy(x.float(), y), closed_form_losses.cross_entropy(x, y), v)


def entropy_second(x: Tensor, v: Tensor, u: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return second(closed_form_losses.cross_entropy(x, y), v, u)


def mse_first(x: Tensor, v: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return first(F.mse_loss(x.float(), y.float()), closed_form_losses.mse_loss(x, y), v)


def mse_second(x: Tensor, v: Tensor, u: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return second(closed_form_losses.mse_loss(x, y), v, u)


def bce_first(x: Tensor, v: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    loss = F.binary_cross_entropy_with_logits(x.float(), y.float())
    return first(loss, closed_form_losses.binary_cross_entropy_with_logits(x, y), v)


def bce_second(x: Tensor, v: Tensor, u: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return second(closed_form_losses.binary_cross_entropy_with_logits(x, y), v, u)


def rotating(call: Callable[..., object], sets: list[tuple[Any, ...]]) -> Call:
    """`call` with one set of inputs after the other, so that none is in the cache from the last time."""
    turns = cycle(sets)

    def run() -> object:
        with torch.no_grad():
            return call(*next(turns))

    return run


def drawn(shape: tuple[int, ...], dtype: torch.dtype, operands: int) -> list[tuple[Tensor, ...]]:
    """Sets of `operands` tensors, AT_LEAST bytes in all."""
    one = operands * dtype.itemsize * torch.Size(shape).numel()
    return [
        tuple(torch.empty(shape, dtype=dtype, device=DEVICE).normal_() for _ in range(operands))
        for _ in range(-(-AT_LEAST // one))
    ]


def alternatives(
    ours: Callable[..., object], composed: Callable[..., object], sets: list[tuple[Any, ...]]
) -> dict[str, Call]:
    """`composed` eager and compiled, and `ours(backend, *inputs)` with each backend."""
    calls = {EAGER: rotating(composed, sets), COMPILED: rotating(torch.compile(composed, dynamic=False), sets)}
    return calls | {b: rotating(lambda *inputs, b=b: ours(b, *inputs), sets) for b in BACKENDS}


def table(report: Report, title: str, copy: Call, calls: dict[str, Call], traffic: float) -> None:
    note = "Against the closed forms in torch, eager and compiled."
    bandwidth_table(report, title, note, copy, calls, traffic, LOSS_BAR, COMPILED, 1.0)


def cross_entropy_cotangent(dtype: torch.dtype, rows: int, classes: int, report: Report, copy: Call) -> None:
    sets = [(x, v, torch.randint(classes, (rows,), device=DEVICE)) for x, v in drawn((rows, classes), dtype, 2)]

    def ours(backend: str, x: Tensor, v: Tensor, y: Tensor) -> object:
        return loss_ops.cross_entropy_cotangent(x, v, y, backend=backend)

    # x and v are read, c is written.
    traffic = 3.0 * dtype.itemsize * rows * classes
    title = f"cross_entropy_cotangent, {rows} x {classes} {_name(dtype)}"
    table(report, title, copy, alternatives(ours, entropy_first, sets), traffic)


def test_cross_entropy_products(report: Report, copy: Call) -> None:
    cross_entropy_cotangent(*MAIN, report, copy)


def test_cross_entropy_dots(report: Report, copy: Call) -> None:
    dtype, rows, classes = MAIN
    y = torch.randint(classes, (rows,), device=DEVICE)
    sets = [(x, v, u, y) for x, v, u in drawn((rows, classes), dtype, 3)]

    def ours(backend: str) -> Callable[..., object]:
        given = [loss_ops.cross_entropy_cotangent(x, v, y, backend=backend) for x, v, _, _ in sets]
        extended = [
            (x, v, u, y, kept, products)
            for (x, v, u, y), (_, _, products, kept) in zip(sets, given, strict=True)
        ]  # fmt: skip
        return rotating(lambda *inputs: loss_ops.cross_entropy_products(*inputs, backend=backend), extended)

    calls = {EAGER: rotating(entropy_second, sets)}
    calls[COMPILED] = rotating(torch.compile(entropy_second, dynamic=False), sets)
    calls |= {b: ours(b) for b in BACKENDS}
    title = f"cross_entropy_products, {rows} x {classes} {_name(dtype)}"
    table(report, title, copy, calls, 3.0 * dtype.itemsize * rows * classes)


@pytest.mark.parametrize("name", ["mse", "bce"])
def test_elementwise(name: str, report: Report, copy: Call) -> None:
    sets = drawn((ELEMENTS,), torch.float32, 4)
    for _, _, _, y in sets:
        y.sigmoid_()
    # The products as given are not read by the kernels but handed on.
    products = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    kernels: Any = (
        (loss_ops.mse_cotangent, loss_ops.mse_products)
        if name == "mse"
        else (loss_ops.bce_cotangent, loss_ops.bce_products)
    )
    composed = (mse_first, mse_second) if name == "mse" else (bce_first, bce_second)

    def ours_first(backend: str, x: Tensor, v: Tensor, y: Tensor) -> object:
        return kernels[0](x, v, y, backend=backend)

    def ours_second(backend: str, x: Tensor, v: Tensor, u: Tensor, y: Tensor) -> object:
        return kernels[1](x, v, u, y, products, backend=backend)

    traffic = 4.0 * 4 * ELEMENTS  # x, v, y and c; x, v, u and y
    without_u = [(x, v, y) for x, v, _, y in sets]
    table(report, f"{name}_cotangent, 2²⁷ float32", copy, alternatives(ours_first, composed[0], without_u), traffic)
    table(report, f"{name}_products, 2²⁷ float32", copy, alternatives(ours_second, composed[1], sets), traffic)


@pytest.mark.parametrize(("dtype", "rows", "classes"), OTHERS, ids=str)
def test_cross_entropy_products_of_other_shapes(
    dtype: torch.dtype, rows: int, classes: int, report: Report, copy: Call
) -> None:
    cross_entropy_cotangent(dtype, rows, classes, report, copy)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
