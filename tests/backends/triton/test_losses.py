"""The elementwise losses in Triton, against torch and closed forms in float64: on a GPU, else by the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from curveball_fused.backends.dtypes import compute_dtype
from curveball_fused.backends.reference import closed_form_losses
from curveball_fused.backends.triton import losses as triton_losses
from tests.helpers.triton_cases import DEVICE, INF, RUNTIME_WARNINGS, draw, every_dtype
from tests.helpers.triton_cases import check_loss as check

pytestmark = RUNTIME_WARNINGS
SIZES = [1, triton_losses.BLOCK_TAIL + 1, triton_losses.BLOCK_MAIN, 2 * triton_losses.BLOCK_MAIN + 600]


@every_dtype
@pytest.mark.parametrize("mean", [True, False])
def test_mse(dtype: torch.dtype, mean: bool) -> None:
    for n in SIZES:
        x, v, u, y = (draw(n, dtype=dtype, offset=i) for i in range(4))
        loss, c, two = triton_losses.mse_cotangent(x, v, y, mean, -1.0)
        products = triton_losses.mse_products(x, v, u, y, two, mean, -1.0)
        assert torch.equal(products[:2], two)
        reduction = "mean" if mean else "sum"
        expected = F.mse_loss(x.double(), y.double(), reduction=reduction)
        quadratic = closed_form_losses.mse_loss(x.double(), y.double(), reduction=reduction)
        check(dtype, -1.0, expected, quadratic, v, u, (loss, c, products), quadratic[0].abs())


@every_dtype
@pytest.mark.parametrize(("weights", "pos_weights"), [(None, None), (1, None), (None, 1), (600, 120)])
@pytest.mark.parametrize("mean", [True, False])
def test_bce(dtype: torch.dtype, weights: int | None, pos_weights: int | None, mean: bool) -> None:
    for shape in ((5, 120), (7, 5, 120)):
        x, v, u = draw(*shape, dtype=dtype, scale=4.0), draw(*shape, dtype=dtype), draw(*shape, dtype=dtype)
        y = torch.rand(shape).round(decimals=1).to(dtype).to(DEVICE)
        weight = None if weights is None else torch.rand((5, 120) if weights == 600 else (1,))
        pos_weight = None if pos_weights is None else 3 * torch.rand((120,) if pos_weights == 120 else (1,))
        weight, pos_weight = (t if t is None else t.to(compute_dtype(dtype)).to(DEVICE) for t in (weight, pos_weight))
        loss, c, two = triton_losses.bce_cotangent(x, v, y, weight, pos_weight, mean, 1.0)
        products = triton_losses.bce_products(x, v, u, y, weight, pos_weight, two, mean, 1.0)
        assert torch.equal(products[:2], two)
        options: dict[str, Any] = dict(
            weight=None if weight is None else weight.double(),
            pos_weight=None if pos_weight is None else pos_weight.double(),
            reduction="mean" if mean else "sum",
        )
        expected = F.binary_cross_entropy_with_logits(x.double(), y.double(), **options)
        quadratic = closed_form_losses.binary_cross_entropy_with_logits(x.double(), y.double(), **options)
        # 1 - y and k σ(-x), which may nearly cancel: each is at most the gradient where x is far out.
        far = (torch.full_like(x, value, dtype=torch.float64) for value in (-INF, INF))
        parts = sum(
            closed_form_losses.binary_cross_entropy_with_logits(x_far, y.double(), **options)[0].abs() for x_far in far
        )
        check(dtype, 1.0, expected, quadratic, v, u, (loss, c, products), parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bce_keeps_its_accuracy_far_out(dtype: torch.dtype) -> None:
    """Losses of e⁻⁴⁰ and of 10⁴: each to its own relative accuracy, as is the gradient for label 1."""
    for value in (-1e4, -40.0, -17.0, -1e-3, 0.0, 1e-3, 17.0, 40.0, 1e4):
        for label in (0.0, 1.0):
            x, y = torch.tensor([value], dtype=dtype, device=DEVICE), torch.tensor([label], dtype=dtype, device=DEVICE)
            loss, c, _ = triton_losses.bce_cotangent(x, torch.zeros_like(x), y, None, None, True, 1.0)
            expected = torch.logaddexp(torch.zeros_like(loss), (x if label == 0 else -x)[0].double())
            torch.testing.assert_close(loss, expected, rtol=8 * torch.finfo(dtype).eps, atol=1e-300)
            slope, epsilon = (1 - label) - torch.sigmoid(-x.double()), 8 * torch.finfo(dtype).eps
            torch.testing.assert_close(c.double(), slope, rtol=epsilon, atol=1e-30 if label else epsilon)


@pytest.mark.parametrize("name", ["mse", "bce"])
def test_no_elements(name: str) -> None:
    x, options = torch.zeros(0, 3, device=DEVICE), (None, None) if name == "bce" else ()
    cotangent, products = getattr(triton_losses, f"{name}_cotangent"), getattr(triton_losses, f"{name}_products")
    loss, c, two = cotangent(x, x, x, *options, False, 1.0)
    assert loss == 0 and c.shape == x.shape and not products(x, x, x, x, *options, two, False, 1.0).any()
    assert cotangent(x, x, x, *options, True, 1.0)[0].isnan()
