"""The tangent operators: threads, processors, and what they refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from curveball_fused import backends
from curveball_fused.ops import tangents as tangent_ops
from tests.helpers.tangent_cases import (
    assert_near,
    attention,
    attention_case,
    batch_norm_case,
    everything,
    layer_norm_case,
    native,
)

ROOT = Path(__file__).parents[2]
INSTRUCTION_SETS = ["avx512", "avx2", "default"]


# ---------------------------------------------------------------------------------------------- threads, processors


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
@pytest.mark.slow
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set(name: str, tmp_path: Any) -> None:
    """The same bits from all but attention, where products and sums are fused if the processor can."""
    if name not in backends.build_info().get("cpu instruction sets", ""):
        pytest.skip(f"no loops for {name} in this build")
    environment = os.environ | {"CURVEBALL_INSTRUCTION_SET": name, "CURVEBALL_REQUIRE_NATIVE": "1"}
    script = "import sys, torch; from tests.helpers import tangent_cases as t; torch.save(t.everything(), sys.argv[1])"
    command = [sys.executable, "-c", script, str(tmp_path / "all")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
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


CALLS = {
    "layer_norm": lambda dtype, **options: tangent_ops.layer_norm_tangent(
        *(t for part in layer_norm_case(3, 20, dtype) for t in part), **options
    ),
    "batch_norm": lambda dtype, **options: tangent_ops.batch_norm_tangent(
        *(t for part in batch_norm_case((2, 3, 4, 5), dtype, True) for t in part), training=True, **options
    ),
    "attention": lambda dtype, **options: tangent_ops.attention_tangent(
        *attention_case(1, 2, 5, 6, 4, 3, dtype), torch.zeros(1, 2, 5, 3, dtype=dtype), scale=0.5, **options
    ),
    "activation": lambda dtype, **options: tangent_ops.activation(torch.ones(3, dtype=dtype), "gelu", **options)[1],
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("backend", "dtype", "words"),
    [
        ("cuda", torch.float32, "no kernels for tangents"),
        ("triton", torch.float32, "CUDA tensors only"),
        pytest.param("cpu", torch.bfloat16, "not of torch.bfloat16", marks=native),
        pytest.param("cpu", torch.float16, "not of torch.float16", marks=native),
    ],
)
def test_a_named_backend_is_not_replaced_by_another(name: str, backend: str, dtype: torch.dtype, words: str) -> None:
    with pytest.raises(RuntimeError, match=f'backend="{backend}".*{words}.*"auto"'):
        CALLS[name](dtype, backend=backend)
    for fallback in ("auto", "torch"):
        assert CALLS[name](dtype, backend=fallback).dtype == dtype


@native
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auto_is_the_named_native_backend(name: str, dtype: torch.dtype) -> None:
    results = []
    for backend in ("auto", "cpu"):
        torch.manual_seed(0)
        results.append(CALLS[name](dtype, backend=backend))
    assert torch.equal(*results)
