"""The text of the CUDA kernels for elementwise losses, run on the CPU; and what all loss operators refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.emulated import operators
from tests.helpers.emulated_losses import check_elements, device, fresh_device  # noqa: F401
from tests.helpers.loss_cases import check_no_elements, check_saturated_logits, random_weights
from tests.helpers.loss_truth import DTYPES, arithmetic, check_errors, every_dtype, places, signs


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
    device.set_seed(launched[0])
    device.set_threads(launched[1])
    torch.manual_seed(seed)
    weights = random_weights(rows, columns, dtype, weight=weight, pos_weight=pos_weight)
    check_elements((rows, columns), dtype, where, sign, reduction=reduction, **weights)


@every_dtype
def test_many_elements(dtype: torch.dtype) -> None:
    """More than all blocks take at once."""
    pos_weight = torch.rand(40_003).to(arithmetic(dtype))
    check_elements((3, 40_003), dtype, (0, 0, 0), 1.0, reduction="mean", pos_weight=pos_weight)


@pytest.mark.parametrize("value", [0.0, -0.0, 30.0, -30.0, 100.0, -100.0, 1e4, -1e4])
def test_saturated_logits(value: float) -> None:
    check_saturated_logits(operators, value)


def test_no_elements() -> None:
    check_no_elements(operators)


# ---------------------------------------------------------------------------------------------- bad arguments


def test_errors() -> None:
    check_errors(operators)
