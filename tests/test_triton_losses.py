"""The loss kernels in Triton, against torch and `closed_forms` in float64: on a GPU, else by the interpreter."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

from curveball_fused import closed_forms, triton_losses  # noqa: E402
from curveball_fused.triton_rows import pieces  # noqa: E402

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAN, INF = math.nan, math.inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on NaN, in the interpreter
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0, offset: int = 0) -> Tensor:
    """Random numbers, `offset` elements after an aligned address."""
    numbers = scale * torch.randn(math.prod(shape) + offset, dtype=torch.float64)
    return numbers.to(dtype).to(DEVICE)[offset:].view(shape)


def check(
    dtype: torch.dtype,
    sign: float,
    loss: Tensor,
    quadratic: Any,
    v: Tensor,
    u: Tensor,
    got: tuple[Tensor, ...],
    parts: Tensor,
    largest: float = 0.0,
) -> None:
    """Holds (loss, c, all five products) against float64.

    The bounds count the magnitudes that are added up: `parts` is that of the gradient. `largest` is the magnitude of
    logits, since exp(x - max) magnifies the rounding of its argument by it.
    """
    g, centre, product = quadratic
    v, u = v.double(), u.double()
    cv, cu = centre(v), centre(u)
    hv, hu = product(cv), product(cu)
    terms = torch.stack([(a * b).sum() for a, b in ((g, cv), (cv, hv), (g, cu), (cv, hu), (cu, hu))])
    # The mean that is taken off v is rounded as v is.
    sizes = ((parts, v), (hv, v), (parts, u), (hu, v), (hu, u))
    size = torch.stack([(a.abs() * (b.abs() + b.abs().max())).sum() for a, b in sizes])
    epsilon = (16 + largest) * torch.finfo(arithmetic(dtype)).eps
    got_loss, c, products = got
    assert got_loss.dtype == products.dtype == torch.float64 and got_loss.shape == () and c.dtype == dtype
    torch.testing.assert_close(got_loss, loss, rtol=epsilon, atol=epsilon)
    assert ((products - sign * terms).abs() <= epsilon * size).all()
    exact = sign * (g + hv)
    # The interpreter cuts bfloat16 off instead of rounding to nearest.
    ulps = 0.0 if dtype == arithmetic(dtype) else 1.0 if INTERPRETED and dtype == torch.bfloat16 else 0.5
    magnitude = parts + product(torch.ones_like(v)).abs() * (1 + v.abs() + v.abs().max())
    rounding = ulps * torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
    assert ((c.double() - exact).abs() <= epsilon * magnitude + rounding).all()


class Case:
    """Cross-entropy of random logits, by the kernels and in float64."""

    def __init__(self, n: int, classes: int, dtype: torch.dtype, offset: int = 0, scale: float = 2.0) -> None:
        self.dtype = dtype
        self.x = draw(n, classes, dtype=dtype, scale=scale, offset=offset)
        self.v, self.u = draw(n, classes, dtype=dtype) + 3, draw(n, classes, dtype=dtype)
        self.target = torch.randint(0, classes, (n,), device=DEVICE)
        self.weight: Tensor | None = None
        self.ignore_index, self.mean, self.smoothing, self.sign = -100, True, 0.0, 1.0

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, c, all five products, and rows."""
        options = (self.ignore_index, self.mean, self.smoothing, self.sign)
        loss, c, two, rows = triton_losses.cross_entropy_products(self.x, self.v, self.target, self.weight, *options)
        products = triton_losses.cross_entropy_dots(
            self.x, self.v, self.u, self.target, self.weight, rows, two, *options
        )
        assert torch.equal(products[:2].isnan(), two.isnan()) and torch.equal(
            products[:2].nan_to_num(), two.nan_to_num()
        )
        return loss, c, products, rows

    def options(self) -> dict[str, Any]:
        weight = None if self.weight is None else self.weight.double()
        reduction = "mean" if self.mean else "sum"
        return dict(weight=weight, ignore_index=self.ignore_index, reduction=reduction, label_smoothing=self.smoothing)

    def check(self) -> None:
        loss, c, products, _ = self.run()
        x = self.x.double()
        expected = F.cross_entropy(x, self.target, **self.options())
        quadratic = closed_forms.cross_entropy(x, self.target, **self.options())
        largest = self.x.double().nan_to_num(neginf=0.0).abs().max().item()
        got, parts = (loss, c, products), quadratic[0].abs()
        check(self.dtype, self.sign, expected, quadratic, self.v, self.u, got, parts, largest)


@pytest.mark.parametrize("classes", [1, 2, 3, 15, 16, 17, 63, 64, 65, 255, 256, 257, 513, 1000, 1024, 1025, 3000])
def test_cross_entropy_over_classes(classes: int) -> None:
    for n, dtype in ((1, torch.float64), (3, torch.float32)):
        Case(n, classes, dtype).check()


@every_dtype
@pytest.mark.parametrize("classes", [10, 700])
def test_cross_entropy_over_dtypes(dtype: torch.dtype, classes: int) -> None:
    for offset in (0, 1):
        case = Case(5, classes, dtype, offset=offset)
        case.weight, case.sign = torch.rand(classes, dtype=arithmetic(dtype), device=DEVICE) + 0.1, -1.0
        case.check()


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.15])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("classes", [3, 300])
def test_cross_entropy_options(classes: int, weighted: bool, smoothing: float, mean: bool) -> None:
    case = Case(6, classes, torch.float64)
    case.target[::3] = case.ignore_index = 1
    case.mean, case.smoothing, case.sign = mean, smoothing, -1.0
    if weighted:
        case.weight = torch.rand(classes, dtype=torch.float64, device=DEVICE) + 0.1
        case.weight[case.target[1]] = 0
    case.check()


@pytest.mark.parametrize("n", [64, 65, 700])
def test_cross_entropy_over_rows(n: int) -> None:
    Case(n, 5, torch.float32).check()


def test_no_rows() -> None:
    case = Case(0, 5, torch.float32)
    assert case.run()[0].isnan()
    case.mean = False
    loss, c, products, rows = case.run()
    assert loss == 0 and c.shape == (0, 5) and not products.any() and rows.shape == (0, 3)


@pytest.mark.parametrize("classes", [5, 400])
@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_cross_entropy_of_large_logits(classes: int, scale: float) -> None:
    """Probabilities of zero and one; v'·Hv' is not negative for all that."""
    case = Case(9, classes, torch.float64, scale=scale)
    case.check()
    case = Case(9, classes, torch.float32, scale=scale)
    _, c, products, _ = case.run()
    assert c.isfinite().all() and products.isfinite().all() and products[1] >= 0 and products[4] >= 0


@pytest.mark.parametrize("classes", [5, 400])
def test_what_is_kept_of_each_row(classes: int) -> None:
    case = Case(4, classes, torch.float64)
    case.weight = torch.rand(classes, dtype=torch.float64, device=DEVICE)
    case.sign, case.target[1], case.smoothing = -1.0, case.ignore_index, 0.2
    rows, kept = case.run()[3], torch.tensor([0, 2, 3])
    own = case.weight[case.target[kept]]
    s = 0.8 * own + 0.2 / classes * case.weight.sum()
    expected = (case.x.logsumexp(1)[kept], (case.x.softmax(1) * case.v).sum(1)[kept], s / own.sum())
    torch.testing.assert_close(rows[kept], torch.stack(expected, 1), rtol=1e-12, atol=1e-12)
    assert Case(2, classes, torch.float16).run()[3].dtype == torch.float32


@pytest.mark.parametrize("classes", [5, 400])
def test_ignored_rows_count_for_nothing(classes: int) -> None:
    case = Case(5, classes, torch.float32)
    case.target[[1, 3]] = case.ignore_index
    expected = case.run()
    case.x[1], case.v[3], case.u[1] = NAN, INF, NAN
    for ours, theirs in zip(case.run(), expected):
        assert torch.equal(ours, theirs)
    assert not expected[1][[1, 3]].any()

    case.target[:] = case.ignore_index
    loss, c, products, _ = case.run()
    assert loss.isnan() and products.isnan().all() and not c.any()
    case.mean = False
    loss, c, products, _ = case.run()
    assert loss == 0 and not products.any() and not c.any()


@pytest.mark.parametrize("classes", [5, 400])
@pytest.mark.parametrize("bad", [-1, 5000, 2**40])
@pytest.mark.parametrize("weighted", [True, False])
def test_a_target_that_is_no_class(classes: int, bad: int, weighted: bool) -> None:
    case = Case(4, classes, torch.float32)
    case.weight = torch.rand(classes, device=DEVICE) if weighted else None
    case.target[2] = bad
    loss, c, products, _ = case.run()
    assert loss.isnan() and products.isnan().all() and c[2].isnan().all()
    assert c[[0, 1, 3]].isfinite().all()


@triton.jit
def store_pieces(result, classes, BODY: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    begin, end = pieces(tile, classes, 1, BODY)
    tl.store(result + 2 * tile, begin)
    tl.store(result + 2 * tile + 1, end)


@pytest.mark.parametrize("classes", [257, 1000, 1024, 50257])
def test_bodies_of_long_rows_begin_aligned(classes: int) -> None:
    """The kernels rely on it, and the interpreter would not tell."""
    result = torch.zeros(40, 2, dtype=torch.int64, device=DEVICE)
    store_pieces[(40,)](result, classes, BODY=256)
    begin, end = result.unbind(1)
    assert ((torch.arange(40, device=DEVICE) * classes + begin) % 16 == 0).all()
    assert (begin >= 0).all() and (begin < 16).all() and (end <= classes).all() and (end > classes - 256).all()
    assert ((end - begin) % 256 == 0).all()


@pytest.mark.parametrize("classes", [5, 400])
def test_classes_that_are_ruled_out(classes: int) -> None:
    """Logits of minus infinity, first and last in the row, that are not the target."""
    case = Case(3, classes, torch.float64)
    case.target[:] = 1
    case.x[:, 0], case.x[1, -1] = -INF, -INF
    case.check()


def test_logits_that_are_not_finite_spread() -> None:
    for bad in (NAN, INF):
        case = Case(3, 400, torch.float32)
        case.x[1, 17] = bad
        loss, c, products, _ = case.run()
        assert loss.isnan() and products.isnan().all() and c[1].isnan().any() and c[[0, 2]].isfinite().all()


# ------------------------------------------------------------------------------------------ independent elements

SIZES = [1, triton_losses.TAIL + 1, triton_losses.BODY, 2 * triton_losses.BODY + 600]


@every_dtype
@pytest.mark.parametrize("mean", [True, False])
def test_mse(dtype: torch.dtype, mean: bool) -> None:
    for n in SIZES:
        x, v, u, y = (draw(n, dtype=dtype, offset=i) for i in range(4))
        loss, c, two = triton_losses.mse_products(x, v, y, mean, -1.0)
        products = triton_losses.mse_dots(x, v, u, y, two, mean, -1.0)
        assert torch.equal(products[:2], two)
        reduction = "mean" if mean else "sum"
        expected = F.mse_loss(x.double(), y.double(), reduction=reduction)
        quadratic = closed_forms.mse_loss(x.double(), y.double(), reduction=reduction)
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
        weight, pos_weight = (t if t is None else t.to(arithmetic(dtype)).to(DEVICE) for t in (weight, pos_weight))
        loss, c, two = triton_losses.bce_products(x, v, y, weight, pos_weight, mean, 1.0)
        products = triton_losses.bce_dots(x, v, u, y, weight, pos_weight, two, mean, 1.0)
        assert torch.equal(products[:2], two)
        options: dict[str, Any] = dict(
            weight=None if weight is None else weight.double(),
            pos_weight=None if pos_weight is None else pos_weight.double(),
            reduction="mean" if mean else "sum",
        )
        expected = F.binary_cross_entropy_with_logits(x.double(), y.double(), **options)
        quadratic = closed_forms.binary_cross_entropy_with_logits(x.double(), y.double(), **options)
        # 1 - y and k σ(-x), which may nearly cancel: each is at most the gradient where x is far out.
        far = (torch.full_like(x, value, dtype=torch.float64) for value in (-INF, INF))
        parts = sum(
            closed_forms.binary_cross_entropy_with_logits(x_far, y.double(), **options)[0].abs() for x_far in far
        )
        check(dtype, 1.0, expected, quadratic, v, u, (loss, c, products), parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bce_keeps_its_accuracy_far_out(dtype: torch.dtype) -> None:
    """Losses of e⁻⁴⁰ and of 10⁴: each to its own relative accuracy, as is the gradient for label 1."""
    for value in (-1e4, -40.0, -17.0, -1e-3, 0.0, 1e-3, 17.0, 40.0, 1e4):
        for label in (0.0, 1.0):
            x, y = torch.tensor([value], dtype=dtype, device=DEVICE), torch.tensor([label], dtype=dtype, device=DEVICE)
            loss, c, _ = triton_losses.bce_products(x, torch.zeros_like(x), y, None, None, True, 1.0)
            expected = torch.logaddexp(torch.zeros_like(loss), (x if label == 0 else -x)[0].double())
            torch.testing.assert_close(loss, expected, rtol=8 * torch.finfo(dtype).eps, atol=1e-300)
            slope, epsilon = (1 - label) - torch.sigmoid(-x.double()), 8 * torch.finfo(dtype).eps
            torch.testing.assert_close(c.double(), slope, rtol=epsilon, atol=1e-30 if label else epsilon)


@pytest.mark.parametrize("name", ["mse", "bce"])
def test_no_elements(name: str) -> None:
    x, options = torch.zeros(0, 3, device=DEVICE), (None, None) if name == "bce" else ()
    products, dots = getattr(triton_losses, f"{name}_products"), getattr(triton_losses, f"{name}_dots")
    loss, c, two = products(x, x, x, *options, False, 1.0)
    assert loss == 0 and c.shape == x.shape and not dots(x, x, x, x, *options, two, False, 1.0).any()
    assert products(x, x, x, *options, True, 1.0)[0].isnan()


def test_the_same_bits_again() -> None:
    case = Case(300, 7, torch.float32)
    for ours, theirs in zip(case.run(), case.run()):
        assert torch.equal(ours, theirs)
