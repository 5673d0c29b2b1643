"""The tangent operators against torch's own forward-mode derivatives in float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from curveball_fused import backends, tangent_ops

native = pytest.mark.skipif(not backends.has_operators(), reason="needs the native library")
BACKENDS = ["auto", "torch"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2}
HERE = os.path.dirname(os.path.abspath(__file__))
INSTRUCTION_SETS = ["avx512", "avx2", "default"]


def doubles(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.double() for t in tensors]


def jvp(function: Callable[..., Tensor], primals: list[Tensor], tangents: list[Tensor]) -> Tensor:
    return torch.func.jvp(function, tuple(primals), tuple(tangents))[1]  # type: ignore[no-any-return]


def assert_near(result: Tensor, truth: Tensor) -> None:
    """To rounding, of the largest number around: the tangents are sums of terms that may cancel."""
    assert result.shape == truth.shape
    scale = max(1.0, truth.abs().max().item()) if truth.numel() else 1.0
    torch.testing.assert_close(result.double(), truth, rtol=0, atol=TOLERANCE[result.dtype] * scale)


# ---------------------------------------------------------------------------------------------- layer norm


def layer_norm_case(rows: int, size: int, dtype: torch.dtype, offset: float = 0.0) -> tuple[list[Tensor], list[Tensor]]:
    dx, x = torch.randn(2, rows, size, dtype=torch.float64).to(dtype)
    x = x + offset
    vectors = list(torch.randn(3, size, dtype=torch.float64).to(dtype))
    wide = x.double() if dtype == torch.float64 else x.float()
    mean = wide.mean(1)
    rstd = (wide.double().var(1, unbiased=False) + 1e-5).rsqrt().to(wide.dtype)
    return [dx, x, mean, rstd], vectors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 37), (3, 16), (2, 128), (2, 3000), (0, 7), (7, 48)])
def test_layer_norm(shape: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    (dx, x, mean, rstd), (w, dw, db) = layer_norm_case(*shape, dtype)
    for weight, dweight, dbias in ((w, dw, db), (None, None, None), (w, None, db), (w, dw, None)):
        result = tangent_ops.layer_norm_tangent(dx, x, mean, rstd, weight, dweight, dbias, backend=backend)
        one, zero = torch.ones_like(w), torch.zeros_like(w)
        parts = doubles(x, one if weight is None else weight, zero)
        tangents = doubles(dx, zero if dweight is None else dweight, zero if dbias is None else dbias)
        truth = jvp(lambda x, w, b: F.layer_norm(x, shape[1:], w, b, 1e-5), parts, tangents)
        assert_near(result, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype, backend: str) -> None:
    (dx, x, _, _), (w, dw, db) = layer_norm_case(6, 75, dtype, offset=2.0)
    wide = x if dtype == torch.float64 else x.float()
    rstd = (wide.square().mean(1) + 1e-3).rsqrt()
    result = tangent_ops.layer_norm_tangent(dx, x, None, rstd, w, dw, db, backend=backend)
    truth = jvp(lambda x, w, b: F.rms_norm(x, (75,), w, 1e-3) + b, doubles(x, w, db), doubles(dx, dw, db))
    assert_near(result, truth)


# ---------------------------------------------------------------------------------------------- batch norm


def batch_norm_case(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> tuple[list[Tensor], list[Tensor]]:
    dx, x = (t.to(dtype) for t in torch.randn(2, *shape, dtype=torch.float64))
    if channels_last:
        dx, x = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (dx, x))
    dims = [d for d in range(len(shape)) if d != 1]
    wide = x.double()
    mean, rstd = wide.mean(dims), (wide.var(dims, unbiased=False) + 1e-5).rsqrt()
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    vectors = list(torch.randn(3, shape[1], dtype=torch.float64).to(dtype))
    return [dx, x, mean.to(statistics), rstd.to(statistics)], vectors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (3, 20, 4, 4), (9, 17), (2, 33, 6), (2, 5, 2, 3, 2), (5, 16, 37, 41)])
def test_batch_norm(shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, backend: str) -> None:
    (dx, x, mean, rstd), (w, dw, db) = batch_norm_case(shape, dtype, channels_last)
    one, zero = torch.ones_like(w), torch.zeros_like(w)
    for weight, dweight, dbias in ((w, dw, db), (None, None, None), (w, dw, None)):
        parts = doubles(x, one if weight is None else weight, zero)
        tangents = doubles(dx, zero if dweight is None else dweight, zero if dbias is None else dbias)
        for training in (True, False):

            def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
                if training:
                    return F.batch_norm(x, None, None, w, b, True)
                return F.batch_norm(x, mean.double(), rstd.double() ** -2 - 1e-5, w, b, False)

            result = tangent_ops.batch_norm_tangent(
                dx, x, mean, rstd, weight, dweight, dbias, training=training, backend=backend
            )
            assert result.stride() == x.stride()
            assert_near(result, jvp(function, parts, tangents))


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 0, 2, 2), (2, 3, 0, 2)])
def test_batch_norm_of_nothing(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    statistics = torch.ones(shape[1])
    assert tangent_ops.batch_norm_tangent(x, x, statistics, statistics, training=True).shape == shape


# ---------------------------------------------------------------------------------------------- attention


def attention_case(b: int, h: int, t: int, s: int, d: int, e: int, dtype: torch.dtype) -> list[Tensor]:
    """dq, dk, dv, q, k, v as a model makes them: heads are columns of a wider tensor."""

    def heads(rows: int, width: int) -> Tensor:
        return torch.randn(b, rows, h, width, dtype=torch.float64).to(dtype).transpose(1, 2)

    return [heads(t, d), heads(s, d), heads(s, e), heads(t, d), heads(s, d), heads(s, e)]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale)


ATTENTION = [
    (2, 3, 5, 7, 4, 6),
    (1, 1, 1, 1, 1, 1),
    (2, 2, 65, 65, 64, 64),
    (1, 2, 130, 300, 33, 17),
    (1, 2, 200, 90, 16, 48),
    (1, 3, 90, 200, 16, 5),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sizes", ATTENTION)
def test_attention(sizes: tuple[int, ...], is_causal: bool, dtype: torch.dtype, backend: str) -> None:
    case = attention_case(*sizes, dtype)
    wide = doubles(*case)
    out = attention(*wide[3:], None, is_causal, 0.3)
    result = tangent_ops.attention_tangent(*case, out.to(dtype), is_causal=is_causal, scale=0.3, backend=backend)
    truth = jvp(lambda q, k, v: attention(q, k, v, None, is_causal, 0.3), wide[3:], wide[:3])
    assert_near(result, truth)
    assert result.transpose(1, 2).is_contiguous()


def masks(b: int, h: int, t: int, s: int) -> dict[str, Tensor]:
    numbers = torch.randn(b, h, t, s, dtype=torch.float64)
    rows = numbers.masked_fill(torch.rand(b, h, t, s) < 0.4, -math.inf)
    rows[:, :, 1] = -math.inf
    rows[0, 0, 3, :-1] = -math.inf
    padding = torch.zeros(b, 1, 1, s, dtype=torch.float64)
    padding[..., -s // 2 :] = -math.inf
    transposed = numbers.mT.contiguous().mT
    shared = torch.randn(t, s, dtype=torch.float64).expand(b, h, t, s)
    per_query = torch.randn(t, 1, dtype=torch.float64).expand(b, h, t, s)
    return dict(rows=rows, padding=padding.expand(b, h, t, s), transposed=transposed, shared=shared, query=per_query)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["rows", "padding", "transposed", "shared", "query"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_with_a_mask(is_causal: bool, kind: str, dtype: torch.dtype, backend: str) -> None:
    b, h, t, s, d, e = 2, 2, 40, 150, 8, 12
    mask = masks(b, h, t, s)[kind].to(dtype)
    case = attention_case(b, h, t, s, d, e, dtype)
    wide, whole = doubles(*case), mask.double()
    if is_causal:
        whole = whole + torch.full((t, s), -math.inf, dtype=torch.float64).triu(1)
    seen = (whole > -math.inf).any(-1, keepdim=True)  # torch's derivative of a row that is masked throughout is NaN
    safe = torch.where(seen, whole, 0.0)
    out = torch.where(seen, attention(*wide[3:], safe, False, 0.7), 0.0)
    truth = torch.where(seen, jvp(lambda q, k, v: attention(q, k, v, safe, False, 0.7), wide[3:], wide[:3]), 0.0)
    arguments = (*case, out.to(dtype), mask)
    result = tangent_ops.attention_tangent(*arguments, is_causal=is_causal, scale=0.7, backend=backend)
    assert kind != "rows" or not seen.all()
    assert_near(result, truth)


def test_attention_of_large_scores() -> None:
    """The largest score moves with every block of keys, far beyond what e^S could hold."""
    case = attention_case(1, 1, 20, 400, 8, 8, torch.float32)
    case[4] = case[4] * torch.linspace(1, 60, 400).view(-1, 1)
    wide = doubles(*case)
    out = attention(*wide[3:], None, False, 1.0)
    result = tangent_ops.attention_tangent(*case, out.float(), scale=1.0)
    truth = jvp(lambda q, k, v: attention(q, k, v, None, False, 1.0), wide[3:], wide[:3])
    # A score of 500 is right to 3e-5 in float32, and so are the exponentials.
    torch.testing.assert_close(result.double(), truth, rtol=0, atol=2e-4 * truth.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(0, 2, 3, 3, 4, 4), (1, 2, 0, 3, 4, 4), (1, 2, 3, 0, 4, 4)])
def test_attention_of_nothing(sizes: tuple[int, ...], backend: str) -> None:
    b, h, t, _, _, e = sizes
    result = tangent_ops.attention_tangent(
        *attention_case(*sizes, torch.float32), torch.zeros(b, h, t, e), scale=1.0, backend=backend
    )
    assert result.shape == (b, h, t, e) and not result.any()


def test_attention_hands_on_what_is_not_a_number() -> None:
    case = attention_case(1, 1, 4, 6, 4, 4, torch.float32)
    case[3][0, 0, 2, 1] = math.nan
    out = attention(*case[3:], None, False, 1.0)
    result = tangent_ops.attention_tangent(*case, out, scale=1.0)
    assert result[0, 0, 2].isnan().all() and result[0, 0, [0, 1, 3]].isfinite().all()


# ---------------------------------------------------------------------------------------------- activation

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def precise(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """In float64, and without the cancellation in 1 + erf(x) and 1 + tanh(x)."""
    if name == "gelu":
        below = 0.5 * torch.special.erfc(-x / math.sqrt(2))
        return x * below, below + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    a, slope = x, torch.ones_like(x)
    if name == "gelu_tanh":
        a = 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    return x * torch.sigmoid(a), torch.sigmoid(a) + x * torch.sigmoid(a) * torch.sigmoid(-a) * slope


@pytest.mark.parametrize("name", tangent_ops.ACTIVATIONS)
def test_the_precise_functions_are_torchs(name: str) -> None:
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    y, derivative = precise(x, name)
    torch.testing.assert_close(y, FUNCTIONS[name](x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(derivative, jvp(FUNCTIONS[name], [x], [torch.ones_like(x)]), rtol=1e-12, atol=1e-12)


@native
@pytest.mark.parametrize("name", tangent_ops.ACTIVATIONS)
def test_activation_is_right_to_a_few_units_in_the_last_place(name: str) -> None:
    x = torch.cat([torch.linspace(-9, 9, 40001), torch.logspace(-30, 4, 4001), -torch.logspace(-30, 0.9, 4001)])
    y, derivative = tangent_ops.activation(x, name)
    true_y, true_derivative = precise(x.double(), name)
    torch.testing.assert_close(y.double(), true_y, rtol=6e-7, atol=1e-44)
    # The derivative has a root, where no number of units in the last place can be kept.
    torch.testing.assert_close(derivative.double(), true_derivative, rtol=6e-7, atol=3e-7)
    far = x < -3
    torch.testing.assert_close(derivative.double()[far], true_derivative[far], rtol=2e-6, atol=1e-44)
    y, derivative = tangent_ops.activation(x.double(), name)
    torch.testing.assert_close(y, true_y, rtol=1e-13, atol=1e-300)
    torch.testing.assert_close(derivative, true_derivative, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", tangent_ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (37,), (3, 5, 7)])
def test_activation(shape: tuple[int, ...], dtype: torch.dtype, name: str, backend: str) -> None:
    x = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    y, derivative = tangent_ops.activation(x, name, backend=backend)
    true_y, true_derivative = precise(x.double(), name)
    assert_near(y, true_y)
    assert_near(derivative, true_derivative)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", tangent_ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activation_where_numbers_end(dtype: torch.dtype, name: str, backend: str) -> None:
    ends = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0, -0.0], dtype=dtype)
    y, derivative = tangent_ops.activation(ends.repeat(5), name, backend=backend)
    nan, inf = math.nan, math.inf
    # At -inf torch, too, says 0 x inf; and so it does in the derivative on both sides.
    expected = torch.tensor([nan, inf, nan, 1e30, 0.0, 0.0, 0.0], dtype=dtype)
    torch.testing.assert_close(y, expected.repeat(5), equal_nan=True, rtol=0, atol=0)
    if backend == "auto":
        expected = torch.tensor([nan, nan, nan, 1, 0, 0.5, 0.5], dtype=dtype)
        torch.testing.assert_close(derivative, expected.repeat(5), equal_nan=True, rtol=0, atol=2e-7)


def test_activation_keeps_the_layout() -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    y, derivative = tangent_ops.activation(x, "gelu")
    assert y.stride() == derivative.stride() == x.stride()
    torch.testing.assert_close(y, F.gelu(x))


# ---------------------------------------------------------------------------------------------- threads, processors


def everything() -> list[Tensor]:
    """Results of all operators, large enough for several threads."""
    results: list[Tensor] = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(3)
        statistics, vectors = layer_norm_case(700, 131, dtype)
        results.append(tangent_ops.layer_norm_tangent(*statistics, *vectors))
        for last in (False, True):
            statistics, vectors = batch_norm_case((8, 19, 33, 31), dtype, last)
            results.append(tangent_ops.batch_norm_tangent(*statistics, *vectors, training=True))
        x = torch.randn(100_003, dtype=torch.float64).to(dtype)
        for name in tangent_ops.ACTIVATIONS:
            results += tangent_ops.activation(x, name)
        case = attention_case(2, 3, 200, 150, 20, 24, dtype)
        out = attention(*case[3:], None, True, 0.3)
        results.append(tangent_ops.attention_tangent(*case, out, is_causal=True, scale=0.3))
    return results


def test_threads_give_the_same_bits() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything()
        torch.set_num_threads(2)
        two = everything()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@native
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set(name: str, tmp_path: Any) -> None:
    """The same bits from all but attention, where products and sums are fused if the processor can."""
    if name not in backends.build_info().get("cpu instruction sets", ""):
        pytest.skip(f"no loops for {name} in this build")
    environment = os.environ | {"CURVEBALL_INSTRUCTION_SET": name, "CURVEBALL_REQUIRE_NATIVE": "1"}
    script = "import sys, torch, test_tangent_ops as tests; torch.save(tests.everything(), sys.argv[1])"
    command = [sys.executable, "-c", script, str(tmp_path / "all")]
    environment["PYTHONPATH"] = os.pathsep.join((os.path.dirname(HERE), HERE))
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "CURVEBALL_INSTRUCTION_SET names" in run.stderr:
        pytest.skip(f"this processor lacks {name}")
    assert run.returncode == 0, run.stderr
    for a, b in zip(torch.load(tmp_path / "all"), everything(), strict=True):
        if a.dim() == 4 and a.shape[2] == 200:
            assert_near(a, b.double())
        else:
            assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------- operators


def samples() -> list[tuple[Any, tuple[Any, ...]]]:
    operators = torch.ops.curveball_fused
    statistics, vectors = layer_norm_case(3, 20, torch.float32)
    planes, channels = batch_norm_case((2, 3, 4, 5), torch.float32, True)
    case = attention_case(1, 2, 5, 6, 4, 3, torch.float32)
    out = attention(*case[3:], None, False, 0.5)
    return [
        (operators.layer_norm_tangent, (*statistics, *vectors)),
        (operators.layer_norm_tangent, (*statistics[:2], None, statistics[3], None, None, None)),
        (operators.batch_norm_tangent, (*planes, *channels, True)),
        (operators.attention_tangent, (*case, out, None, False, 0.5)),
        (operators.attention_tangent, (*case, out, torch.zeros(5, 6).expand(1, 2, 5, 6), True, 0.5)),
        (operators.activation, (torch.randn(3, 4), "gelu_tanh")),
    ]


@native
@pytest.mark.parametrize("index", range(6))
def test_opcheck(index: int) -> None:
    operator, arguments = samples()[index]
    torch.library.opcheck(operator, arguments)


X, V = torch.randn(4, 6), torch.ones(6)
Q, K = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tangent_ops.layer_norm_tangent(X[0], X[0], V, V), r"contiguous \[N, D\]"),
        (lambda: tangent_ops.layer_norm_tangent(X[:2], X, X[:, 0], X[:, 0]), "dx is .*must agree"),
        (lambda: tangent_ops.layer_norm_tangent(X.T.contiguous().T, X, V[:4], V[:4]), "dx is laid out differently"),
        (lambda: tangent_ops.layer_norm_tangent(X, X, None, V), r"rstd must be torch.float32\[4\]"),
        (lambda: tangent_ops.layer_norm_tangent(X, X, None, V[:4], V.double()), r"weight must be torch.float32\[6\]"),
        (lambda: tangent_ops.layer_norm_tangent(X.half(), X.half(), None, V[:4].half()), "rstd must be torch.float32"),
        (lambda: tangent_ops.batch_norm_tangent(X[0], X[0], V, V, training=True), r"\[N, C, ...\]"),
        (lambda: tangent_ops.batch_norm_tangent(X, X, V[:4], V, training=True), r"mean must be torch.float32\[6\]"),
        (lambda: tangent_ops.batch_norm_tangent(X[:, ::2], X[:, ::2], V, V, training=True), "channels-last"),
        (lambda: tangent_ops.attention_tangent(Q[0], K, K, Q, K, K, Q, scale=1.0), "dq must be"),
        (lambda: tangent_ops.attention_tangent(Q, K, K, Q[0], K, K, Q, scale=1.0), "q, k and v must be"),
        (lambda: tangent_ops.attention_tangent(Q, K, K, Q, K, K[:, :, :2], Q, scale=1.0), "v must be"),
        (lambda: tangent_ops.attention_tangent(Q, K, K, Q, K, K, Q.mT.contiguous().mT, scale=1.0), "last dimension"),
        (lambda: tangent_ops.attention_tangent(Q, K, K, Q, K, K, Q, torch.ones(3, 5), scale=1.0), "mask must be"),
        (lambda: tangent_ops.activation(X, "relu"), "no activation 'relu'"),
        (lambda: tangent_ops.activation(X[:, ::2], "gelu"), "not dense"),
        (lambda: tangent_ops.activation(X, "gelu", backend="fast"), "backend must be one of"),
    ],
)
def test_arguments_that_do_not_fit(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


@native
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda o: o.layer_norm_tangent(X, X, None, V, None, None, None), "rstd must be .* 4 elements"),
        (lambda o: o.layer_norm_tangent(X.half(), X.half(), None, V, None, None, None), "float32 and float64"),
        (lambda o: o.layer_norm_tangent(X, X.double(), None, V, None, None, None), "dx has dtype float32"),
        (lambda o: o.batch_norm_tangent(X, X, V[:4], V, None, None, None, True), "mean must be .* 6 elements"),
        (lambda o: o.batch_norm_tangent(X[:, ::2], X[:, ::2], V[:3], V[:3], None, None, None, True), "channels-last"),
        (lambda o: o.attention_tangent(Q, K, K, Q, K, K, K, None, False, 1.0), "out must have the sizes"),
        (lambda o: o.attention_tangent(Q, K, K, Q, K, K, Q.mT.contiguous().mT, None, False, 1.0), "last dimension"),
        (lambda o: o.activation(X, "relu"), "no activation"),
        (lambda o: o.activation(X[:, ::2], "gelu"), "not dense"),
    ],
)
def test_operators_refuse_what_does_not_fit(call: Any, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        call(torch.ops.curveball_fused)
