"""The text of the CUDA kernels for cross-entropy, run on the CPU: against torch and `closed_forms` in float64.

At most three blocks are launched here, so that each takes several rows.
"""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import loss_cases
from tests.helpers.emulated import operators
from tests.helpers.emulated_losses import check_cross_entropy, cross_entropy, device, fresh_device  # noqa: F401
from tests.helpers.loss_cases import INFINITY, NAN
from tests.helpers.loss_truth import DTYPES, every_dtype, places, signs, triple

CLASSES = [1, 2, 7, 8, 9, 31, 32, 33, 1000, 1025, 5000]


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
    target, options = loss_cases.random_targets(classes, rows, dtype, weighted, ignored)
    options |= dict(reduction=reduction, label_smoothing=smoothing)
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
    loss_cases.check_ignored_rows(operators, dtype, classes)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(3, 5), (3, 1100), (0, 5), (0, 0), (3, 0)])
def test_nothing_to_learn_from(shape: tuple[int, int], smoothing: float) -> None:
    loss_cases.check_nothing_to_learn_from(operators, shape, smoothing)


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
    loss_cases.check_a_target_that_is_no_class(operators, bad, weighted, smoothing)


# ---------------------------------------------------------------------------------------------- extreme logits


@every_dtype
@pytest.mark.parametrize("classes", [40, 1100])
@pytest.mark.parametrize("mask", ["-inf", "lowest"])
@pytest.mark.parametrize("first", [False, True])
def test_masked_logits(dtype: torch.dtype, classes: int, mask: str, first: bool) -> None:
    loss_cases.check_masked_logits(operators, dtype, classes, mask, first)


@pytest.mark.parametrize("classes", [40, 1100])
def test_a_row_that_is_all_masked(classes: int) -> None:
    loss_cases.check_a_row_that_is_all_masked(operators, classes)


@every_dtype
@pytest.mark.parametrize("shift", [1e4, -1e4])
@pytest.mark.parametrize("classes", [40, 1100])
def test_large_logits(dtype: torch.dtype, shift: float, classes: int) -> None:
    loss_cases.check_large_logits(operators, dtype, shift, classes)


@every_dtype
@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize("place", [0, 5, -1])
@pytest.mark.parametrize("classes", [11, 1100])
def test_infinite_logits_make_the_loss_nan(dtype: torch.dtype, value: float, place: int, classes: int) -> None:
    loss_cases.check_infinite_logits(operators, dtype, value, place, classes)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_rounding_does_not_make_it_look_concave(offset: float) -> None:
    loss_cases.check_that_it_looks_convex(operators, offset)


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
    _, _, products, row = operators.cross_entropy_cotangent(*last[:2], target[-1:], None, -100, True, 0.0, 1.0)
    per_row = torch.full((rows, 3), NAN)
    per_row[-1] = row
    options = products, -100, True, 0.0, 1.0
    ours = operators.cross_entropy_products(x, v, u, target, None, per_row, *options)
    expected = operators.cross_entropy_products(*last, target[-1:], None, row, *options)
    assert expected.isfinite().all() and torch.equal(ours, expected)
