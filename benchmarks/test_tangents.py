"""The tangent operators against the chains of ATen calls that they replace: sizes of the small GPT and of ResNet-18."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.compare import compare
from benchmarks.report import Report, bar
from curveball_fused.ops import tangents as tangent_ops

ROUNDS, PEDANTIC_ROUNDS = 40, 10
BAR = 1.0
EPS = 1e-5
Calls = dict[str, Callable[[], object]]


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    set_threads(1)
    torch.manual_seed(0)


def test_layer_norm(report: Report, benchmark: BenchmarkFixture) -> None:
    n, d = 2048, 128
    dx, x = torch.randn(2, n, d)
    w, dw, db = torch.randn(3, d)
    _, mean, rstd = torch.native_layer_norm(x, [d], w, db, EPS)

    def composition() -> Tensor:
        needed = [True, False, False]
        normal, _, _ = torch.ops.aten.native_layer_norm_backward(dx, x, [d], mean, rstd, None, None, needed)
        return F.layer_norm(x, [d], dw, db, EPS).addcmul_(normal, w)

    calls: Calls = {
        "backward, layer norm, addcmul": composition,
        "layer_norm_tangent": lambda: tangent_ops.layer_norm_tangent(dx, x, mean[:, 0], rstd[:, 0], w, dw, db),
    }
    _measure("layer_norm_tangent", f"x [{n}, {d}], all tangents given", calls, report, benchmark)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_batch_norm(layout: str, report: Report, benchmark: BenchmarkFixture) -> None:
    memory = torch.contiguous_format if layout == "contiguous" else torch.channels_last
    dx, x = (t.contiguous(memory_format=memory) for t in torch.randn(2, 32, 64, 32, 32))
    w, dw, db = torch.randn(3, 64)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    rstd = (var + EPS).rsqrt()

    def composition() -> Tensor:
        normal, _, _ = torch.ops.aten.native_batch_norm_backward(
            dx, x, w, None, None, mean, rstd, True, EPS, [True, False, False]
        )
        affine, _, _ = torch.native_batch_norm(x, dw, db, mean, var, False, 0.1, EPS)
        return normal.add_(affine)

    calls: Calls = {
        "backward, batch norm, add": composition,
        "batch_norm_tangent": lambda: tangent_ops.batch_norm_tangent(dx, x, mean, rstd, w, dw, db, training=True),
    }
    note = f"x {list(x.shape)}, {layout}, all tangents given"
    _measure(f"batch_norm_tangent, {layout}", note, calls, report, benchmark)


@pytest.mark.parametrize(("shape", "is_causal"), [((32, 4, 64, 32), True), ((16, 6, 65, 64), False)])
def test_attention(
    shape: tuple[int, int, int, int], is_causal: bool, report: Report, benchmark: BenchmarkFixture
) -> None:
    b, h, t, d = shape
    dq, dk, dv, q, k, v = (torch.randn(b, t, h, d).transpose(1, 2) for _ in range(6))
    s = 1 / math.sqrt(d)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    later = torch.full((t, t), -math.inf).triu_(1) if is_causal else torch.zeros(t, t)

    def composition() -> Tensor:
        q3, dq3, k3, dk3, v3, dv3 = (t.reshape(-1, *t.shape[-2:]) for t in (q, dq, k, dk, v, dv))
        scores = torch.baddbmm(later, q3, k3.mT, alpha=s)
        p = torch.softmax(scores, -1)
        d_scores = torch.baddbmm(scores, dq3, k3.mT, beta=0, alpha=s, out=scores).baddbmm_(q3, dk3.mT, alpha=s)
        dp = torch._softmax_backward_data(d_scores, p, -1, p.dtype)
        return torch.bmm(dp, v3).baddbmm_(p, dv3).view(b, h, t, d)

    calls: Calls = {
        "matrix products, softmax, its backward": composition,
        "attention_tangent": lambda: tangent_ops.attention_tangent(
            dq, dk, dv, q, k, v, out, is_causal=is_causal, scale=s
        ),
    }
    note = f"B, H, T, D = {', '.join(map(str, shape))}, {'causal' if is_causal else 'every key seen'}"
    _measure(f"attention_tangent, T = {t}, D = {d}", note, calls, report, benchmark)


@pytest.mark.parametrize("name", tangent_ops.ACTIVATIONS)
def test_activation(name: str, report: Report, benchmark: BenchmarkFixture) -> None:
    """As a step uses it: the function once, its derivative in the pull-back and in two tangents."""
    x, *cotangents = torch.randn(4, 2048, 512)

    def composition() -> None:
        if name == "silu":
            F.silu(x)
            for c in cotangents:
                torch.ops.aten.silu_backward(c, x)
            return
        approximate = "tanh" if name == "gelu_tanh" else "none"
        F.gelu(x, approximate=approximate)
        for c in cotangents:
            torch.ops.aten.gelu_backward(c, x, approximate=approximate)

    def fused() -> None:
        _, derivative = tangent_ops.activation(x, name)
        for c in cotangents:
            c * derivative

    calls: Calls = {f"{name}, three times its backward": composition, "activation, three products": fused}
    _measure(f"activation, {name}", "x [2048, 512]", calls, report, benchmark)


def _measure(title: str, what: str, calls: Calls, report: Report, benchmark: BenchmarkFixture) -> None:
    """The second of `calls` against the first."""
    for call in calls.values():
        call()
    baseline, ours = calls
    timings = compare(calls, baseline, ROUNDS)
    rows = [
        {"": name, **timing.columns(), "bar": bar(timing.ratio, BAR) if name == ours else None}
        for name, timing in timings.items()
    ]
    report.add(title, f"float32, {what}; 1 thread.", rows)
    benchmark.extra_info["comparison"] = rows
    benchmark.pedantic(calls[ours], rounds=PEDANTIC_ROUNDS)
