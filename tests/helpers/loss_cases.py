"""Random and special arguments on which every native implementation of the losses is tried: see `loss_truth`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curveball_fused.backends.dtypes import compute_dtype
from tests.helpers.loss_truth import check_cross_entropy, cross_entropy, triple

INFINITY, NAN = float("inf"), float("nan")


def random_targets(
    classes: int, rows: int, dtype: torch.dtype, weighted: bool, ignored: bool
) -> tuple[Tensor, dict[str, Any]]:
    """Targets, and the options that belong to them."""
    target = torch.randint(0, classes, (rows,))
    options: dict[str, Any] = {}
    if weighted:
        options["weight"] = torch.rand(classes).to(compute_dtype(dtype)) + 0.1
    if ignored and classes > 1:
        options["ignore_index"] = int(target[0])
        target = torch.cat((target, (target[:1] + 1) % classes))  # one that is kept
    return target, options


def random_weights(rows: int, columns: int, dtype: torch.dtype, **dims: tuple[int, ...] | None) -> dict[str, Tensor]:
    """Weights of one element, of a column each, of every element."""
    sizes = {(0,): (1,), (1,): (columns,), (0, 1): (rows, columns)}
    return {name: torch.rand(sizes[d]).to(compute_dtype(dtype)) + 0.2 for name, d in dims.items() if d is not None}


# ---------------------------------------------------------------------------------------------- targets


def check_ignored_rows(operators: Any, dtype: torch.dtype, classes: int, smoothing: float = 0.0) -> None:
    x, v, u = triple((12, classes), dtype)
    target = torch.randint(0, 4, (12,))
    target[4:] = 4
    expected = cross_entropy(operators, x[:4], v[:4], u[:4], target[:4], label_smoothing=smoothing)
    for t in (x, v, u):
        t[4:] = NAN
    ours = cross_entropy(operators, x, v, u, target, ignore_index=4, label_smoothing=smoothing)
    assert not ours.c[4:].any() and torch.equal(ours.c[:4], expected.c)
    torch.testing.assert_close(ours[::2], expected[::2], rtol=1e-12, atol=0)


def check_nothing_to_learn_from(operators: Any, shape: tuple[int, int], smoothing: float) -> None:
    """All targets ignored, no rows, no classes: as torch, NaN for the mean, 0 for the sum, and no gradient."""
    x, v, u = triple(shape, torch.float32)
    target = torch.full(shape[:1], -100)
    for reduction in ("mean", "sum"):
        ours = cross_entropy(operators, x, v, u, target, reduction=reduction, label_smoothing=smoothing)
        torch.testing.assert_close(ours.loss.float(), F.cross_entropy(x, target, reduction=reduction), equal_nan=True)
        assert ours.c.shape == x.shape and not ours.c.any()
        if reduction == "sum":
            assert not ours.products.any()


def check_a_target_that_is_no_class(operators: Any, bad: int, weighted: bool, smoothing: float) -> None:
    """NaN in the loss, the products and its own row only."""
    x, v, u = triple((3, 7), torch.float32)
    weight = torch.rand(7) if weighted else None
    ours = cross_entropy(operators, x, v, u, torch.tensor([2, bad, 5]), weight=weight, label_smoothing=smoothing)
    assert ours.loss.isnan() and not ours.products.isfinite().all()
    assert ours.c[1].isnan().all() and ours.c[::2].isfinite().all()


# ---------------------------------------------------------------------------------------------- extreme logits


def check_masked_logits(operators: Any, dtype: torch.dtype, classes: int, mask: str, first: bool) -> None:
    """-inf, or the lowest finite number, in whole vectors and at the beginning of every thread's share."""
    x, v, u = triple((4, classes), dtype)
    masked = slice(0, classes - 7) if first else slice(5, classes)
    x[:, masked] = -INFINITY if mask == "-inf" else torch.finfo(dtype).min
    target = torch.full((4,), classes - 3 if first else 1)
    ours = check_cross_entropy(operators, x, v, u, target)
    assert not ours.c[:, masked].any()
    smoothed = cross_entropy(operators, x, v, u, target, label_smoothing=0.1)
    assert smoothed.loss > 1e3 and smoothed.c.isfinite().all() and smoothed.products.isfinite().all()


def check_a_row_that_is_all_masked(operators: Any, classes: int) -> None:
    """Of finite numbers, the softmax is uniform; of -inf it is NaN."""
    x, v, u = triple((2, classes), torch.float32)
    target = torch.tensor([3, 4])
    check_cross_entropy(operators, x.fill_(torch.finfo(torch.float32).min), v, u, target)
    x[0] = -INFINITY
    ours = cross_entropy(operators, x, v, u, target)
    assert ours.loss.isnan() and ours.c[0].isnan().all() and ours.c[1].isfinite().all()


def check_large_logits(operators: Any, dtype: torch.dtype, shift: float, classes: int) -> None:
    """The maximum is taken off before anything is rounded."""
    x, v, u = triple((3, classes), dtype)
    check_cross_entropy(operators, x + shift, v, u, torch.tensor([0, 7, classes - 1]), label_smoothing=0.1)
    check_cross_entropy(operators, 1000 * x, v, u, torch.tensor([0, 7, classes - 1]))


def check_infinite_logits(operators: Any, dtype: torch.dtype, value: float, place: int, classes: int) -> None:
    x, v, u = triple((3, classes), dtype)
    x[1, place] = value
    ours = cross_entropy(operators, x, v, u, torch.tensor([1, 2, 3]))
    assert ours.loss.isnan() and ours.products[[1, 3, 4]].isnan().all()
    assert ours.c[1].isnan().any() and ours.c[::2].isfinite().all()


def check_that_it_looks_convex(operators: Any, offset: float) -> None:
    """Tangents that are nearly constant in a row: v'.Hv' is a small difference of large numbers, unless centered."""
    x, v, u = triple((4, 1300), torch.float32)
    wide_u = 0.5 * v + offset + 0.01 * u
    products = cross_entropy(operators, x, v + offset, wide_u, torch.tensor([0, 1, 2, 3])).products
    _, vhv, _, vhu, uhu = products.tolist()
    assert vhv >= 0 and uhu >= 0 and vhu**2 <= (1 + 1e-4) * vhv * uhu


# ---------------------------------------------------------------------------------------------- independent elements


def check_saturated_logits(operators: Any, value: float) -> None:
    """Relative accuracy also of derivatives such as sigmoid(-30), which 1 - y - sigmoid(-x) would not have."""
    x, v = torch.full((19,), value), torch.randn(19)
    y = torch.tensor([0.0, 1.0, 0.5, 0.0]).repeat(5)[:19]
    loss, c, products = operators.bce_cotangent(x, v, y, None, None, False, 1.0)
    above, below = torch.sigmoid(x.double()), torch.sigmoid(-x.double())
    expected = (1 - y) * above - y * below + above * below * v
    torch.testing.assert_close(c.double(), expected, rtol=2e-6, atol=1e-37)
    torch.testing.assert_close(products[1], (above * below * v.double() ** 2).sum(), rtol=1e-6, atol=1e-37)
    exact_loss = -(1 - y) * F.logsigmoid(-x.double()) - y * F.logsigmoid(x.double())
    torch.testing.assert_close(loss, exact_loss.sum(), rtol=1e-6, atol=1e-37)


def check_no_elements(operators: Any) -> None:
    x = torch.zeros(0, 4)
    for mean, loss in ((True, NAN), (False, 0.0)):
        for name, weights in (("mse", ()), ("bce", (None, None)), ("bce", (None, torch.ones(4)))):
            result = getattr(operators, f"{name}_cotangent")(x, x, x, *weights, mean, 1.0)
            five = getattr(operators, f"{name}_products")(x, x, x, x, *weights, result[2], mean, 1.0)
            torch.testing.assert_close(result[0].item(), loss, equal_nan=True)
            assert result[1].shape == x.shape and five.isnan().all() == mean
