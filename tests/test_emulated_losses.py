"""The text of the CUDA kernels for cross-entropy, run on the CPU: against torch and `closed_forms` in float64.

At most three blocks are launched here, so that each takes several rows.
"""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emulated import operators
from emulated_losses import check_cross_entropy, cross_entropy, device, fresh_device  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_truth import DTYPES, arithmetic, every_dtype, places, signs, triple
from torch import Tensor

CLASSES = [1, 2, 7, 8, 9, 31, 32, 33, 1000, 1025, 5000]
INFINITY, NAN = float("inf"), float("nan")


@settings(deadline=None, max_examples=120)
@given(
    classes=st.sampled_from(CLASSES),
    rows=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    where=places,
    weighted=st.booleans(),
    ignored=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=st.sampled_from(["mean", "sum"]),
    sign=signs,
    launched=st.tuples(
        st.integers(0, 1000), st.sampled_from([0, 0, 32, 128, 512, 1024]), st.sampled_from([4096, 10**5])
    ),
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
    launched: tuple[int, int, int],
    seed: int,
) -> None:
    """Classes around the sizes of vectors and teams, arrays misaligned alike or not, all options."""
    for setting, value in zip((device.set_seed, device.set_threads, device.set_max_shared_bytes), launched):
        setting(value)
    torch.manual_seed(seed)
    target = torch.randint(0, classes, (rows,))
    options: dict[str, Any] = dict(reduction=reduction, label_smoothing=smoothing)
    if weighted:
        options["weight"] = torch.rand(classes).to(arithmetic(dtype)) + 0.1
    if ignored and classes > 1:
        options["ignore_index"] = int(target[0])
        target = torch.cat((target, (target[:1] + 1) % classes))  # one that is kept
    check_cross_entropy(*triple((len(target), classes), dtype, where), target, sign, **options)


def test_cross_entropy_is_what_autograd_makes_of_torchs() -> None:
    """Without `closed_forms`: the gradient, and the Hessian by double backward."""
    x, v, u = triple((5, 11), torch.float64)
    target, options = torch.randint(0, 11, (5,)), dict(weight=torch.rand(11).double(), label_smoothing=0.2)
    ours = cross_entropy(x, v, u, target, **options)
    x.requires_grad_()
    loss = F.cross_entropy(x, target, **options)  # type: ignore[arg-type]
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    hv, hu = (torch.autograd.grad(g, x, t, retain_graph=True)[0] for t in (v, u))
    expected = torch.stack([(a * b).sum() for a, b in ((g, v), (v, hv), (g, u), (v, hu), (u, hu))])
    torch.testing.assert_close(ours, (loss, g + hv, expected), rtol=1e-12, atol=1e-14)


@every_dtype
@pytest.mark.parametrize("classes, rows", [(50257, 2), (131_075, 1)])
def test_very_many_classes(dtype: torch.dtype, classes: int, rows: int) -> None:
    """Rows longer than shared memory, and a target in the last, single element."""
    target = torch.full((rows,), classes - 1)
    check_cross_entropy(*triple((rows, classes), dtype), target)
    check_cross_entropy(*triple((rows, classes), dtype), target, -1.0, label_smoothing=0.1, reduction="sum")


@every_dtype
def test_how_much_of_a_row_is_staged_does_not_matter(dtype: torch.dtype) -> None:
    x, v, u = triple((5, 20_000), dtype)
    target, results = torch.randint(0, 20_000, (5,)), []
    for limit in (232_448, 101_376, 49_152, 20_000, 4096):
        device.set_max_shared_bytes(limit)
        results.append(cross_entropy(x, v, u, target))
        assert max(shared for _, _, shared in device.launches()) <= limit
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@every_dtype
@pytest.mark.parametrize("classes", [1025, 1031])
def test_rows_that_are_misaligned_each_in_its_own_way(dtype: torch.dtype, classes: int) -> None:
    """The number of whole vectors changes from row to row, while some warps are still at the row before."""
    x, v, u = triple((24, classes), dtype)
    target = torch.randint(0, classes, (24,))
    for seed in range(5):
        device.set_seed(seed)
        check_cross_entropy(x, v, u, target)


@pytest.mark.parametrize("classes, rows", [(10, 100), (3001, 10)])
def test_the_same_bits_in_any_order_of_warps_and_blocks(classes: int, rows: int) -> None:
    x, v, u = triple((rows, classes), torch.float32)
    target, results = torch.randint(0, classes, (rows,)), []
    for seed, poison in [(0, 0xFF), (1, 0xFF), (2, 0x00), (3, 0x7B)]:
        device.set_seed(seed)
        device.set_poison(poison)
        results.append(cross_entropy(x, v, u, target, weight=torch.arange(1.0, classes + 1), label_smoothing=0.1))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_many_rows() -> None:
    """Several blocks add up the targets' weights, too."""
    target = torch.randint(0, 3, (20_000,))
    target[::7] = -100
    check_cross_entropy(*triple((20_000, 3), torch.float32), target, weight=torch.tensor([0.5, 2.0, 1.0]))
    assert device.launches()[0][0] == 3


@every_dtype
@pytest.mark.parametrize("classes", [9, 1100])
def test_ignored_rows_are_not_even_read(dtype: torch.dtype, classes: int) -> None:
    x, v, u = triple((12, classes), dtype)
    target = torch.randint(0, 4, (12,))
    target[4:] = 4
    expected = cross_entropy(x[:4], v[:4], u[:4], target[:4])
    for t in (x, v, u):
        t[4:] = NAN
    ours = cross_entropy(x, v, u, target, ignore_index=4)
    assert not ours.c[4:].any() and torch.equal(ours.c[:4], expected.c)
    torch.testing.assert_close(ours[::2], expected[::2], rtol=1e-12, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(3, 5), (3, 1100), (0, 5), (0, 0), (3, 0)])
def test_nothing_to_learn_from(shape: tuple[int, int], smoothing: float) -> None:
    """All targets ignored, no rows, no classes: as torch, NaN for the mean, 0 for the sum, and no gradient."""
    x, v, u = triple(shape, torch.float32)
    target = torch.full(shape[:1], -100)
    for reduction in ("mean", "sum"):
        ours = cross_entropy(x, v, u, target, reduction=reduction, label_smoothing=smoothing)
        torch.testing.assert_close(ours.loss.float(), F.cross_entropy(x, target, reduction=reduction), equal_nan=True)
        assert ours.c.shape == x.shape and not ours.c.any()
        if reduction == "sum":
            assert not ours.products.any()


@pytest.mark.parametrize("classes", [4, 1100])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_of_zero(classes: int, smoothing: float) -> None:
    """A row of weight zero adds nothing; where all weights of the targets are zero, the mean is NaN."""
    weight = torch.ones(classes)
    weight[0] = 0
    x, v, u = triple((3, classes), torch.float32)
    options: dict[str, Any] = dict(weight=weight, label_smoothing=smoothing)
    check_cross_entropy(x, v, u, torch.tensor([0, 1, 2]), **options)
    if not smoothing:
        ours = cross_entropy(x, v, u, torch.zeros(3, dtype=torch.int64), **options)
        assert all(t.isnan().all() for t in ours)


@pytest.mark.parametrize("bad", [-1, 7, 2**40, -(2**62)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_target_that_is_no_class(bad: int, weighted: bool, smoothing: float) -> None:
    """NaN in the loss, the products and its own row only."""
    x, v, u = triple((3, 7), torch.float32)
    target = torch.tensor([2, bad, 5])
    ours = cross_entropy(x, v, u, target, weight=torch.rand(7) if weighted else None, label_smoothing=smoothing)
    assert ours.loss.isnan() and not ours.products.isfinite().all()
    assert ours.c[1].isnan().all() and ours.c[::2].isfinite().all()


# ---------------------------------------------------------------------------------------------- extreme logits


@every_dtype
@pytest.mark.parametrize("classes", [40, 1100])
@pytest.mark.parametrize("mask", ["-inf", "lowest"])
@pytest.mark.parametrize("first", [False, True])
def test_masked_logits(dtype: torch.dtype, classes: int, mask: str, first: bool) -> None:
    """-inf, or the lowest finite number, in whole vectors and at the beginning of every thread's share."""
    x, v, u = triple((4, classes), dtype)
    masked = slice(0, classes - 7) if first else slice(5, classes)
    x[:, masked] = -INFINITY if mask == "-inf" else torch.finfo(dtype).min
    target = torch.full((4,), classes - 3 if first else 1)
    ours = check_cross_entropy(x, v, u, target)
    assert not ours.c[:, masked].any()
    smoothed = cross_entropy(x, v, u, target, label_smoothing=0.1)
    assert smoothed.loss > 1e3 and smoothed.c.isfinite().all() and smoothed.products.isfinite().all()


@pytest.mark.parametrize("classes", [40, 1100])
def test_a_row_that_is_all_masked(classes: int) -> None:
    """Of finite numbers, the softmax is uniform; of -inf it is NaN."""
    x, v, u = triple((2, classes), torch.float32)
    target = torch.tensor([3, 4])
    check_cross_entropy(x.fill_(torch.finfo(torch.float32).min), v, u, target)
    x[0] = -INFINITY
    ours = cross_entropy(x, v, u, target)
    assert ours.loss.isnan() and ours.c[0].isnan().all() and ours.c[1].isfinite().all()


@every_dtype
@pytest.mark.parametrize("shift", [1e4, -1e4])
@pytest.mark.parametrize("classes", [40, 1100])
def test_large_logits(dtype: torch.dtype, shift: float, classes: int) -> None:
    """The maximum is taken off before anything is rounded."""
    x, v, u = triple((3, classes), dtype)
    check_cross_entropy(x + shift, v, u, torch.tensor([0, 7, classes - 1]), label_smoothing=0.1)
    check_cross_entropy(1000 * x, v, u, torch.tensor([0, 7, classes - 1]))


@every_dtype
@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize("place", [0, 5, -1])
@pytest.mark.parametrize("classes", [11, 1100])
def test_infinite_logits_make_the_loss_nan(dtype: torch.dtype, value: float, place: int, classes: int) -> None:
    x, v, u = triple((3, classes), dtype)
    x[1, place] = value
    ours = cross_entropy(x, v, u, torch.tensor([1, 2, 3]))
    assert ours.loss.isnan() and ours.products[[1, 3, 4]].isnan().all()
    assert ours.c[1].isnan().any() and ours.c[::2].isfinite().all()


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_rounding_does_not_make_it_look_concave(offset: float) -> None:
    """Tangents that are nearly constant in a row: v'.Hv' is a small difference of large numbers, unless centred."""
    x, v, u = triple((4, 1300), torch.float32)
    products = cross_entropy(x, v + offset, 0.5 * v + offset + 0.01 * u, torch.tensor([0, 1, 2, 3])).products
    _, vhv, _, vhu, uhu = products.tolist()
    assert vhv >= 0 and uhu >= 0 and vhu**2 <= (1 + 1e-4) * vhv * uhu


# ---------------------------------------------------------------------------------------------- more than 2^31 elements


def reserved(rows: int, classes: int) -> Tensor:
    """Zeros in bfloat16 that take memory only where they are touched."""
    no_reserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, 2 * rows * classes, flags=flags), dtype=torch.bfloat16).view(rows, classes)


def test_more_than_2_31_elements() -> None:
    """All rows but the last are ignored; that one begins beyond the reach of 32 bits."""
    rows, classes = 2100, 2**20 + 8
    assert (rows - 1) * classes > 2**31
    x, v, u = (reserved(rows, classes) for _ in range(3))
    target = torch.full((rows,), -100)
    target[-1] = classes - 2
    for t in (x, v, u):
        t[-1].copy_(torch.randn(classes))
    last = [t[-1:].clone() for t in (x, v, u)]
    _, _, products, row = operators.cross_entropy_products(*last[:2], target[-1:], None, -100, True, 0.0, 1.0)
    per_row = torch.full((rows, 3), NAN)
    per_row[-1] = row
    options = products, -100, True, 0.0, 1.0
    ours = operators.cross_entropy_dots(x, v, u, target, None, per_row, *options)
    expected = operators.cross_entropy_dots(*last, target[-1:], None, row, *options)
    assert expected.isfinite().all() and torch.equal(ours, expected)
