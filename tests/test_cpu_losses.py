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
from loss_truth import (
    DTYPES,
    arithmetic,
    check_cross_entropy,
    check_elements,
    check_errors,
    cross_entropy,
    every_dtype,
    places,
    signs,
    triple,
)
from torch import Tensor

from curveball_fused import CurveBall, backends

if not backends.has_operators():
    pytest.skip("needs the native kernels", allow_module_level=True)

operators: Any = torch.ops.curveball_fused
CLASSES = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 96, 1000, 1025]
INFINITY, NAN = float("inf"), float("nan")
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
    target = torch.randint(0, classes, (rows,))
    options: dict[str, Any] = dict(reduction=reduction, label_smoothing=smoothing)
    if weighted:
        options["weight"] = torch.rand(classes).to(arithmetic(dtype)) + 0.1
    if ignored and classes > 1:
        options["ignore_index"] = int(target[0])
        target = torch.cat((target, (target[:1] + 1) % classes))  # one that is kept
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
    """Weights of one element, of a column each, of every element."""
    torch.manual_seed(seed)
    sizes = {None: None, (0,): (1,), (1,): (columns,), (0, 1): (rows, columns)}
    weights = {
        name: torch.rand(size).to(arithmetic(dtype)) + 0.2
        for name, size in (("weight", sizes[weight]), ("pos_weight", sizes[pos_weight]))
        if size is not None
    }
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
    check(operators.cross_entropy_products.default, (x, v, y, w, *options))
    _, _, products, rows = operators.cross_entropy_products(x, v, y, w, *options)
    check(operators.cross_entropy_dots.default, (x, v, u, y, w, rows, products, *options))
    check(operators.mse_products.default, (x, v, labels, True, 1.0))
    check(operators.mse_dots.default, (x, v, u, labels, products, True, 1.0))
    check(operators.bce_products.default, (x, v, labels, w, None, True, 1.0))
    check(operators.bce_dots.default, (x, v, u, labels, None, w, products, True, 1.0))


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
        results += operators.cross_entropy_products(x, v, y, weight, *options)
        results.append(operators.cross_entropy_dots(x, v, u, y, weight, results[-1], results[-2], *options))
    results += operators.mse_products(x, v, labels, True, 1.0)
    results.append(operators.mse_dots(x, v, u, labels, results[-1], True, 1.0))
    results += operators.bce_products(x, v, labels, w, None, True, 1.0)
    results.append(operators.bce_dots(x, v, u, labels, w, None, results[-1], True, 1.0))
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


@pytest.mark.parametrize("instruction_set", backends._native.INSTRUCTION_SETS.split(","))
def test_the_same_bits_from_every_instruction_set(instruction_set: str, tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "import torch; torch.set_num_threads(1)\n"
        "from test_cpu_losses import DTYPES, everything\n"
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
    x, v, u = triple((12, 9), dtype)
    target = torch.randint(0, 4, (12,))
    target[4:] = 4
    expected = cross_entropy(operators, x[:4], v[:4], u[:4], target[:4], label_smoothing=smoothing)
    for t in (x, v, u):
        t[4:] = NAN
    ours = cross_entropy(operators, x, v, u, target, ignore_index=4, label_smoothing=smoothing)
    assert not ours.c[4:].any() and torch.equal(ours.c[:4], expected.c)
    torch.testing.assert_close(ours[::2], expected[::2], rtol=1e-12, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (0, 0), (3, 0)])
def test_nothing_to_learn_from(shape: tuple[int, int], smoothing: float) -> None:
    """All targets ignored, no rows, no classes: as torch, NaN for the mean, 0 for the sum, and no gradient."""
    x, v, u = triple(shape, torch.float32)
    target = torch.full(shape[:1], -100)
    for reduction in ("mean", "sum"):
        ours = cross_entropy(operators, x, v, u, target, reduction=reduction, label_smoothing=smoothing)
        torch.testing.assert_close(ours.loss.float(), F.cross_entropy(x, target, reduction=reduction), equal_nan=True)
        assert ours.c.shape == x.shape and not ours.c.any()
        if reduction == "sum":
            assert not ours.products.any()


def test_no_elements() -> None:
    x = torch.zeros(0, 4)
    for mean, loss in ((True, NAN), (False, 0.0)):
        for name, weights in (("mse", ()), ("bce", (None, torch.ones(4)))):
            result = getattr(operators, f"{name}_products")(x, x, x, *weights, mean, 1.0)
            five = getattr(operators, f"{name}_dots")(x, x, x, x, *weights, result[2], mean, 1.0)
            torch.testing.assert_close(result[0].item(), loss, equal_nan=True)
            assert result[1].shape == x.shape and five.isnan().all() == mean


@pytest.mark.parametrize("bad", [-1, 7, 2**40, -(2**62)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_target_that_is_no_class(bad: int, weighted: bool, smoothing: float) -> None:
    """NaN in the loss, the products and its own row only."""
    x, v, u = triple((3, 7), torch.float32)
    weight = torch.rand(7) if weighted else None
    ours = cross_entropy(operators, x, v, u, torch.tensor([2, bad, 5]), weight=weight, label_smoothing=smoothing)
    assert ours.loss.isnan() and not ours.products.isfinite().all()
    assert ours.c[1].isnan().all() and ours.c[::2].isfinite().all()


@every_dtype
@pytest.mark.parametrize("classes", [11, 40])
@pytest.mark.parametrize("mask", ["-inf", "lowest"])
@pytest.mark.parametrize("first", [False, True])
def test_masked_logits(dtype: torch.dtype, classes: int, mask: str, first: bool) -> None:
    x, v, u = triple((4, classes), dtype)
    masked = slice(0, classes - 7) if first else slice(5, classes)
    x[:, masked] = -INFINITY if mask == "-inf" else torch.finfo(dtype).min
    target = torch.full((4,), classes - 3 if first else 1)
    ours = check_rows(x, v, u, target)
    assert not ours.c[:, masked].any()
    smoothed = cross_entropy(operators, x, v, u, target, label_smoothing=0.1)
    assert smoothed.loss > 1e3 and smoothed.c.isfinite().all() and smoothed.products.isfinite().all()


@pytest.mark.parametrize("classes", [5, 40])
def test_a_row_that_is_all_masked(classes: int) -> None:
    """Of finite numbers, the softmax is uniform; of -inf it is NaN."""
    x, v, u = triple((2, classes), torch.float32)
    target = torch.tensor([3, 4])
    check_rows(x.fill_(torch.finfo(torch.float32).min), v, u, target)
    x[0] = -INFINITY
    ours = cross_entropy(operators, x, v, u, target)
    assert ours.loss.isnan() and ours.c[0].isnan().all() and ours.c[1].isfinite().all()


@every_dtype
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_large_logits(dtype: torch.dtype, shift: float) -> None:
    x, v, u = triple((3, 40), dtype)
    check_rows(x + shift, v, u, torch.tensor([0, 7, 39]), label_smoothing=0.1)
    check_rows(1000 * x, v, u, torch.tensor([0, 7, 39]))


@every_dtype
@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize("place", [0, 5, 17, -1])
def test_infinite_logits_make_the_loss_nan(dtype: torch.dtype, value: float, place: int) -> None:
    x, v, u = triple((3, 21), dtype)
    x[1, place] = value
    ours = cross_entropy(operators, x, v, u, torch.tensor([1, 2, 3]))
    assert ours.loss.isnan() and ours.products[[1, 3, 4]].isnan().all()
    assert ours.c[1].isnan().any() and ours.c[::2].isfinite().all()


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_rounding_does_not_make_it_look_concave(offset: float) -> None:
    x, v, u = triple((4, 1300), torch.float32)
    wide_u = 0.5 * v + offset + 0.01 * u
    products = cross_entropy(operators, x, v + offset, wide_u, torch.tensor([0, 1, 2, 3])).products
    _, vhv, _, vhu, uhu = products.tolist()
    assert vhv >= 0 and uhu >= 0 and vhu**2 <= (1 + 1e-4) * vhv * uhu


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, 1e-3, 30.0, -30.0, 80.0, -80.0, 1e4, -1e4])
def test_saturated_logits(value: float) -> None:
    """Relative accuracy also of derivatives such as sigmoid(-30), which 1 - y - sigmoid(-x) would not have."""
    x, v = torch.full((19,), value), torch.randn(19)
    y = torch.tensor([0.0, 1.0, 0.5, 0.0]).repeat(5)[:19]
    loss, c, products = operators.bce_products(x, v, y, None, None, False, 1.0)
    above, below = torch.sigmoid(x.double()), torch.sigmoid(-x.double())
    expected = (1 - y) * above - y * below + above * below * v
    torch.testing.assert_close(c.double(), expected, rtol=2e-6, atol=1e-37)
    torch.testing.assert_close(products[1], (above * below * v.double() ** 2).sum(), rtol=1e-6, atol=1e-37)
    exact_loss = -(1 - y) * F.logsigmoid(-x.double()) - y * F.logsigmoid(x.double())
    torch.testing.assert_close(loss, exact_loss.sum(), rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp_and_log1p_to_a_few_units_in_the_last_place(dtype: torch.dtype) -> None:
    """sigmoid(-x) = e^-x / (1 + e^-x) is g for the target 0, whose loss is log(1 + e^x)."""
    x = torch.linspace(-80, 20, 4001, dtype=torch.float64).to(dtype)
    zero, epsilon = torch.zeros_like(x), torch.finfo(dtype).eps
    c = operators.bce_products(x, zero, zero, None, None, False, 1.0)[1]
    exact = torch.sigmoid(x.double())
    assert ((c.double() - exact) / exact).abs().max() <= 4 * epsilon
    loss = torch.stack([operators.bce_products(a, a, 0 * a, None, None, False, 1.0)[0] for a in x.view(-1, 1)[::10]])
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
