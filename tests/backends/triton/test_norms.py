"""Tangents of normalizations in Triton against forward-mode autograd in float64: on a GPU, else by the interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from curveball_fused.backends.dtypes import compute_dtype
from curveball_fused.backends.triton import batch_norm as triton_batch_norm
from curveball_fused.backends.triton import tangents as triton_tangents
from tests.helpers.tiers import slow
from tests.helpers.triton_cases import DEVICE, NAN, RUNTIME_WARNINGS, channels_last, draw, two_dtypes_first
from tests.helpers.triton_cases import check_tangent as check

pytestmark = RUNTIME_WARNINGS


def statistics(x: Tensor, dims: list[int], centered: bool = True) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation as the forward kernels give them."""
    exact, dtype = x.double(), compute_dtype(x.dtype)
    mean = exact.mean(dims, keepdim=True) if centered else torch.zeros_like(exact).mean(dims, keepdim=True)
    rstd = ((exact - mean).square().mean(dims) + 1e-5).rsqrt()
    return mean.flatten().to(dtype), rstd.to(dtype)


@two_dtypes_first
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 7), (40, 48), (5, 64), (2, 1000), (2, 8200)])
def test_layer_norm(dtype: torch.dtype, rows: int, length: int) -> None:
    for offset in (0, 1):
        x, dx = (draw(rows, length, dtype=dtype, offset=offset) + shift for shift in (3, 0))
        w, b, dw, db = (draw(length, dtype=dtype) for _ in range(4))
        got = triton_tangents.layer_norm_tangent(dx, x, *statistics(x, [1]), w, dw, db)
        assert got.dtype == dtype
        if length == 1:  # x̂ is 0 and stays so
            torch.testing.assert_close(got, db.expand(rows, 1))
            continue
        check(got, lambda x, w, b: F.layer_norm(x, (length,), w, b), [x, w, b], [dx, dw, db])


@two_dtypes_first
@pytest.mark.parametrize("length", [33, 8200])
def test_rms_norm(dtype: torch.dtype, length: int) -> None:
    x, dx, w, dw = *(draw(3, length, dtype=dtype) for _ in range(2)), *(draw(length, dtype=dtype) for _ in range(2))
    got = triton_tangents.layer_norm_tangent(dx, x, None, statistics(x, [1], centered=False)[1], w, dw, None)
    check(got, lambda x, w: F.rms_norm(x, (length,), w, 1e-5), [x, w], [dx, dw])


@pytest.mark.parametrize("length", [20, 8200])
def test_layer_norm_without_parameters(length: int) -> None:
    x, dx = (draw(2, length, dtype=torch.float64) for _ in range(2))
    mean, rstd = statistics(x, [1])
    w, b, db = (draw(length, dtype=torch.float64) for _ in range(3))
    got = triton_tangents.layer_norm_tangent(dx, x, mean, rstd, None, None, None)
    check(got, lambda x: F.layer_norm(x, (length,)), [x], [dx])
    got = triton_tangents.layer_norm_tangent(dx, x, mean, rstd, w, None, db)
    check(got, lambda x, b: F.layer_norm(x, (length,), w.to(x.dtype), b), [x, b], [dx, db])


@pytest.fixture(params=[False, True], ids=["whole", "parts"])
def in_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether small channels too are shared by many programs."""
    if request.param:
        for name, value in dict(BLOCK_TILE=64, COLUMNS=16, STEPS=1).items():
            monkeypatch.setattr(triton_batch_norm, name, value)
    return bool(request.param)


@two_dtypes_first
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), slow((3, 20, 6, 8)), slow((90, 5)), (7, 70, 3)])
def test_batch_norm(shape: tuple[int, ...], training: bool, last: bool, dtype: torch.dtype, in_parts: bool) -> None:
    channels = shape[1]
    x, dx = (draw(*shape, dtype=dtype) + shift for shift in (3, 0))
    if last:
        x, dx = channels_last(x), channels_last(dx)
    w, b, dw, db = (draw(channels, dtype=dtype) for _ in range(4))
    mean, rstd = statistics(x, [i for i in range(x.dim()) if i != 1])
    running: tuple[Tensor | None, ...] = (None, None)
    if not training:
        mean, rstd = draw(channels, dtype=compute_dtype(dtype)), draw(channels, dtype=compute_dtype(dtype)).abs() + 0.5
        running = mean, rstd.double().pow(-2) - 1e-5
    got = triton_tangents.batch_norm_tangent(dx, x, mean, rstd, w, dw, db, training)
    assert got.dtype == dtype and got.stride() == x.stride()

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        fixed = (None if t is None else t.to(x.dtype) for t in running)
        return F.batch_norm(x, *fixed, w, b, training)

    check(got, function, [x, w, b], [dx, dw, db])


def test_batch_norm_without_parameters(in_parts: bool) -> None:
    x, dx = (draw(6, 4, 9, 4, dtype=torch.float64) for _ in range(2))
    got = triton_tangents.batch_norm_tangent(dx, x, *statistics(x, [0, 2, 3]), None, None, None, True)
    check(got, lambda x: F.batch_norm(x, None, None, training=True), [x], [dx])


def test_norms_of_nothing() -> None:
    x, some = draw(0, 5, dtype=torch.float32), torch.ones(5, device=DEVICE)
    assert triton_tangents.layer_norm_tangent(x, x, some[:0], some[:0], some, some, some).shape == (0, 5)
    for shape in ((0, 5, 3), (2, 5, 0)):
        x = draw(*shape, dtype=torch.float32)
        assert triton_tangents.batch_norm_tangent(x, x, some, some, some, some, some, True).shape == shape


def test_a_row_that_is_not_finite_leaves_the_others_alone() -> None:
    x, dx = (draw(40, 48, dtype=torch.float32) for _ in range(2))
    mean, rstd = statistics(x, [1])
    expected = triton_tangents.layer_norm_tangent(dx, x, mean, rstd, None, None, None)
    dx[17, 3] = NAN
    got = triton_tangents.layer_norm_tangent(dx, x, mean, rstd, None, None, None)
    others = torch.arange(40, device=DEVICE) != 17
    assert got[17].isnan().all() and torch.equal(got[others], expected[others])
