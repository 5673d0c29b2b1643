"""The tangent operators in Triton against forward-mode autograd in float64: on a GPU, else by the interpreter."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

from curveball_fused import triton_norms, triton_tangents  # noqa: E402

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF, NAN = math.inf, math.nan
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on NaN, in the interpreter
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def dot_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as integers, which its tl.dot multiplies as such."""
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder

    plain = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.create_fp_ext(t, tl.float32) for t in (a, b))
        return plain(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def draw(*shape: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """Normal numbers, `offset` elements after an aligned address."""
    return torch.randn(math.prod(shape) + offset, dtype=torch.float64).to(dtype).to(DEVICE)[offset:].view(shape)


def tangent(
    function: Callable[..., Tensor], primals: list[Tensor], tangents: list[Tensor], dtype: torch.dtype
) -> Tensor:
    """Of `function`, in `dtype`."""
    return jvp(function, tuple(t.to(dtype) for t in primals), tuple(t.to(dtype) for t in tangents))[1]


def check(got: Tensor, function: Callable[..., Tensor], primals: list[Tensor], tangents: list[Tensor]) -> None:
    """Holds `got` against float64; for low precision, to twice the error of torch's own tangent in that precision."""
    truth = tangent(function, primals, tangents, torch.float64)
    assert got.shape == truth.shape and got.isfinite().all()
    error, size = (got.double() - truth).abs().max(), truth.abs().max()
    if got.dtype in TOLERANCE:
        assert error <= TOLERANCE[got.dtype] * size
    else:
        composed = tangent(function, primals, tangents, got.dtype)
        # The interpreter cuts bfloat16 off instead of rounding to nearest.
        cut = torch.finfo(got.dtype).eps * size if INTERPRETED and got.dtype == torch.bfloat16 else 0.0
        assert error <= 2 * (composed.double() - truth).abs().max() + cut


# --------------------------------------------------------------------------------------------------- normalisations


def statistics(x: Tensor, dims: list[int], centred: bool = True) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation as the forward kernels give them."""
    exact, dtype = x.double(), arithmetic(x.dtype)
    mean = exact.mean(dims, keepdim=True) if centred else torch.zeros_like(exact).mean(dims, keepdim=True)
    rstd = ((exact - mean).square().mean(dims) + 1e-5).rsqrt()
    return mean.flatten().to(dtype), rstd.to(dtype)


@every_dtype
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 7), (40, 48), (5, 64), (2, 1000), (2, 8200)])
def test_layer_norm(dtype: torch.dtype, rows: int, length: int) -> None:
    for offset in (0, 1):
        x, dx = (draw(rows, length, dtype=dtype, offset=offset) + shift for shift in (3, 0))
        w, b, dw, db = (draw(length, dtype=dtype) for _ in range(4))
        got = triton_tangents.layer_norm_tangent(dx, x, *statistics(x, [1]), w, dw, db)
        assert got.dtype == dtype
        if length == 1:  # x̂ is 0 and stays so
            torch.testing.assert_close(got, db.expand(rows, 1))
            continue
        check(got, lambda x, w, b: F.layer_norm(x, (length,), w, b), [x, w, b], [dx, dw, db])


@every_dtype
@pytest.mark.parametrize("length", [33, 8200])
def test_rms_norm(dtype: torch.dtype, length: int) -> None:
    x, dx, w, dw = *(draw(3, length, dtype=dtype) for _ in range(2)), *(draw(length, dtype=dtype) for _ in range(2))
    got = triton_tangents.layer_norm_tangent(dx, x, None, statistics(x, [1], centred=False)[1], w, dw, None)
    check(got, lambda x, w: F.rms_norm(x, (length,), w, 1e-5), [x, w], [dx, dw])


@pytest.mark.parametrize("length", [20, 8200])
def test_layer_norm_without_parameters(length: int) -> None:
    x, dx = (draw(2, length, dtype=torch.float64) for _ in range(2))
    mean, rstd = statistics(x, [1])
    w, b, db = (draw(length, dtype=torch.float64) for _ in range(3))
    got = triton_tangents.layer_norm_tangent(dx, x, mean, rstd, None, None, None)
    check(got, lambda x: F.layer_norm(x, (length,)), [x], [dx])
    got = triton_tangents.layer_norm_tangent(dx, x, mean, rstd, w, None, db)
    check(got, lambda x, b: F.layer_norm(x, (length,), w.to(x.dtype), b), [x, b], [dx, db])


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.fixture(params=[False, True], ids=["whole", "parts"])
def in_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether small channels too are shared by many programs."""
    if request.param:
        for name, value in dict(TILE=64, COLUMNS=16, STEPS=1).items():
            monkeypatch.setattr(triton_norms, name, value)
    return bool(request.param)


@every_dtype
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 20, 6, 8), (90, 5), (7, 70, 3)])
def test_batch_norm(shape: tuple[int, ...], training: bool, last: bool, dtype: torch.dtype, in_parts: bool) -> None:
    channels = shape[1]
    x, dx = (draw(*shape, dtype=dtype) + shift for shift in (3, 0))
    if last:
        x, dx = channels_last(x), channels_last(dx)
    w, b, dw, db = (draw(channels, dtype=dtype) for _ in range(4))
    mean, rstd = statistics(x, [i for i in range(x.dim()) if i != 1])
    running: tuple[Tensor | None, ...] = (None, None)
    if not training:
        mean, rstd = draw(channels, dtype=arithmetic(dtype)), draw(channels, dtype=arithmetic(dtype)).abs() + 0.5
        running = mean, rstd.double().pow(-2) - 1e-5
    got = triton_tangents.batch_norm_tangent(dx, x, mean, rstd, w, dw, db, training)
    assert got.dtype == dtype and got.stride() == x.stride()

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        fixed = (None if t is None else t.to(x.dtype) for t in running)
        return F.batch_norm(x, *fixed, w, b, training)

    check(got, function, [x, w, b], [dx, dw, db])


def test_batch_norm_without_parameters(in_parts: bool) -> None:
    x, dx = (draw(6, 4, 9, 4, dtype=torch.float64) for _ in range(2))
    got = triton_tangents.batch_norm_tangent(dx, x, *statistics(x, [0, 2, 3]), None, None, None, True)
    check(got, lambda x: F.batch_norm(x, None, None, training=True), [x], [dx])


def test_norms_of_nothing() -> None:
    x, some = draw(0, 5, dtype=torch.float32), torch.ones(5, device=DEVICE)
    assert triton_tangents.layer_norm_tangent(x, x, some[:0], some[:0], some, some, some).shape == (0, 5)
    for shape in ((0, 5, 3), (2, 5, 0)):
        x = draw(*shape, dtype=torch.float32)
        assert triton_tangents.batch_norm_tangent(x, x, some, some, some, some, some, True).shape == shape


def test_a_row_that_is_not_finite_leaves_the_others_alone() -> None:
    x, dx = (draw(40, 48, dtype=torch.float32) for _ in range(2))
    mean, rstd = statistics(x, [1])
    expected = triton_tangents.layer_norm_tangent(dx, x, mean, rstd, None, None, None)
    dx[17, 3] = NAN
    got = triton_tangents.layer_norm_tangent(dx, x, mean, rstd, None, None, None)
    others = torch.arange(40, device=DEVICE) != 17
    assert got[17].isnan().all() and torch.equal(got[others], expected[others])


# -------------------------------------------------------------------------------------------------------- attention


def attention(mask: Tensor | None, causal: bool, scale: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """In plain torch; queries that see nothing give zero."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = scale * (q @ k.mT)
        if mask is not None:
            scores = scores + mask.to(scores.dtype)
        if causal:
            scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -INF)
        blind = (scores == -INF).all(-1, keepdim=True)
        return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0) @ v

    return function


def heads(length: int, width: int, dtype: torch.dtype) -> Tensor:
    """[2, 3, length, width], in memory as a projection leaves it."""
    return draw(2, length, 3, width, dtype=dtype).transpose(1, 2)


def check_attention(
    queries: int, keys: int, d: int, e: int, dtype: torch.dtype, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    q, dq, k, dk = (heads(length, d, dtype) for length in (queries, queries, keys, keys))
    v, dv, scale = heads(keys, e, dtype), heads(keys, e, dtype), 0.7 / math.sqrt(d)
    function = attention(mask, causal, scale)
    out = function(q.double(), k.double(), v.double()).to(dtype)
    expanded = None if mask is None else mask.expand(2, 3, queries, keys)
    got = triton_tangents.attention_tangent(dq, dk, dv, q, k, v, out, expanded, causal, scale)
    assert got.dtype == dtype and got.transpose(1, 2).is_contiguous()
    check(got, function, [q, k, v], [dq, dk, dv])
    return got


@every_dtype
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "d", "e"), [(5, 7, 8, 8), (1, 1, 1, 1), (70, 40, 16, 20), (35, 67, 33, 16), (20, 20, 130, 140)]
)
def test_attention(queries: int, keys: int, d: int, e: int, causal: bool, dtype: torch.dtype) -> None:
    check_attention(queries, keys, d, e, dtype, causal=causal)


@every_dtype
@pytest.mark.parametrize("shape", [(2, 3, 40, 70), (2, 1, 1, 70), (40, 1), ()])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_masks(shape: tuple[int, ...], causal: bool, dtype: torch.dtype) -> None:
    """Added to the scores, some of minus infinity, any dimension expanded."""
    mask = draw(*shape, dtype=dtype)
    if len(shape) == 4:
        mask[..., 10:55] = -INF  # a whole block of keys, but for float64 and float32 more than one
        mask[..., 0] = 0.5
    check_attention(40, 70, 16, 8, dtype, mask, causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_queries_that_see_nothing(dtype: torch.dtype) -> None:
    mask = torch.zeros(2, 1, 9, 70, dtype=dtype, device=DEVICE)
    mask[1, 0, 4] = -INF
    mask[0, 0, :, :66] = -INF  # nothing in the first blocks
    got = check_attention(9, 70, 16, 16, dtype, mask)
    assert not got[1, :, 4].any() and got[1, :, 5].all()


def test_attention_of_large_scores() -> None:
    """One key takes all the weight: exp would overflow without the maximum."""
    q, dq, k, dk, v, dv = (heads(40, 16, torch.float64) for _ in range(6))
    function = attention(None, False, 100.0)
    got = triton_tangents.attention_tangent(dq, dk, dv, q, k, v, function(q, k, v), None, False, 100.0)
    check(got, function, [q, k, v], [dq, dk, dv])


def test_attention_of_any_strides() -> None:
    whole = draw(3, 2, 2, 20, 4, 16, dtype=torch.float64)
    q, k, v = whole[0, :, :, :, 0], whole[1, :, :, ::2, 1], whole[2, :, :, :10, 2].flip(1)
    dq, dk, dv = (torch.randn_like(t) for t in (q, k, v))
    function = attention(None, True, 0.25)
    got = triton_tangents.attention_tangent(dq, dk, dv, q, k, v, function(q, k, v), None, True, 0.25)
    check(got, function, [q, k, v], [dq, dk, dv])


def test_attention_of_nothing() -> None:
    for queries, keys in ((0, 4), (4, 0), (0, 0)):
        q, k = heads(queries, 8, torch.float32), heads(keys, 8, torch.float32)
        got = triton_tangents.attention_tangent(q, k, k, q, k, k, torch.zeros_like(q), None, False, 1.0)
        assert got.shape == q.shape and not got.any()


# ------------------------------------------------------------------------------------------------------- activations


def exact(x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, y', the magnitude of what y' is the sum of, and of the exponent, in float64."""
    x = x.double()
    if name == "gelu":
        factor, slope = torch.special.erfc(-x / math.sqrt(2)) / 2, torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        exponent = torch.zeros_like(x)
    else:
        scale = 2 * math.sqrt(2 / math.pi)
        inner = x if name == "silu" else scale * (x + 0.044715 * x**3)
        factor, other = (i.clamp(max=0).exp() / (1 + i.abs().neg().exp()) for i in (inner, -inner))  # torch's underflow
        slope = factor * other * (1.0 if name == "silu" else scale * (1 + 3 * 0.044715 * x * x))
        exponent = torch.zeros_like(x) if name == "silu" else inner.abs()
    return x * factor, factor + x * slope, factor + (x * slope).abs(), exponent


NAMES = pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])


@NAMES
@every_dtype
def test_activation(name: str, dtype: torch.dtype) -> None:
    """float32 to 8 units in the last place of the value, far out too, beside what the exponent's own rounding makes."""
    x = torch.cat([torch.linspace(-20, 20, 2501), torch.logspace(-9, 0, 99), -torch.logspace(-9, 2, 99)])
    x = x.to(dtype).to(DEVICE)
    y, derivative, size, exponent = exact(x, name)
    got = triton_tangents.activation(x, name)
    epsilon = torch.finfo(arithmetic(dtype)).eps
    relative = 8 * epsilon + 2 * epsilon * exponent
    if dtype == torch.float64 and name == "gelu":
        size_y, size_derivative = x.double().abs(), 1 + size  # 1 + erf, as torch has it
    else:
        size_y, size_derivative = y.abs(), size
    # One rounding to the dtype (the interpreter cuts bfloat16 off), and what is below its range: for the arithmetic's,
    # numbers that are multiplied by x or by the derivative of a cubic polynomial of x.
    ulps = 0.0 if dtype == arithmetic(dtype) else 1.0 if INTERPRETED and dtype == torch.bfloat16 else 0.5
    of = torch.finfo(dtype)
    least = of.tiny * (of.eps if ulps < 1 else 1)
    least = least + torch.finfo(arithmetic(dtype)).tiny * epsilon * (2 + x.double().abs()) ** 3
    assert got[0].dtype == got[1].dtype == dtype
    for mine, truth, magnitude in ((got[0], y, size_y), (got[1], derivative, size_derivative)):
        assert ((mine.double() - truth).abs() <= relative * magnitude + ulps * of.eps * truth.abs() + least).all()


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activation_of_what_is_not_finite(name: str, dtype: torch.dtype) -> None:
    """As in torch, whose float64 kernels keep to the formulas."""
    function = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}[name]
    x = torch.tensor([INF, -INF, NAN, 1e9, -1e9, 0.0, -0.0], dtype=torch.float64, requires_grad=True)
    y = function(x)
    (derivative,) = torch.autograd.grad(y.sum(), x)
    got = triton_tangents.activation(x.detach().to(dtype).to(DEVICE), name)
    for mine, truth in zip(got, (y, derivative)):
        torch.testing.assert_close(mine.cpu().double(), truth.detach(), rtol=0, atol=0, equal_nan=True)


@NAMES
def test_activation_of_any_dense_shape(name: str) -> None:
    x = channels_last(draw(2, 3, 5, 9, dtype=torch.float32))
    y, derivative = triton_tangents.activation(x, name)
    assert y.stride() == derivative.stride() == x.stride()
    torch.testing.assert_close(y.double(), exact(x, name)[0], rtol=1e-5, atol=1e-6)
    for shape in ((), (0, 3), (1025,)):
        x = draw(*shape, dtype=torch.float32, offset=1)
        torch.testing.assert_close(
            triton_tangents.activation(x, name)[1].double(), exact(x, name)[1], rtol=1e-5, atol=1e-6
        )
