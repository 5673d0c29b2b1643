"""The loss kernels for the CPU: against torch and `closed_forms` in float64."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curveball_fused import CurveBall, backends
from curveball_fused.backends import native
from tests.helpers import loss_cases
from tests.helpers.loss_cases import INFINITY, NAN
from tests.helpers.loss_truth import (
    DTYPES,
    arithmetic,
    check_cross_entropy,
    check_elements,
    check_errors,
    every_dtype,
    places,
    signs,
    triple,
)

if not backends.has_operators():
    pytest.skip("needs the native kernels", allow_module_level=True)

operators: Any = torch.ops.curveball_fused
CLASSES = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 96, 1000, 1025]
check_rows, check_all = functools.partial(check_cross_entropy, operators), functools.partial(check_elements, operators)


@settings(deadline=None, max_examples=200)
@given(
    classes=st.sampled_from(CLASSES),
    rows=st.sampled_from([1, 2, 5, 40]),
    dtype=st.sampled_from(DTYPES),
    where=places,
    weighted=st.booleans(),
    ignored=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=st.sampled_from(["mean", "sum"]),
    sign=signs,
    seed=st.integers(0, 1000),
)
def test_cross_entropy(
    classes: int,
    rows: int,
    dtype: torch.dtype,
    where: tuple[int, int, int],
    weighted: bool,
    ignored: bool,
    smoothing: float,
    reduction: str,
    sign: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    target, options = loss_cases.random_targets(classes, rows, dtype, weighted, ignored)
    options |= dict(reduction=reduction, label_smoothing=smoothing)
    check_rows(*triple((len(target), classes), dtype, where), target, sign, **options)


@settings(deadline=None, max_examples=120)
@given(
    rows=st.integers(1, 5),
    columns=st.sampled_from([1, 2, 7, 8, 9, 15, 16, 17, 100, 1027]),
    dtype=st.sampled_from(DTYPES),
    where=places,
    reduction=st.sampled_from(["mean", "sum"]),
    sign=signs,
    weight=st.sampled_from([None, (1,), (0,), (0, 1)]),
    pos_weight=st.sampled_from([None, (1,), (0, 1)]),
    seed=st.integers(0, 1000),
)
def test_elementwise_losses(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    where: tuple[int, int, int],
    reduction: str,
    sign: float,
    weight: tuple[int, ...] | None,
    pos_weight: tuple[int, ...] | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    weights = loss_cases.random_weights(rows, columns, dtype, weight=weight, pos_weight=pos_weight)
    check_all((rows, columns), dtype, where, sign, reduction=reduction, **weights)


@every_dtype
def test_many_blocks(dtype: torch.dtype) -> None:
    """Also rows that are longer than a block."""
    check_rows(*triple((5000, 10), dtype), torch.randint(0, 10, (5000,)), label_smoothing=0.1)
    check_rows(*triple((2, 50_257), dtype), torch.full((2,), 50_256))
    pos_weight = torch.rand(40_003).to(arithmetic(dtype))
    check_all((3, 40_003), dtype, (0, 0, 0), 1.0, reduction="mean", pos_weight=pos_weight)


def test_what_the_native_operators_refuse() -> None:
    check_errors(operators)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    x, v, u = triple((4, 3), dtype)
    y, labels, w = torch.tensor([0, 2, 1, 1]), torch.rand(4, 3).to(dtype), torch.rand(3).to(arithmetic(dtype))
    options, check = (-100, True, 0.1, 1.0), torch.library.opcheck
    check(operators.cross_entropy_cotangent.default, (x, v, y, w, *options))
    _, _, products, rows = operators.cross_entropy_cotangent(x, v, y, w, *options)
    check(operators.cross_entropy_products.default, (x, v, u, y, w, rows, products, *options))
    check(operators.mse_cotangent.default, (x, v, labels, True, 1.0))
    check(operators.mse_products.default, (x, v, u, labels, products, True, 1.0))
    check(operators.bce_cotangent.default, (x, v, labels, w, None, True, 1.0))
    check(operators.bce_products.default, (x, v, u, labels, None, w, products, True, 1.0))


# ---------------------------------------------------------------------------------------------- the same bits


def everything(dtype: torch.dtype) -> list[Tensor]:
    """Results of all operators, on tensors of several blocks."""
    torch.manual_seed(0)
    x, v, u = triple((700, 97), dtype)
    y, labels = torch.randint(-1, 97, (700,)), torch.rand(700, 97).to(dtype)
    w = (torch.rand(97) + 0.1).to(arithmetic(dtype))
    results: list[Tensor] = []
    for weight, smoothing in ((None, 0.0), (w, 0.1)):
        options = -1, True, smoothing, -1.0
        results += operators.cross_entropy_cotangent(x, v, y, weight, *options)
        results.append(operators.cross_entropy_products(x, v, u, y, weight, results[-1], results[-2], *options))
    results += operators.mse_cotangent(x, v, labels, True, 1.0)
    results.append(operators.mse_products(x, v, u, labels, results[-1], True, 1.0))
    results += operators.bce_cotangent(x, v, labels, w, None, True, 1.0)
    results.append(operators.bce_products(x, v, u, labels, w, None, results[-1], True, 1.0))
    return results


@every_dtype
def test_the_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    one, threads = everything(dtype), torch.get_num_threads()
    try:
        for n in (2, 3):
            torch.set_num_threads(n)
            assert all(torch.equal(a, b) for a, b in zip(one, everything(dtype), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("instruction_set", native.CPU.module.INSTRUCTION_SETS.split(","))
def test_the_same_bits_from_every_instruction_set(instruction_set: str, tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "import torch; torch.set_num_threads(1)\n"
        "from tests.backends.test_cpu_losses import DTYPES, everything\n"
        f"torch.save([everything(dtype) for dtype in DTYPES], {str(tmp_path / 'results')!r})"
    )
    environment = os.environ | {"CURVEBALL_INSTRUCTION_SET": instruction_set, "CURVEBALL_REQUIRE_NATIVE": "1"}
    process = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    if "CURVEBALL_INSTRUCTION_SET" in process.stderr:
        pytest.skip(f"this processor has no {instruction_set}")
    assert process.returncode == 0, process.stderr
    for dtype, theirs in zip(DTYPES, torch.load(tmp_path / "results"), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(everything(dtype), theirs, strict=True))


# ---------------------------------------------------------------------------------------------- rows that are special


@every_dtype
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_rows_are_not_even_read(dtype: torch.dtype, smoothing: float) -> None:
    loss_cases.check_ignored_rows(operators, dtype, 9, smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (0, 0), (3, 0)])
def test_nothing_to_learn_from(shape: tuple[int, int], smoothing: float) -> None:
    loss_cases.check_nothing_to_learn_from(operators, shape, smoothing)


def test_no_elements() -> None:
    loss_cases.check_no_elements(operators)


@pytest.mark.parametrize("bad", [-1, 7, 2**40, -(2**62)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_target_that_is_no_class(bad: int, weighted: bool, smoothing: float) -> None:
    loss_cases.check_a_target_that_is_no_class(operators, bad, weighted, smoothing)


@every_dtype
@pytest.mark.parametrize("classes", [11, 40])
@pytest.mark.parametrize("mask", ["-inf", "lowest"])
@pytest.mark.parametrize("first", [False, True])
def test_masked_logits(dtype: torch.dtype, classes: int, mask: str, first: bool) -> None:
    loss_cases.check_masked_logits(operators, dtype, classes, mask, first)


@pytest.mark.parametrize("classes", [5, 40])
def test_a_row_that_is_all_masked(classes: int) -> None:
    loss_cases.check_a_row_that_is_all_masked(operators, classes)


@every_dtype
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_large_logits(dtype: torch.dtype, shift: float) -> None:
    loss_cases.check_large_logits(operators, dtype, shift, 40)


@every_dtype
@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize("place", [0, 5, 17, -1])
def test_infinite_logits_make_the_loss_nan(dtype: torch.dtype, value: float, place: int) -> None:
    loss_cases.check_infinite_logits(operators, dtype, value, place, 21)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_rounding_does_not_make_it_look_concave(offset: float) -> None:
    loss_cases.check_that_it_looks_convex(operators, offset)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, 1e-3, 30.0, -30.0, 80.0, -80.0, 1e4, -1e4])
def test_saturated_logits(value: float) -> None:
    loss_cases.check_saturated_logits(operators, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp_and_log1p_to_a_few_units_in_the_last_place(dtype: torch.dtype) -> None:
    """sigmoid(-x) = e^-x / (1 + e^-x) is g for the target 0, whose loss is log(1 + e^x)."""
    x = torch.linspace(-80, 20, 4001, dtype=torch.float64).to(dtype)
    zero, epsilon = torch.zeros_like(x), torch.finfo(dtype).eps
    c = operators.bce_cotangent(x, zero, zero, None, None, False, 1.0)[1]
    exact = torch.sigmoid(x.double())
    assert ((c.double() - exact) / exact).abs().max() <= 4 * epsilon
    loss = torch.stack([operators.bce_cotangent(a, a, 0 * a, None, None, False, 1.0)[0] for a in x.view(-1, 1)[::10]])
    exact = F.softplus(x[::10].double(), threshold=100.0)
    assert ((loss - exact) / exact).abs().max() <= 6 * epsilon


# ---------------------------------------------------------------------------------------------- in a step


LABELS, INDEX = torch.rand(6, 5, dtype=torch.float64), torch.tensor([0, 4, 2, 2, 1, 3])


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda out: F.cross_entropy(out, INDEX),
        lambda out: F.mse_loss(out, LABELS),
        lambda out: F.binary_cross_entropy_with_logits(out, LABELS),
    ],
    ids=["cross entropy", "mse", "bce"],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_step_takes_them_and_goes_where_torch_goes(
    loss_fn: Any, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs that are not contiguous, too."""
    x, start = torch.randn(6, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    calls: list[str] = []
    original = backends.loss_kernels
    monkeypatch.setattr(backends, "loss_kernels", lambda chosen: calls.append(chosen) or original(chosen))

    def train(backend: str) -> tuple[Tensor, Tensor]:
        w = torch.nn.Parameter(start.clone())
        optimizer = CurveBall([w], backend=backend)
        for _ in range(4):
            loss, _ = optimizer.step(lambda: (w @ x.T).T if transposed else x @ w.T, loss_fn)
        return w.detach(), loss

    torch.testing.assert_close(train("cpu"), train("torch"), rtol=1e-10, atol=1e-12)
    assert len(calls) == 8 and set(calls) == {"cpu"}
