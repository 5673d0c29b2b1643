"""The text of the CUDA kernels for cross-entropy, run on the CPU; test_native_losses has what is not GPUs' own."""

from __future__ import annotations

import mmap
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import loss_truth
from tests.helpers.emulated import operators
from tests.helpers.loss_cases import NAN
from tests.helpers.loss_truth import every_dtype, triple

cross_entropy = partial(loss_truth.cross_entropy, operators)
check_cross_entropy = partial(loss_truth.check_cross_entropy, operators)


@every_dtype
def test_how_much_of_a_row_is_staged_does_not_matter(device: Any, dtype: torch.dtype) -> None:
    x, v, u = triple((5, 20_000), dtype)
    target, results = torch.randint(0, 20_000, (5,)), []
    for limit in (232_448, 101_376, 49_152, 20_000, 4096):
        device.set_max_shared_bytes(limit)
        results.append(cross_entropy(x, v, u, target))
        assert max(shared for _, _, shared in device.launches()) <= limit
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@every_dtype
@pytest.mark.parametrize("classes", [1025, 1031])
def test_rows_that_are_misaligned_each_in_its_own_way(device: Any, dtype: torch.dtype, classes: int) -> None:
    """The number of whole vectors changes from row to row, while some warps are still at the row before."""
    x, v, u = triple((24, classes), dtype)
    target = torch.randint(0, classes, (24,))
    for seed in range(5):
        device.set_seed(seed)
        check_cross_entropy(x, v, u, target)


@pytest.mark.parametrize("classes, rows", [(10, 100), (3001, 10)])
def test_the_same_bits_in_any_order_of_warps_and_blocks(device: Any, classes: int, rows: int) -> None:
    x, v, u = triple((rows, classes), torch.float32)
    target, results = torch.randint(0, classes, (rows,)), []
    for seed, poison in [(0, 0xFF), (1, 0xFF), (2, 0x00), (3, 0x7B)]:
        device.set_seed(seed)
        device.set_poison(poison)
        results.append(cross_entropy(x, v, u, target, weight=torch.arange(1.0, classes + 1), label_smoothing=0.1))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_many_rows(device: Any) -> None:
    """Three blocks, no more are launched here, add up the targets' weights, too."""
    target = torch.randint(0, 3, (20_000,))
    target[::7] = -100
    check_cross_entropy(*triple((20_000, 3), torch.float32), target, weight=torch.tensor([0.5, 2.0, 1.0]))
    assert device.launches()[0][0] == 3


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
