"""The tangent operators in Triton on the GPU, at the sizes of models, against forward-mode autograd in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp

from curveball_fused.backends.dtypes import compute_dtype
from curveball_fused.backends.triton import tangents as triton_tangents
from tests.gpu.device import DEVICE, DTYPES, draw

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def check(
    got: Tensor, function: Callable[..., Tensor], primals: Sequence[Tensor], directions: Sequence[Tensor]
) -> None:
    """Holds `got` against float64; for low precision, to twice the error of torch's own tangent in that precision.

    That is no bar where torch's happens to be exact, as of attention to a single key: two roundings of the largest
    number are allowed.
    """

    def tangent(dtype: torch.dtype) -> Tensor:
        given = (tuple(t.to(dtype) for t in tensors) for tensors in (primals, directions))
        # Of a low-precision batch norm torch may give it in float32.
        return jvp(function, *given)[1].to(dtype).double()  # type: ignore[no-any-return]

    truth = tangent(torch.float64)
    assert got.shape == truth.shape and got.isfinite().all()
    error, size = (got.double() - truth).abs().max().item(), truth.abs().max().item()
    if got.dtype in TOLERANCE:
        assert error <= TOLERANCE[got.dtype] * size
    else:
        own = (tangent(got.dtype) - truth).abs().max().item()
        assert error <= 2 * max(own, torch.finfo(got.dtype).eps * size)


def statistics(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    mean = x.double().mean(dims)
    rstd = (x.double().var(dims, correction=0) + 1e-5).rsqrt()
    return mean.to(compute_dtype(x.dtype)), rstd.to(compute_dtype(x.dtype))


@every_dtype
@pytest.mark.parametrize(("rows", "length"), [(70_001, 10), (4096, 768), (3000, 1001), (513, 8192), (65, 50_257)])
def test_layer_norm(dtype: torch.dtype, rows: int, length: int) -> None:
    x, dx = draw((rows, length), dtype) + 2, draw((rows, length), dtype)
    w, b, dw, db = (draw((length,), dtype) for _ in range(4))
    got = triton_tangents.layer_norm_tangent(dx, x, *statistics(x, [1]), w, dw, db)
    check(got, lambda x, w, b: F.layer_norm(x, (length,), w, b), [x, w, b], [dx, dw, db])


@every_dtype
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(64, 64, 56, 56), (128, 512, 7, 7), (33, 3, 225, 225), (4099, 1000, 1, 1)])
def test_batch_norm(shape: tuple[int, int, int, int], training: bool, last: bool, dtype: torch.dtype) -> None:
    form = torch.channels_last if last else torch.contiguous_format
    x, dx = ((draw(shape, dtype) + shift).contiguous(memory_format=form) for shift in (2, 0))
    w, b, dw, db = (draw(shape[1:2], dtype) for _ in range(4))
    mean, rstd = statistics(x, [0, 2, 3])

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        fixed = (None, None) if training else (mean.to(x.dtype), (rstd.double().pow(-2) - 1e-5).to(x.dtype))
        return F.batch_norm(x, *fixed, w, b, training)

    got = triton_tangents.batch_norm_tangent(dx, x, mean, rstd, w, dw, db, training)
    check(got, function, [x, w, b], [dx, dw, db])
    again = triton_tangents.batch_norm_tangent(dx, x, mean, rstd, w, dw, db, training)
    assert torch.equal(got, again)


def attention(mask: Tensor | None, causal: bool, scale: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = scale * (q @ k.mT)
        if mask is not None:
            scores = scores + mask.to(scores.dtype)
        if causal:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -math.inf)
        return scores.softmax(-1) @ v

    return function


@every_dtype
@pytest.mark.parametrize("kind", ["plain", "causal", "mask"])
@pytest.mark.parametrize(
    ("queries", "keys", "d", "e"),
    [(512, 512, 64, 64), (77, 300, 64, 64), (300, 77, 128, 128), (129, 130, 80, 72), (65, 66, 256, 256)],
)
def test_attention(queries: int, keys: int, d: int, e: int, kind: str, dtype: torch.dtype) -> None:
    q, dq, k, dk, v, dv = (
        draw((2, length, 3, width), dtype).transpose(1, 2)
        for length, width in ((queries, d), (queries, d), (keys, d), (keys, d), (keys, e), (keys, e))
    )
    mask, causal, scale = None, kind == "causal", 1 / math.sqrt(d)
    if kind == "mask":
        mask = draw((2, 1, queries, keys), dtype)
        mask[..., 1:70] = -math.inf
    function = attention(mask, causal, scale)
    out = function(q.double(), k.double(), v.double()).to(dtype)
    expanded = None if mask is None else mask.expand(2, 3, queries, keys)
    got = triton_tangents.attention_tangent(dq, dk, dv, q, k, v, out, expanded, causal, scale)
    check(got, function, [q, k, v], [dq, dk, dv])


@every_dtype
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_activation(name: str, dtype: torch.dtype) -> None:
    function = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}[name]
    x = 3 * draw((1_000_003,), dtype)
    y, derivative = triton_tangents.activation(x, name)
    exact = x.double().requires_grad_()
    truth = function(exact)
    (slope,) = torch.autograd.grad(truth.sum(), exact)
    of, epsilon, size = torch.finfo(dtype), torch.finfo(compute_dtype(dtype)).eps, 1 + exact.detach().abs()
    for mine, wanted in ((y, truth.detach()), (derivative, slope)):
        assert ((mine.double() - wanted).abs() <= 16 * epsilon * size + of.eps * wanted.abs() + of.tiny).all()


def test_more_than_2_to_the_31_elements(need_memory: Callable[[float], None]) -> None:
    rows, length = 2**21 + 1, 1024
    need_memory(4.2 * 2 * rows * length)
    x, dx = (torch.empty(rows, length, dtype=torch.bfloat16, device=DEVICE).normal_() for _ in range(2))
    w = torch.ones(length, dtype=torch.bfloat16, device=DEVICE)
    mean, rstd = x.mean(1, dtype=torch.float32), torch.ones(rows, device=DEVICE)
    got = triton_tangents.layer_norm_tangent(dx, x, mean, rstd, w, w, w)
    some = torch.tensor([0, rows // 2, rows - 2, rows - 1], device=DEVICE)
    part = triton_tangents.layer_norm_tangent(dx[some], x[some], mean[some], rstd[some], w, w, w)
    assert torch.equal(got[some], part)
