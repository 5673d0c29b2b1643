"""The tangent operators in Triton against the compositions of torch that the tape uses otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compare import Spread
from benchmarks.gpu.measure import BANDWIDTH_BAR, MARK, ROUNDS, Call, as_text, bandwidth_table, in_turn, ratio
from benchmarks.report import Report
from curveball_fused.backends.triton import tangents as triton_tangents
from tests.gpu.device import DEVICE

EAGER, OURS = "torch", "triton"
AT_LEAST = 10**9  # bytes of all sets of inputs: many times what the cache holds
aten = torch.ops.aten


def rotating(call: Callable[..., object], sets: list[tuple[Any, ...]]) -> Call:
    """`call` with one set of inputs after the other, so that none is in the cache from the last time."""
    turns = cycle(sets)
    return torch.no_grad()(lambda: call(*next(turns)))


def drawn(shape: tuple[int, ...], dtype: torch.dtype, operands: int) -> list[tuple[Tensor, ...]]:
    one = operands * dtype.itemsize * torch.Size(shape).numel()
    return [
        tuple(torch.empty(shape, dtype=dtype, device=DEVICE).normal_() for _ in range(operands))
        for _ in range(-(-AT_LEAST // one))
    ]


def table(report: Report, title: str, copy: Call, ours: Call, composed: Call, traffic: float) -> None:
    calls = {EAGER: composed, OURS: ours}
    note = "One pass against the composition in torch."
    bandwidth_table(report, title, note, copy, calls, traffic, BANDWIDTH_BAR, EAGER, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "length"), [(65536, 768), (16384, 4096)])
def test_layer_norm(rows: int, length: int, dtype: torch.dtype, report: Report, copy: Call) -> None:
    sets = drawn((rows, length), dtype, 2)
    w, b, dw, db = (torch.empty(length, dtype=dtype, device=DEVICE).normal_() for _ in range(4))
    kept = [torch.native_layer_norm(x, [length], w, b, 1e-5)[1:] for x, _ in sets]
    full = [(x, dx, *more) for (x, dx), more in zip(sets, kept, strict=True)]

    def composed(x: Tensor, dx: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        normalized = aten.native_layer_norm_backward(dx, x, [length], mean, rstd, None, None, [True, False, False])[0]
        return F.layer_norm(x, [length], dw, db).addcmul_(normalized, w)

    def ours(x: Tensor, dx: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        return triton_tangents.layer_norm_tangent(dx, x, mean.flatten(), rstd.flatten(), w, dw, db)

    traffic = 3.0 * dtype.itemsize * rows * length
    title = f"layer_norm_tangent, {rows} x {length} {_name(dtype)}"
    table(report, title, copy, rotating(ours, full), rotating(composed, full), traffic)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(128, 64, 56, 56), (128, 512, 7, 7)])
def test_batch_norm(
    shape: tuple[int, int, int, int], last: bool, dtype: torch.dtype, report: Report, copy: Call
) -> None:
    form = torch.channels_last if last else torch.contiguous_format
    sets = [tuple(t.contiguous(memory_format=form) for t in one) for one in drawn(shape, dtype, 2)]
    w, dw, db = (torch.empty(shape[1], dtype=dtype, device=DEVICE).normal_() for _ in range(3))
    mean, rstd = torch.zeros(shape[1], device=DEVICE), torch.ones(shape[1], device=DEVICE)

    def composed(x: Tensor, dx: Tensor) -> Tensor:
        mask = [True, False, False]
        pulled = aten.native_batch_norm_backward(dx, x, w, None, None, mean, rstd, True, 1e-5, mask)[0]
        return pulled.add_(F.batch_norm(x, mean.to(dtype), rstd.to(dtype), dw, db))

    def ours(x: Tensor, dx: Tensor) -> Tensor:
        return triton_tangents.batch_norm_tangent(dx, x, mean, rstd, w, dw, db, True)

    traffic = 5.0 * dtype.itemsize * math.prod(shape)  # x and dx twice, dy
    title = f"batch_norm_tangent, {shape} {_name(dtype)}{', channels last' if last else ''}"
    table(report, title, copy, rotating(ours, sets), rotating(composed, sets), traffic)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_activation(name: str, dtype: torch.dtype, report: Report, copy: Call) -> None:
    """Beside torch's value and one backward call, which makes a product of the derivative and not the derivative."""
    count = 2**27
    sets = drawn((count,), dtype, 1)
    one = torch.ones(count, dtype=dtype, device=DEVICE)

    def composed(x: Tensor) -> tuple[Tensor, Tensor]:
        if name == "silu":
            return F.silu(x), aten.silu_backward(one, x)
        approximate = "tanh" if name == "gelu_tanh" else "none"
        return F.gelu(x, approximate=approximate), aten.gelu_backward(one, x, approximate=approximate)

    ours = rotating(lambda x: triton_tangents.activation(x, name), sets)
    title = f"activation {name}, 2²⁷ {_name(dtype)}"
    table(report, title, copy, ours, rotating(composed, sets), 3.0 * dtype.itemsize * count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "d"), [(1024, 64), (2048, 128)])
def test_attention(length: int, d: int, causal: bool, dtype: torch.dtype, report: Report) -> None:
    batch, heads, s = 8, 12, 1 / math.sqrt(d)
    shape = (batch, length, heads, d)
    q, dq, k, dk, v, dv = (torch.empty(shape, dtype=dtype, device=DEVICE).normal_().transpose(1, 2) for _ in range(6))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    hidden = torch.zeros(length, length, dtype=dtype, device=DEVICE)
    if causal:
        hidden.masked_fill_(~torch.ones_like(hidden, dtype=torch.bool).tril(), -math.inf)

    def composed() -> Tensor:
        q3, dq3, k3, dk3, v3, dv3 = (t.reshape(-1, length, d) for t in (q, dq, k, dk, v, dv))
        p = torch.baddbmm(hidden, q3, k3.mT, alpha=s).softmax(-1)
        scores = torch.bmm(dq3, k3.mT).baddbmm_(q3, dk3.mT, beta=s, alpha=s)
        dp = torch._softmax_backward_data(scores, p, -1, p.dtype)
        return torch.bmm(dp, v3).baddbmm_(p, dv3).view(batch, heads, length, d)

    def ours() -> Tensor:
        return triton_tangents.attention_tangent(dq, dk, dv, q, k, v, out, None, causal, s)

    with torch.no_grad():
        seconds, errors, marks = in_turn({EAGER: composed, OURS: ours})
    work = 10.0 * batch * heads * length**2 * d * (0.5 if causal else 1.0)  # five products of matrices
    rows: list[dict[str, Any]] = []
    for name in (EAGER, OURS):
        row: dict[str, Any] = {"": name, "ms": errors.get(name), "TFLOP/s": None, f"/ {EAGER}": None}
        if name in seconds:
            spread = Spread.of(seconds[name])
            row["ms"] = as_text(Spread(1e3 * spread.median, 1e3 * spread.p20, 1e3 * spread.p80)) + marks[name]
            row["TFLOP/s"] = round(1e-12 * work / spread.median, 1)
            row[f"/ {EAGER}"] = as_text(ratio(seconds[name], seconds[EAGER])) if EAGER in seconds else None
        rows.append(row)
    note = (
        f"Median (20th-80th percentile) of {ROUNDS} rounds, device time. Counted: the five products of matrices, only "
        f"what is visible. {MARK}"
    )
    kind = "causal" if causal else "plain"
    report.add(f"attention_tangent, {batch} x {heads} x {length} x {d} {_name(dtype)}, {kind}", note, rows)
    assert not errors, errors


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
