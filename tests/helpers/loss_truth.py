"""What the tests of native loss kernels share: arguments, right results in float64, comparison.

`operators` is torch.ops.curveball_fused, or the CUDA kernels emulated on the CPU, torch.ops.curveball_emulated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from curveball_fused.backends.reference import closed_form_losses

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
signs = st.sampled_from([1.0, -1.0])
places = st.one_of(st.sampled_from([(0, 0, 0), (1, 1, 1)]), st.tuples(*[st.integers(0, 8)] * 3))


class Result(NamedTuple):
    loss: Tensor
    c: Tensor
    products: Tensor  # all five


def draw(shape: tuple[int, ...], dtype: torch.dtype, place: int = 0, scale: float = 1.0) -> Tensor:
    """Random numbers, `place` elements behind an aligned address."""
    flat = (scale * torch.randn(torch.Size(shape).numel() + place, dtype=torch.float64)).to(dtype)
    return flat[place:].view(shape)


def triple(shape: tuple[int, ...], dtype: torch.dtype, where: tuple[int, int, int] = (0, 0, 0)) -> tuple[Tensor, ...]:
    """x, v and u. v has a mean that must be taken off."""
    x, v, u = (draw(shape, dtype, place) for place in where)
    return x.mul_(2), v.add_(3), u.sub_(1)


# ---------------------------------------------------------------------------------------------- what is right


def quadratic(loss: Tensor, closed: Any, v: Tensor, u: Tensor, sign: float) -> tuple[Result, Tensor, Tensor]:
    """The results in the precision of the arguments; and the magnitude of what c and the products add up."""
    g, center, product = closed
    v, u = v.to(g.dtype), u.to(g.dtype)
    cv, cu = center(v), center(u)
    hv, hu = product(cv), product(cu)
    terms = (g * cv, cv * hv, g * cu, cv * hu, cu * hu)
    exact = Result(loss, sign * (g + hv), sign * torch.stack([t.sum(dtype=torch.float64) for t in terms]))
    # What is taken off v by its mean counts too.
    wide_v, wide_u = v.abs() + (v - cv).abs(), u.abs() + (u - cu).abs()
    h = product(torch.ones_like(v)).abs()
    slope = g.abs() + h
    sums = (slope * wide_v, h * wide_v**2, slope * wide_u, h * wide_v * wide_u, h * wide_u**2)
    return exact, slope + h * wide_v, torch.stack([t.sum(dtype=torch.float64) for t in sums])


def compare(ours: Result, dtype: torch.dtype, exact: Any, composed: Result) -> None:
    """Sums to 1e-12 or 1e-5 of their terms' magnitude; c in half precision as good as torch's composition."""
    expected, c_size, sizes = exact
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert ours.loss.dtype == ours.products.dtype == torch.float64 and ours.loss.shape == () and ours.c.dtype == dtype
    torch.testing.assert_close(ours.loss, expected.loss, rtol=tolerance, atol=tolerance, equal_nan=True)
    off = (ours.products - expected.products).abs()
    assert (off <= tolerance * sizes + 1e-300).all(), (ours.products, expected.products, sizes)
    c_off = (ours.c.double() - expected.c).abs()
    if dtype in (torch.float32, torch.float64):
        assert (c_off <= tolerance * c_size + 1e-37).all()
    else:
        tiny = torch.finfo(dtype).smallest_normal
        assert c_off.max() <= 2 * (composed.c.to(dtype).double() - expected.c).abs().max() + tiny
        assert (c_off <= (torch.finfo(dtype).eps + 1e-5) * c_size + tiny).all()


def cross_entropy(
    operators: Any, x: Tensor, v: Tensor, u: Tensor, target: Tensor, sign: float = 1.0, **options: Any
) -> Result:
    weight, ignore_index = options.get("weight"), options.get("ignore_index", -100)
    rest = ignore_index, options.get("reduction", "mean") == "mean", options.get("label_smoothing", 0.0), sign
    loss, c, products, rows = operators.cross_entropy_cotangent(x, v, target, weight, *rest)
    return Result(loss, c, operators.cross_entropy_products(x, v, u, target, weight, rows, products, *rest))


def check_cross_entropy(
    operators: Any, x: Tensor, v: Tensor, u: Tensor, target: Tensor, sign: float = 1.0, **options: Any
) -> Result:
    wide = {k: value.double() if isinstance(value, Tensor) else value for k, value in options.items()}
    before = [t.clone() for t in (x, v, u)]
    ours = cross_entropy(operators, x, v, u, target, sign, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, v, u)))
    loss = F.cross_entropy(x.double(), target, **wide)
    exact = quadratic(loss, closed_form_losses.cross_entropy(x.double(), target, **wide), v.double(), u.double(), sign)
    composed = quadratic(loss, closed_form_losses.cross_entropy(x, target, **options), v, u, sign)[0]
    compare(ours, x.dtype, exact, composed)
    return ours


def check_elements(
    operators: Any, shape: tuple[int, ...], dtype: torch.dtype, where: Any, sign: float, **options: Any
) -> None:
    """Both losses, against closed_form_losses; `weight` and `pos_weight` belong to the binary cross-entropy."""
    x, v, u = triple(shape, dtype, where)
    mean = options["reduction"] == "mean"
    for name in ("mse", "bce"):
        function = F.mse_loss if name == "mse" else F.binary_cross_entropy_with_logits
        chosen = {k: value for k, value in options.items() if name == "bce" or k == "reduction"}
        weights = () if name == "mse" else (options.get("weight"), options.get("pos_weight"))
        wide = {k: value.double() if isinstance(value, Tensor) else value for k, value in chosen.items()}
        y = draw(shape, dtype, where[0]) if name == "mse" else torch.rand(shape).to(dtype)
        loss, c, products = getattr(operators, f"{name}_cotangent")(x, v, y, *weights, mean, sign)
        five = getattr(operators, f"{name}_products")(x, v, u, y, *weights, products, mean, sign)
        closed, expected_loss = closed_form_losses.CLOSED_FORMS[function], function(x.double(), y.double(), **wide)
        exact = quadratic(expected_loss, closed(x.double(), y.double(), **wide), v.double(), u.double(), sign)
        composed = quadratic(expected_loss, closed(x, y, **chosen), v, u, sign)[0]
        compare(Result(loss, c, five), dtype, exact, composed)


def check_errors(operators: Any) -> None:
    """What the native operators refuse, with words."""
    x, y = torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64)
    options = -100, True, 0.0, 1.0
    for message, arguments in {
        r"x must be \[rows, classes\]": (x[0], x[0], y, None),
        "x is not contiguous": (x.t(), x.t(), y, None),
        "convert it to float16": (x.long(), x.long(), y, None),
        "v and x have different sizes": (x, x[:2], y, None),
        "v has dtype": (x, x.double(), y, None),
        "v is not contiguous": (x, torch.zeros(6, 4).t(), y, None),
        "target has dtype": (x, x, y.int(), None),
        "target must have one class": (x, x, y[:3], None),
        "weight must have one element": (x, x, y, torch.ones(5)),
        "weight has dtype": (x, x, y, torch.ones(6).double()),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            operators.cross_entropy_cotangent(*arguments, *options)
    rows, products = torch.zeros(4, 3), torch.zeros(2, dtype=torch.float64)
    for message, (u, given_rows, given_products) in {
        "u and x have different sizes": (x[:2], rows, products),
        "row_stats must be": (x, rows.double(), products),
        "products has dtype": (x, rows, products.float()),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            operators.cross_entropy_products(x, x, u, y, None, given_rows, given_products, *options)
    for message, (target, weight) in {
        "target and x have different sizes": (x[:2], None),
        "target has dtype": (x.half(), None),
        "can't be divided": (x, torch.ones(5)),
        "weight has dtype": (x, torch.ones(6).half()),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            operators.bce_cotangent(x, x, target, weight, None, True, 1.0)
    with pytest.raises(RuntimeError, match="target has dtype"):
        operators.mse_cotangent(x, x, x.half(), True, 1.0)
