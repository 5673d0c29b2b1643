"""Cross-entropy in Triton, against torch and `closed_form_losses` in float64: on a GPU, else by the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from curveball_fused.backends.dtypes import compute_dtype
from curveball_fused.backends.reference import closed_form_losses
from curveball_fused.backends.triton import losses as triton_losses
from curveball_fused.backends.triton.row_blocks import aligned_range
from tests.helpers.tiers import slow
from tests.helpers.triton_cases import DEVICE, INF, NAN, RUNTIME_WARNINGS, draw, two_dtypes_first
from tests.helpers.triton_cases import check_loss as check

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = RUNTIME_WARNINGS


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
        """Loss, c, all five products, and row_stats."""
        options = (self.ignore_index, self.mean, self.smoothing, self.sign)
        loss, c, two, row_stats = triton_losses.cross_entropy_cotangent(
            self.x, self.v, self.target, self.weight, *options
        )
        products = triton_losses.cross_entropy_products(
            self.x, self.v, self.u, self.target, self.weight, row_stats, two, *options
        )
        assert torch.equal(products[:2].isnan(), two.isnan()) and torch.equal(
            products[:2].nan_to_num(), two.nan_to_num()
        )
        return loss, c, products, row_stats

    def options(self) -> dict[str, Any]:
        weight = None if self.weight is None else self.weight.double()
        reduction = "mean" if self.mean else "sum"
        return dict(weight=weight, ignore_index=self.ignore_index, reduction=reduction, label_smoothing=self.smoothing)

    def check(self) -> None:
        loss, c, products, _ = self.run()
        x = self.x.double()
        expected = F.cross_entropy(x, self.target, **self.options())
        quadratic = closed_form_losses.cross_entropy(x, self.target, **self.options())
        largest = self.x.double().nan_to_num(neginf=0.0).abs().max().item()
        got, parts = (loss, c, products), quadratic[0].abs()
        check(self.dtype, self.sign, expected, quadratic, self.v, self.u, got, parts, largest)


@pytest.mark.parametrize(
    "classes", [1, 2, 16, 17, 65, 256, 257, 1025, *map(slow, (3, 15, 63, 64, 255, 513, 1000, 1024, 3000))]
)
def test_cross_entropy_over_classes(classes: int) -> None:
    for n, dtype in ((1, torch.float64), (3, torch.float32)):
        Case(n, classes, dtype).check()


@two_dtypes_first
@pytest.mark.parametrize("classes", [10, 700])
def test_cross_entropy_over_dtypes(dtype: torch.dtype, classes: int) -> None:
    for offset in (0, 1):
        case = Case(5, classes, dtype, offset=offset)
        case.weight, case.sign = torch.rand(classes, dtype=compute_dtype(dtype), device=DEVICE) + 0.1, -1.0
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
    loss, c, products, row_stats = case.run()
    assert loss == 0 and c.shape == (0, 5) and not products.any() and row_stats.shape == (0, 3)


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
    row_stats, kept = case.run()[3], torch.tensor([0, 2, 3])
    own = case.weight[case.target[kept]]
    s = 0.8 * own + 0.2 / classes * case.weight.sum()
    expected = (case.x.logsumexp(1)[kept], (case.x.softmax(1) * case.v).sum(1)[kept], s / own.sum())
    torch.testing.assert_close(row_stats[kept], torch.stack(expected, 1), rtol=1e-12, atol=1e-12)
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
def store_aligned_range(result, classes, BLOCK_MAIN: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    begin, end = aligned_range(tile, classes, 1, BLOCK_MAIN)
    tl.store(result + 2 * tile, begin)
    tl.store(result + 2 * tile + 1, end)


@pytest.mark.parametrize("classes", [257, 1000, 1024, 50257])
def test_the_aligned_range_of_long_rows(classes: int) -> None:
    """The kernels rely on it, and the interpreter would not notice."""
    result = torch.zeros(40, 2, dtype=torch.int64, device=DEVICE)
    store_aligned_range[(40,)](result, classes, BLOCK_MAIN=256)
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


def test_the_same_bits_again() -> None:
    case = Case(300, 7, torch.float32)
    for ours, theirs in zip(case.run(), case.run()):
        assert torch.equal(ours, theirs)
