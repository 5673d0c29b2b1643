"""The text of the CUDA kernels for elementwise losses, run on the CPU; and what all loss operators refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emulated import operators
from emulated_losses import (
    DTYPES,
    Result,
    arithmetic,
    compare,
    device,
    draw,
    every_dtype,
    fresh_device,  # noqa: F401
    places,
    quadratic,
    signs,
    triple,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curveball_fused import closed_forms


def check_elements(shape: tuple[int, ...], dtype: torch.dtype, where: Any, sign: float, **options: Any) -> None:
    """Both losses, against closed_forms; `weight` and `pos_weight` belong to the binary cross-entropy."""
    x, v, u = triple(shape, dtype, where)
    mean = options["reduction"] == "mean"
    for name in ("mse", "bce"):
        function = F.mse_loss if name == "mse" else F.binary_cross_entropy_with_logits
        chosen = {k: value for k, value in options.items() if name == "bce" or k == "reduction"}
        weights = () if name == "mse" else (options.get("weight"), options.get("pos_weight"))
        wide = {k: value.double() if isinstance(value, Tensor) else value for k, value in chosen.items()}
        y = draw(shape, dtype, where[0]) if name == "mse" else torch.rand(shape).to(dtype)
        loss, c, products = getattr(operators, f"{name}_products")(x, v, y, *weights, mean, sign)
        five = getattr(operators, f"{name}_dots")(x, v, u, y, *weights, products, mean, sign)
        closed, expected_loss = closed_forms.CLOSED_FORMS[function], function(x.double(), y.double(), **wide)
        exact = quadratic(expected_loss, closed(x.double(), y.double(), **wide), v.double(), u.double(), sign)
        composed = quadratic(expected_loss, closed(x, y, **chosen), v, u, sign)[0]
        compare(Result(loss, c, five), dtype, exact, composed)


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 5),
    columns=st.sampled_from([1, 2, 7, 8, 9, 100, 1027]),
    dtype=st.sampled_from(DTYPES),
    where=places,
    reduction=st.sampled_from(["mean", "sum"]),
    sign=signs,
    weight=st.sampled_from([None, (1,), (0,), (0, 1)]),
    pos_weight=st.sampled_from([None, (1,), (0, 1)]),
    launched=st.tuples(st.integers(0, 1000), st.sampled_from([0, 32, 128])),
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
    launched: tuple[int, int],
    seed: int,
) -> None:
    """Weights of one element, of a column each, of every element."""
    device.set_seed(launched[0])
    device.set_threads(launched[1])
    torch.manual_seed(seed)
    sizes = {None: None, (0,): (1,), (1,): (columns,), (0, 1): (rows, columns)}
    weights = {
        name: torch.rand(size).to(arithmetic(dtype)) + 0.2
        for name, size in (("weight", sizes[weight]), ("pos_weight", sizes[pos_weight]))
        if size is not None
    }
    check_elements((rows, columns), dtype, where, sign, reduction=reduction, **weights)


@every_dtype
def test_many_elements(dtype: torch.dtype) -> None:
    """More than all blocks take at once."""
    pos_weight = torch.rand(40_003).to(arithmetic(dtype))
    check_elements((3, 40_003), dtype, (0, 0, 0), 1.0, reduction="mean", pos_weight=pos_weight)


@pytest.mark.parametrize("value", [0.0, -0.0, 30.0, -30.0, 100.0, -100.0, 1e4, -1e4])
def test_saturated_logits(value: float) -> None:
    """Relative accuracy also of derivatives such as sigmoid(-30), which 1 - y - sigmoid(-x) would not have."""
    x, v = torch.full((9,), value), torch.randn(9)
    y = torch.tensor([0.0, 1.0, 0.5] * 3)
    loss, c, products = operators.bce_products(x, v, y, None, None, False, 1.0)
    above, below = torch.sigmoid(x.double()), torch.sigmoid(-x.double())
    expected = (1 - y) * above - y * below + above * below * v
    torch.testing.assert_close(c.double(), expected, rtol=2e-6, atol=1e-37)
    torch.testing.assert_close(products[1], (above * below * v.double() ** 2).sum(), rtol=1e-6, atol=1e-37)
    exact_loss = -(1 - y) * F.logsigmoid(-x.double()) - y * F.logsigmoid(x.double())
    torch.testing.assert_close(loss, exact_loss.sum(), rtol=1e-6, atol=1e-37)


def test_no_elements() -> None:
    x = torch.zeros(0, 4)
    for mean, loss in ((True, float("nan")), (False, 0.0)):
        for name, weights in (("mse", ()), ("bce", (None, None))):
            result = getattr(operators, f"{name}_products")(x, x, x, *weights, mean, 1.0)
            five = getattr(operators, f"{name}_dots")(x, x, x, x, *weights, result[2], mean, 1.0)
            torch.testing.assert_close(result[0].item(), loss, equal_nan=True)
            assert result[1].shape == x.shape and five.isnan().all() == mean


# ---------------------------------------------------------------------------------------------- bad arguments


def test_errors() -> None:
    x, y = torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64)
    options = -100, True, 0.0, 1.0
    for message, arguments in {
        r"x must be \[rows, classes\]": (x[0], x[0], y, None),
        "x is not contiguous": (x.t(), x.t(), y, None),
        "convert it to float16": (x.long(), x.long(), y, None),
        "v and x have different sizes": (x, x[:2], y, None),
        "v has dtype": (x, x.double(), y, None),
        "v is not contiguous": (x, torch.zeros(6, 4).t(), y, None),
        "target has dtype": (x, x, y.int(), None),
        "target must have one class": (x, x, y[:3], None),
        "weight must have one element": (x, x, y, torch.ones(5)),
        "weight has dtype": (x, x, y, torch.ones(6).double()),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            operators.cross_entropy_products(*arguments, *options)
    rows, products = torch.zeros(4, 3), torch.zeros(2, dtype=torch.float64)
    for message, (u, given_rows, given_products) in {
        "u and x have different sizes": (x[:2], rows, products),
        "rows must be": (x, rows.double(), products),
        "products has dtype": (x, rows, products.float()),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            operators.cross_entropy_dots(x, x, u, y, None, given_rows, given_products, *options)
    for message, (target, weight) in {
        "target and x have different sizes": (x[:2], None),
        "target has dtype": (x.half(), None),
        "can't be divided": (x, torch.ones(5)),
        "weight has dtype": (x, torch.ones(6).half()),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            operators.bce_products(x, x, target, weight, None, True, 1.0)
    with pytest.raises(RuntimeError, match="target has dtype"):
        operators.mse_products(x, x, x.half(), True, 1.0)
