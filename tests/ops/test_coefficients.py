"""The β and ρ of a step between solves, by arithmetic of Python numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from curveball_fused import backends, ops
from curveball_fused.backends.scalars import AVERAGE_BETA, AVERAGE_RHO, BETA, LOSS, RHO, SCALARS, SKIPPED_STEPS
from tests.helpers.coefficient_cases import cases

BACKENDS = ["torch"] + (["cpu"] if backends.has_operators() else [])
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def kept(scalars: Tensor, loss: float, slope: float, room: float | None, sign: float) -> list[float]:
    new: list[float] = scalars.tolist()
    finite = math.isfinite(loss) and math.isfinite(slope)
    new[BETA], new[RHO] = (new[AVERAGE_BETA], new[AVERAGE_RHO]) if finite else (math.nan, math.nan)
    if room is not None and new[BETA] * slope > room:
        new[BETA] = room / slope
    new[LOSS] = sign * loss
    new[SKIPPED_STEPS] += not finite
    return new


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_keep_coefficients(backend: str, dtype: torch.dtype) -> None:
    """In double, whatever the dtype of the loss; the given scalars stay."""
    skipped, bounded = set(), set()
    for scalars, loss, slope, room, sign in cases([dtype]):
        before = scalars.clone()
        result = ops.keep_coefficients(scalars, loss, slope, room, sign=sign, backend=backend)
        expected = kept(before, loss.item(), slope.item(), None if room is None else room.item(), sign)
        torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(scalars, before, rtol=0, atol=0, equal_nan=True)
        skipped.add(bool(result[SKIPPED_STEPS] != before[SKIPPED_STEPS]))
        bounded.add(bool(result[BETA] != before[AVERAGE_BETA]))
    assert skipped == bounded == {False, True}


@every_backend
def test_a_loss_and_a_slope_that_are_finite_may_differ_in_dtype_from_the_room(backend: str) -> None:
    scalars = torch.full((len(SCALARS),), 0.5, dtype=torch.float64)
    loss, slope = torch.tensor(6e4, dtype=torch.float16), torch.tensor(1e30, dtype=torch.float64)
    result = ops.keep_coefficients(scalars, loss, slope, torch.tensor(3.0), backend=backend)
    assert result[BETA] == 3e-30 and result[RHO] == 0.5 and result[SKIPPED_STEPS] == 0.5


@every_backend
@pytest.mark.parametrize("sign", [0.0, 2.0, math.nan])
def test_a_sign_that_is_none_is_refused(backend: str, sign: float) -> None:
    scalars = torch.ones(len(SCALARS), dtype=torch.float64)
    with pytest.raises(ValueError, match="sign must be 1, or -1"):
        ops.keep_coefficients(scalars, scalars[0], scalars[1], sign=sign, backend=backend)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the native kernels")
def test_the_native_operator_checks_its_arguments() -> None:
    scalars, one = torch.ones(len(SCALARS), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for message, arguments in {
        "scalars must be": (scalars[:3], one, one, one),
        "scalars has dtype": (scalars.float(), one, one, one),
        "loss must be": (scalars, scalars[:2], one, one),
        r"loss\[0\] has dtype": (scalars, one.long(), one, one),
        "slope has dtype": (scalars, one, one.float(), one),
        "room must be": (scalars, one, one, scalars[:2]),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            torch.ops.curveball_fused.keep_coefficients(*arguments, 1.0)
