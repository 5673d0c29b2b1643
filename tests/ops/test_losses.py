"""The loss operators: what they refuse, with words; and that their shapes are those of the fakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from curveball_fused import backends
from curveball_fused.ops import losses as loss_ops

X, V, U = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 3)
TARGET, LABELS = torch.tensor([0, 2, 1, 1]), torch.rand(4, 3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: loss_ops.cross_entropy_cotangent(X[0], V[0], TARGET), "rows, classes"),
        (lambda: loss_ops.cross_entropy_cotangent(X, V[:2], TARGET), "v is .*must agree"),
        (lambda: loss_ops.cross_entropy_cotangent(X, V.double(), TARGET), "float64.*float32"),
        (lambda: loss_ops.cross_entropy_cotangent(X, V, TARGET.int()), "int64"),
        (lambda: loss_ops.cross_entropy_cotangent(X, V, TARGET[:2]), r"int64\[4\]"),
        (lambda: loss_ops.cross_entropy_cotangent(X, V, TARGET.repeat_interleave(2)[::2]), "contiguous"),
        (lambda: loss_ops.cross_entropy_cotangent(X, V, TARGET, torch.ones(4)), "3 classes"),
        (lambda: loss_ops.cross_entropy_cotangent(X.T.contiguous().T, V, TARGET), "x is not contiguous"),
        (lambda: loss_ops.cross_entropy_products(X, V, U[:1], TARGET, X[:0], X[0]), "u is"),
        (lambda: loss_ops.mse_cotangent(X, V, LABELS[:3]), "target is"),
        (lambda: loss_ops.mse_products(X, V, U.bfloat16(), LABELS, X[0]), "bfloat16"),
        (lambda: loss_ops.bce_cotangent(X, V, LABELS.to("meta")), "on meta"),
        (lambda: loss_ops.bce_products(X, V, U.T.contiguous().T, LABELS, X[0]), "u is not contiguous"),
        (lambda: loss_ops.mse_cotangent(X, V, LABELS, backend="fast"), "backend must be one of"),
    ],
)
def test_arguments_that_do_not_fit(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.skipif(not backends.has_operators(), reason="needs the native library's schemas")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_fakes_have_the_shapes_of_the_results(dtype: torch.dtype) -> None:
    x, v, u, y = (t.to(dtype) for t in (X, V, U, LABELS))

    def shapes(results: tuple[Tensor, ...]) -> list[Any]:
        return [(t.shape, t.dtype) for t in results[:3]]

    operators = torch.ops.curveball_fused
    fx, fv, fu, fy, ft = (t.to("meta") for t in (x, v, u, y, TARGET))
    fake = operators.cross_entropy_cotangent(fx, fv, ft, None, -100, True, 0.1, 1.0)
    assert shapes(fake) == shapes(loss_ops.cross_entropy_cotangent(x, v, TARGET, label_smoothing=0.1))
    assert fake[3].shape == (4, 3)
    fake = operators.mse_cotangent(fx, fv, fy, True, 1.0)
    assert shapes(fake) == shapes(loss_ops.mse_cotangent(x, v, y))
    products = fake[2]
    fake = operators.bce_cotangent(fx, fv, fy, None, None, True, 1.0)
    assert shapes(fake) == shapes(loss_ops.bce_cotangent(x, v, y))
    for five in (
        operators.cross_entropy_products(fx, fv, fu, ft, None, fx, products, -100, True, 0.1, 1.0),
        operators.mse_products(fx, fv, fu, fy, products, True, 1.0),
        operators.bce_products(fx, fv, fu, fy, None, None, products, True, 1.0),
    ):
        assert five.shape == (5,) and five.dtype == torch.float64
