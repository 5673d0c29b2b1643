"""The tangents of layer norm, RMS norm and batch norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from curveball_fused.backends.dtypes import at_least_float32
from curveball_fused.ops import tangents as tangent_ops
from tests.helpers.tangent_cases import BACKENDS, DTYPES, assert_near, batch_norm_case, doubles, jvp, layer_norm_case


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 37), (3, 16), (2, 128), (2, 3000), (0, 7), (7, 48)])
def test_layer_norm(shape: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    (dx, x, mean, rstd), (w, dw, db) = layer_norm_case(*shape, dtype)
    for weight, dweight, dbias in ((w, dw, db), (None, None, None), (w, None, db), (w, dw, None)):
        result = tangent_ops.layer_norm_tangent(dx, x, mean, rstd, weight, dweight, dbias, backend=backend)
        one, zero = torch.ones_like(w), torch.zeros_like(w)
        parts = doubles(x, one if weight is None else weight, zero)
        tangents = doubles(dx, zero if dweight is None else dweight, zero if dbias is None else dbias)
        truth = jvp(lambda x, w, b: F.layer_norm(x, shape[1:], w, b, 1e-5), parts, tangents)
        assert_near(result, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype, backend: str) -> None:
    (dx, x, _, _), (w, dw, db) = layer_norm_case(6, 75, dtype, offset=2.0)
    rstd = (at_least_float32(x).square().mean(1) + 1e-3).rsqrt()
    result = tangent_ops.layer_norm_tangent(dx, x, None, rstd, w, dw, db, backend=backend)
    truth = jvp(lambda x, w, b: F.rms_norm(x, (75,), w, 1e-3) + b, doubles(x, w, db), doubles(dx, dw, db))
    assert_near(result, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (3, 20, 4, 4), (9, 17), (2, 33, 6), (2, 5, 2, 3, 2), (5, 16, 37, 41)])
def test_batch_norm(shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, backend: str) -> None:
    (dx, x, mean, rstd), (w, dw, db) = batch_norm_case(shape, dtype, channels_last)
    one, zero = torch.ones_like(w), torch.zeros_like(w)
    for weight, dweight, dbias in ((w, dw, db), (None, None, None), (w, dw, None)):
        parts = doubles(x, one if weight is None else weight, zero)
        tangents = doubles(dx, zero if dweight is None else dweight, zero if dbias is None else dbias)
        for training in (True, False):

            def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
                if training:
                    return F.batch_norm(x, None, None, w, b, True)
                return F.batch_norm(x, mean.double(), rstd.double() ** -2 - 1e-5, w, b, False)

            result = tangent_ops.batch_norm_tangent(
                dx, x, mean, rstd, weight, dweight, dbias, training=training, backend=backend
            )
            assert result.stride() == x.stride()
            assert_near(result, jvp(function, parts, tangents))


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 0, 2, 2), (2, 3, 0, 2)])
def test_batch_norm_of_nothing(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    statistics = torch.ones(shape[1])
    assert tangent_ops.batch_norm_tangent(x, x, statistics, statistics, training=True).shape == shape
