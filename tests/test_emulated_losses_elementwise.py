"""The text of the CUDA kernels for elementwise losses, run on the CPU; and what all loss operators refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from emulated import operators
from emulated_losses import check_elements, device, fresh_device  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_truth import DTYPES, arithmetic, check_errors, every_dtype, places, signs


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
    check_errors(operators)
