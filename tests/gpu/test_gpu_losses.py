"""The loss operators on the GPU, against `closed_form_losses` and torch's own losses in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from curveball_fused.backends.dtypes import compute_dtype
from curveball_fused.backends.reference import closed_form_losses
from curveball_fused.backends.reference.closed_form_losses import Quadratic
from curveball_fused.ops import losses as loss_ops
from tests.gpu.device import DEVICE, DTYPES, draw, every_backend

NAN = float("nan")
# Rows and classes: one, odd, tiles of rows and more of them than blocks, sides of warps, a short row and one that a
# block stages, more rows than blocks that each begin elsewhere in a 16-byte word, and vocabularies.
TILES, VOCABULARIES = ((300, 32), (600_001, 10)), ((3, 50257), (2, 131072))
SHAPES = ((1, 1), (5, 7), *TILES, (6, 33), (3, 1000), (5, 1025), (9001, 1025), (3, 5001), *VOCABULARIES)
ALL_DTYPES = ((5, 7), (5, 1025), *TILES)
SIZED = [(dtype, shape) for shape in SHAPES for dtype in (DTYPES if shape in ALL_DTYPES else DTYPES[1:3])]


def tolerance(x: Tensor) -> Tensor:
    """Of a term, relative to its magnitude."""
    return torch.full((), 1e-12 if x.dtype == torch.float64 else 1e-5, dtype=torch.float64, device=x.device)


def check(
    given: tuple[Tensor, Tensor, Tensor],
    first: tuple[Tensor, ...],
    five: Tensor,
    quadratic: Quadratic | None,
    terms: Tensor,
    loss: Tensor,
    sign: float,
    relative: Tensor,
) -> None:
    """What the two calls gave, against float64.

    `terms`: the magnitudes of what the gradient is the difference of; `relative`: the tolerance, for each row or all.
    """
    x, v, u = given
    assert quadratic is not None
    gradient, center, product = quadratic
    v_seen, u_seen, h = center(v.double()), center(u.double()), product(torch.ones_like(gradient))
    # v' is a difference too, of v and its mean.
    v_size, u_size = (2 * t.double().abs() + (t.double() - center(t.double())).abs() for t in (v, u))
    hv, hu = product(v_seen), product(u_seen)

    _, c, two, *_ = first
    assert first[0].dtype == two.dtype == five.dtype == torch.float64 and first[0].shape == ()
    assert c.dtype == x.dtype and c.shape == x.shape
    most = relative.max().item()
    torch.testing.assert_close(first[0], loss, rtol=most, atol=most)

    wanted = sign * (gradient + hv)
    # One rounding to c's dtype, on top of the arithmetic's, and what is below the range of either.
    of_c = torch.finfo(x.dtype)
    rounding = of_c.eps / 2 * wanted.abs() + of_c.tiny * of_c.eps + 10 * torch.finfo(compute_dtype(x.dtype)).tiny
    assert ((c.double() - wanted).abs() <= relative * (terms + h * v_size) + rounding).all()

    pairs = ((gradient, v_seen), (hv, v_seen), (gradient, u_seen), (hv, u_seen), (hu, u_seen))
    magnitudes = ((terms, v_size), (h * v_size, v_size), (terms, u_size), (h * v_size, u_size), (h * u_size, u_size))
    for i, (pair, magnitude) in enumerate(zip(pairs, magnitudes)):
        error = (five[i] - sign * (pair[0] * pair[1]).sum()).abs()
        assert error <= (relative * magnitude[0] * magnitude[1]).sum(), f"product {i}"
    assert torch.equal(five[:2], two)


def entropy(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, mean: bool, smoothing: float
) -> tuple[Quadratic | None, Tensor, Tensor]:
    """Closed form, magnitude of the gradient's terms, and loss of cross-entropy, in float64."""
    options: dict[str, Any] = dict(
        weight=None if weight is None else weight.double(),
        ignore_index=ignore_index,
        reduction="mean" if mean else "sum",
        label_smoothing=smoothing,
    )
    quadratic = closed_form_losses.cross_entropy(x.double(), target, **options)
    assert quadratic is not None
    h = quadratic[2](torch.ones_like(x, dtype=torch.float64))
    return quadratic, h + (h - quadratic[0]).abs(), F.cross_entropy(x.double(), target, **options)


def check_entropy(
    backend: str,
    given: tuple[Tensor, Tensor, Tensor],
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    mean: bool = True,
    smoothing: float = 0.0,
    sign: float = 1.0,
) -> None:
    x, v, u = given
    options: dict[str, Any] = dict(ignore_index=ignore_index, mean=mean, label_smoothing=smoothing, sign=sign)
    first = loss_ops.cross_entropy_cotangent(x, v, target, weight, **options, backend=backend)
    five = loss_ops.cross_entropy_products(x, v, u, target, first[3], first[2], weight, **options, backend=backend)
    # exp(x) in the arithmetic's precision is known no better than x is.
    largest = x.double().where(x.isfinite(), 0).abs().amax(1, keepdim=True)
    relative = tolerance(x) + torch.finfo(compute_dtype(x.dtype)).eps * largest
    check(given, first, five, *entropy(x, target, weight, ignore_index, mean, smoothing), sign, relative)


def three(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return draw(shape, dtype), draw(shape, dtype), draw(shape, dtype)


@every_backend
@pytest.mark.parametrize(("dtype", "shape"), SIZED, ids=str)
def test_cross_entropy(backend: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    rows, classes = shape
    target = torch.randint(classes, (rows,), device=DEVICE)
    check_entropy(backend, three(shape, dtype), target)
    target[rows // 2] = -7
    weight = draw((classes,), compute_dtype(dtype)).abs()
    mean = rows % 2 == 0
    check_entropy(backend, three(shape, dtype), target, weight, -7, mean, smoothing=0.1, sign=-1.0)


@every_backend
@pytest.mark.parametrize("classes", [10, 3001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_of_logits_that_are_extreme(backend: str, dtype: torch.dtype, classes: int) -> None:
    x, v, u = three((4, classes), dtype)
    target = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    x[0] = 100 * x[0]
    x[1] = 1e4 * x[1]
    x[2, 1::2] = -float("inf")  # masked
    x[3, 1:] = -float("inf")
    check_entropy(backend, (x, v, u), target)


@every_backend
@pytest.mark.parametrize("classes", [10, 3001])
def test_rows_that_are_not_finite(backend: str, classes: int) -> None:
    """They give NaN, and leave the other rows alone."""
    good = three((5, classes), torch.float32)
    for value in (NAN, float("inf"), None):
        x, v, _ = (t.clone() for t in good)
        target = torch.zeros(5, dtype=torch.int64, device=DEVICE)
        if value is None:
            x[2] = -float("inf")  # no class is left
        else:
            x[2, classes // 2] = value
        loss, c, products, _ = loss_ops.cross_entropy_cotangent(x, v, target, mean=False, backend=backend)
        assert loss.isnan() and products.isnan().all() and c[2].isnan().any()
        _, expected, _, _ = loss_ops.cross_entropy_cotangent(good[0], v, target, mean=False, backend=backend)
        others = [0, 1, 3, 4]
        torch.testing.assert_close(c[others], expected[others])


@every_backend
@pytest.mark.parametrize("classes", [10, 3001])
@pytest.mark.parametrize("bad", [-1, 2**40, -(2**62)])
def test_targets_out_of_range(backend: str, classes: int, bad: int) -> None:
    """NaN in the loss and in the row, and no read beyond the tensors."""
    x, v, u = three((5, classes), torch.float32)
    target = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    target[2] = bad
    weight = draw((classes,), torch.float32).abs()
    loss, c, products, rows = loss_ops.cross_entropy_cotangent(x, v, target, weight, mean=False, backend=backend)
    assert loss.isnan() and c[2].isnan().all()
    loss_ops.cross_entropy_products(x, v, u, target, rows, products, weight, mean=False, backend=backend)
    ignored = target.where(target == 0, -100)
    _, expected, _, _ = loss_ops.cross_entropy_cotangent(x, v, ignored, weight, mean=False, backend=backend)
    others = [0, 1, 3, 4]
    torch.testing.assert_close(c[others], expected[others])


@every_backend
def test_nothing_to_average(backend: str) -> None:
    x, v, _ = three((4, 33), torch.float32)
    ignored = torch.full((4,), -100, device=DEVICE)
    assert loss_ops.cross_entropy_cotangent(x, v, ignored, backend=backend)[0].isnan()
    loss, c, products, _ = loss_ops.cross_entropy_cotangent(x, v, ignored, mean=False, backend=backend)
    assert loss == 0 and not c.any() and not products.any()
    loss, c, *_ = loss_ops.cross_entropy_cotangent(x[:0], v[:0], ignored[:0], backend=backend)
    assert loss.isnan() and c.shape == (0, 33)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_aligned(backend: str, dtype: torch.dtype) -> None:
    """x, v and u begin at different places of a 16-byte word."""
    shape = (3, 1001)
    given = tuple(draw((3003 + i,), dtype)[i:].view(shape) for i in (0, 1, 3))
    check_entropy(backend, (given[0], given[1], given[2]), torch.randint(1001, (3,), device=DEVICE))


@every_backend
def test_more_than_2_to_the_31_logits(backend: str, need_memory: Callable[[float], None]) -> None:
    rows, classes, dtype = 65_540, 32_768, torch.bfloat16
    need_memory(4.5 * rows * classes * dtype.itemsize)
    x, v = (torch.empty(rows, classes, dtype=dtype, device=DEVICE).normal_() for _ in range(2))
    target = torch.randint(classes, (rows,), device=DEVICE)
    loss, c, products, kept = loss_ops.cross_entropy_cotangent(x, v, target, mean=False, backend=backend)
    some = torch.tensor([0, 1, 32_767, 32_768, 65_535, 65_536, rows - 1], device=DEVICE)
    part = x[some], v[some], v[some]
    quadratic, terms, _ = entropy(part[0], target[some], None, -100, False, 0.0)
    assert quadratic is not None
    wanted = quadratic[0] + quadratic[2](quadratic[1](part[1].double()))
    error = (c[some].double() - wanted).abs()
    assert (error <= 2**-8 * wanted.abs() + 1e-5 * terms * (1 + part[1].double().abs())).all()
    blocks = zip(x.split(4096), target.split(4096))
    expected = sum(F.cross_entropy(a.float(), b, reduction="sum").double() for a, b in blocks)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    del c
    five = loss_ops.cross_entropy_products(x, v, v, target, kept, products, mean=False, backend=backend)
    # u = v: the products with it are the ones there were.
    torch.testing.assert_close(five, products[[0, 1, 0, 1, 1]], rtol=1e-6, atol=0)


ELEMENTS = ((), (1,), (17,), (3, 65_537), (2**21 + 3,))


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [True, False])
def test_mse(backend: str, dtype: torch.dtype, mean: bool) -> None:
    for i, shape in enumerate(ELEMENTS):
        x, v, u = given = three(shape, dtype)
        y, options = draw(shape, dtype), dict(mean=mean, sign=(-1.0) ** i, backend=backend)
        first = loss_ops.mse_cotangent(x, v, y, **options)
        five = loss_ops.mse_products(x, v, u, y, first[2], **options)
        reduction = "mean" if mean else "sum"
        quadratic = closed_form_losses.mse_loss(x.double(), y.double(), reduction=reduction)
        assert quadratic is not None
        terms = quadratic[2](x.double().abs() + y.double().abs())
        loss = F.mse_loss(x.double(), y.double(), reduction=reduction)
        check(given, first, five, quadratic, terms, loss, (-1.0) ** i, tolerance(x))


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mean", [True, False])
def test_bce(backend: str, dtype: torch.dtype, weighted: bool, mean: bool) -> None:
    for i, shape in enumerate(ELEMENTS):
        x, v, u = given = three(shape, dtype)
        x *= 8
        if x.numel() > 4:
            x.view(-1)[:4] = torch.tensor([100.0, -100.0, 1e4, -1e4]).to(x)
        y, arithmetic = draw(shape, dtype).sigmoid(), compute_dtype(dtype)
        weight = draw(shape, arithmetic).abs() if weighted else None
        pos_weight = draw(shape[-1:], arithmetic).abs() if weighted else None
        options = dict(mean=mean, sign=(-1.0) ** i, backend=backend)
        first = loss_ops.bce_cotangent(x, v, y, weight, pos_weight, **options)
        five = loss_ops.bce_products(x, v, u, y, first[2], weight, pos_weight, **options)
        exact: dict[str, Any] = dict(
            weight=None if weight is None else weight.double(),
            pos_weight=None if pos_weight is None else pos_weight.double(),
            reduction="mean" if mean else "sum",
        )
        quadratic = closed_form_losses.binary_cross_entropy_with_logits(x.double(), y.double(), **exact)
        k = 1.0 if pos_weight is None else 1 + (pos_weight.double() - 1) * y.double()
        w = torch.ones_like(x, dtype=torch.float64) if weight is None else weight.double()
        terms = w * (1 + y.double() + k) / (x.numel() if mean else 1)
        loss = F.binary_cross_entropy_with_logits(x.double(), y.double(), **exact)
        check(given, first, five, quadratic, terms, loss, (-1.0) ** i, tolerance(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    x, v, u = three((5, 33), dtype)
    namespace, check_op = torch.ops.curveball_fused, torch.library.opcheck
    target, weight = torch.randint(33, (5,), device=DEVICE), draw((33,), compute_dtype(dtype)).abs()
    entropy_options = (-100, True, 0.1, 1.0)
    _, _, products, rows = namespace.cross_entropy_cotangent(x, v, target, weight, *entropy_options)
    check_op(namespace.cross_entropy_cotangent.default, (x, v, target, weight, *entropy_options))
    check_op(namespace.cross_entropy_products.default, (x, v, u, target, weight, rows, products, *entropy_options))
    check_op(namespace.mse_cotangent.default, (x, v, u, True, 1.0))
    check_op(namespace.mse_products.default, (x, v, u, u, products, True, 1.0))
    check_op(namespace.bce_cotangent.default, (x, v, u, weight, None, True, 1.0))
    check_op(namespace.bce_products.default, (x, v, u, u, None, weight, products, True, 1.0))
