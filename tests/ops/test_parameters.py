"""`update_` and `dots`: every backend against float64 arithmetic, over shapes, dtypes and strides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curveball_fused import backends, ops
from curveball_fused.backends.dtypes import compute_dtype
from curveball_fused.backends.scalars import DIRECTION_DAMPING, PREDICTED_CHANGE, SCALARS, Z_DOT_Z
from tests.helpers.layouts import LAYOUTS, layouts, shapes
from tests.helpers.subnormals import check_vanishing

NATIVE = backends.has_operators()
BACKENDS = ["torch"] + (["cpu"] if NATIVE else [])
COEFFICIENTS = torch.tensor([0.3, 0.8, 0.25], dtype=torch.float64)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
native_only = pytest.mark.skipif(not NATIVE, reason="needs the native kernels")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
tensors = st.lists(st.tuples(shapes, st.sampled_from(DTYPES), layouts, layouts, layouts), max_size=5)


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def exact(
    w: Tensor, z: Tensor, r: Tensor, coefficients: Tensor, lr: float, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """New z and w, and the magnitude of the terms of w, all in float64."""
    beta, rho, lambd = coefficients.tolist()
    z_new = (rho - beta * lambd) * z.double() - beta * r.double()
    return z_new, (1 - lr * decay) * w.double() + lr * z_new, w.double().abs() + z.double().abs() + r.double().abs()


@every_backend
@given(specs=tensors, lr=st.sampled_from([1.0, 0.6]), decay=st.sampled_from([0.0, 0.05]), tensor_lr=st.booleans())
def test_update(backend: str, specs: list, lr: float, decay: float, tensor_lr: bool) -> None:
    w = [LAYOUTS[a](draw(shape, dtype)) for shape, dtype, a, _, _ in specs]
    z = [LAYOUTS[b](draw(shape, compute_dtype(dtype))) for shape, dtype, _, b, _ in specs]
    r = [LAYOUTS[c](draw(shape, dtype)) for shape, dtype, _, _, c in specs]
    expected = [exact(*triple, COEFFICIENTS, lr, decay) for triple in zip(w, z, r)]
    strides = [t.stride() for t in w + z]
    rate = torch.tensor(lr, dtype=torch.float64) if tensor_lr else lr
    total = ops.update_(w, z, r, COEFFICIENTS, lr=rate, weight_decay=decay, backend=backend)
    for w_i, z_i, (z_new, w_new, size) in zip(w, z, expected):
        epsilon = 2 * torch.finfo(z_i.dtype).eps * size
        assert ((z_i.double() - z_new).abs() <= epsilon).all()
        # One rounding to the parameter's dtype, on top of the arithmetic in the state's.
        rounding = torch.finfo(w_i.dtype).eps * w_new.abs() / 2 if w_i.dtype != z_i.dtype else 0
        assert ((w_i.double() - w_new).abs() <= 2 * epsilon + rounding + torch.finfo(w_i.dtype).tiny).all()
    assert strides == [t.stride() for t in w + z]
    assert total.dtype == torch.float64 and total.shape == ()
    torch.testing.assert_close(total, sum((z_i.double().square().sum() for z_i in z), torch.zeros_like(total)))


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_z_does_not_become_subnormal(backend: str, dtype: torch.dtype) -> None:
    check_vanishing(lambda w, z, r: ops.update_(w, z, r, COEFFICIENTS, lr=0.6, backend=backend), dtype)


@every_backend
@given(specs=tensors)
def test_dots(backend: str, specs: list) -> None:
    z = [LAYOUTS[b](draw(shape, compute_dtype(dtype))) for shape, dtype, _, b, _ in specs]
    r = [LAYOUTS[c](draw(shape, dtype)) for shape, dtype, _, _, c in specs]
    result = ops.dots(z, r, backend=backend)
    flat_z = torch.cat([t.double().flatten() for t in z]) if z else torch.zeros(0).double()
    flat_r = torch.cat([t.double().flatten() for t in r]) if r else torch.zeros(0).double()
    expected = torch.stack((flat_z @ flat_z, flat_z @ flat_r, flat_r @ flat_r))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-10)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "coefficients", [(float("nan"), 0.9), (0.1, float("nan")), (float("inf"), 0.9), (0.1, -float("inf"))]
)
def test_coefficients_that_are_not_finite_change_nothing(
    backend: str, dtype: torch.dtype, coefficients: tuple[float, float]
) -> None:
    w, z = draw((3, 41), dtype), draw((3, 41), compute_dtype(dtype))
    r = torch.full_like(w, float("nan"))
    before = w.clone(), z.clone()
    given_values = torch.tensor([*coefficients, 0.5], dtype=torch.float64)
    total = ops.update_([w], [z], [r], given_values, lr=0.5, weight_decay=0.1, backend=backend)
    assert torch.equal(w, before[0]) and torch.equal(z, before[1])
    torch.testing.assert_close(total, z.double().square().sum())


@every_backend
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("equal", [False, True])
def test_groups(backend: str, tensor_lr: bool, equal: bool) -> None:
    """Each group by its own lr and weight decay, and M for the rate that the quadratic model sees."""
    sizes, decays = [2, 0, 1, 3], [0.05, 0.2, 0.0, 0.3]
    rates = [0.7] * 4 if equal else [0.7, 9.0, 0.4, 1.3]
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.float16, torch.float64]
    w = [draw((11, i), dtype) for i, dtype in enumerate(dtypes)]
    z, r = [draw(t.shape, compute_dtype(t.dtype)) for t in w], [draw(t.shape, t.dtype) for t in w]
    scalars = torch.randn(len(SCALARS), dtype=torch.float64)
    scalars[:2], scalars[DIRECTION_DAMPING] = COEFFICIENTS[:2], COEFFICIENTS[2]
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    expected = [exact(*t, COEFFICIENTS, rates[g], decays[g]) for *t, g in zip(w, z, r, groups)]
    lr = [torch.tensor(rate) if tensor_lr and g % 2 else rate for g, rate in enumerate(rates)]
    given_scalars = scalars.clone()
    new = ops.update_groups_(w, z, r, scalars, group_sizes=sizes, lr=lr, weight_decay=decays, backend=backend)
    for w_i, z_i, (z_new, w_new, size) in zip(w, z, expected):
        assert ((z_i.double() - z_new).abs() <= 2e-6 * size).all()
        assert ((w_i.double() - w_new).abs() <= (2e-6 + torch.finfo(w_i.dtype).eps) * size).all()
    squares = [sum(float(z_i.double().square().sum()) for z_i, h in zip(z, groups) if h == g) for g in range(4)]
    model = dict(zip(SCALARS, scalars.tolist()))
    mean = sum(rate * square for rate, square in zip(rates, squares)) / sum(squares)
    change = -mean * model["linear_term"] + 0.5 * mean**2 * model["quadratic_term"]
    wanted = scalars.clone()
    wanted[Z_DOT_Z] = sum(squares)
    wanted[PREDICTED_CHANGE] = model["predicted_change"] if equal and not tensor_lr else change
    torch.testing.assert_close(new, wanted, rtol=1e-6, atol=0)
    assert torch.equal(scalars, given_scalars)


@every_backend
def test_all_scalars_as_coefficients(backend: str) -> None:
    """Of three, the third is λ; all have θλ, by which Δ was formed."""
    scalars = torch.randn(len(SCALARS), dtype=torch.float64)
    for coefficients, damping in ((scalars, scalars[DIRECTION_DAMPING]), (scalars[:11], scalars[2])):
        w, z, r = (torch.randn(5, dtype=torch.float64) for _ in range(3))
        expected = (scalars[1] - scalars[0] * damping) * z - scalars[0] * r
        ops.update_([w], [z], [r], coefficients, lr=1.0, backend=backend)
        torch.testing.assert_close(z, expected)


@every_backend
def test_thousands_of_small_tensors(backend: str) -> None:
    sizes = torch.randint(0, 9, (3000,)).tolist()
    w, z, r = ([draw((n,), torch.float32) for n in sizes] for _ in range(3))
    expected = [exact(*t, COEFFICIENTS, 0.5, 0.1) for t in zip(w, z, r)]
    ops.update_(w, z, r, COEFFICIENTS, lr=0.5, weight_decay=0.1, backend=backend)
    torch.testing.assert_close(torch.cat(z), torch.cat([e[0] for e in expected]).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(w), torch.cat([e[1] for e in expected]).float(), rtol=1e-5, atol=1e-6)


@native_only
@pytest.mark.parametrize(
    "special", [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 6e-8, 1e-40, 65504.0, 3e38, 1e-5]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_conversions_are_torchs(dtype: torch.dtype, special: float) -> None:
    """Rounding to nearest even, subnormal numbers, infinities and NaN, in the vector body and in the tail."""
    w = torch.cat((torch.full((33,), special), torch.randn(40) * 10 ** torch.empty(40).uniform_(-8, 6))).to(dtype)
    z, r = torch.randn(73), torch.randn(73).to(dtype)
    ours, expected = (w.clone(), z.clone()), (w.clone(), z.clone())
    ops.update_([ours[0]], [ours[1]], [r], COEFFICIENTS, lr=0.7, weight_decay=0.0, backend="cpu")
    ops.update_([expected[0]], [expected[1]], [r], COEFFICIENTS, lr=0.7, weight_decay=0.0, backend="torch")
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@native_only
def test_the_same_bits_for_any_number_of_threads() -> None:
    sizes = [1, 100_003, 0, 65_536, 3, 700_001]
    w, z, r = ([draw((n,), torch.float32) for n in sizes] for _ in range(3))
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            copies = [t.clone() for t in w], [t.clone() for t in z]
            total = ops.update_(*copies, r, COEFFICIENTS, lr=0.9, weight_decay=0.01, backend="cpu")
            results.append([total, ops.dots(z, r, backend="cpu"), *copies[0], *copies[1]])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_backend
def test_sums_of_many_terms_keep_their_accuracy(backend: str) -> None:
    """Ten million terms of one sign: float32 accumulation would be off by 1e-3."""
    z = torch.full((10_000_000,), 0.1)
    total = ops.dots([z], [z], backend=backend)
    assert torch.allclose(total, torch.full_like(total, 1e7 * float(z[0]) ** 2), rtol=1e-9)


@native_only
def test_values_whose_square_overflows_float32() -> None:
    z, w = torch.full((100,), 1e30), torch.zeros(100)
    assert ops.dots([z], [z], backend="cpu")[0].item() == pytest.approx(1e62, rel=1e-5)
    total = ops.update_(
        [w], [z], [w.clone()], torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), lr=1.0, backend="cpu"
    )
    assert total.item() == pytest.approx(1e62, rel=1e-5)


@native_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    def make(dtype: torch.dtype) -> list[Tensor]:
        return [draw((5, 3), dtype), draw((4,), dtype)]

    namespace = torch.ops.curveball_fused
    scalars = torch.rand(len(SCALARS), dtype=torch.float64)
    products, loss = torch.rand(5, dtype=torch.float64), torch.tensor(1.5, dtype=dtype)
    rate, rates = torch.tensor(0.5), torch.tensor([0.5, 0.7])
    w, z, r = make(dtype), make(compute_dtype(dtype)), make(dtype)
    torch.library.opcheck(namespace.update_.default, (w, z, r, scalars, [2], [0.5], [0.1], None))
    torch.library.opcheck(namespace.update_.default, (w, z, r, scalars, [1, 1], [0.5, 0.6], [0.1, 0.0], rates))
    torch.library.opcheck(namespace.dots.default, (z, r))
    torch.library.opcheck(namespace.solve.default, (scalars, loss, products, None, None, None, 1.0, rate))
    torch.library.opcheck(namespace.solve.default, (scalars, loss, products, torch.rand(3).double(), 0.1, 0.9, 1.0))
    options = 0.5, 0.9, True  # θ, average, bounded
    torch.library.opcheck(namespace.solve.default, (scalars, loss, products, None, None, None, 1.0, rate, *options))
    torch.library.opcheck(namespace.adapt_damping.default, (scalars, loss, 0.5, 1.5, 0.9, 1e-6, 1e6))
    torch.library.opcheck(namespace.keep_coefficients.default, (scalars, loss, products[2], loss, -1.0))
    torch.library.opcheck(namespace.keep_coefficients.default, (scalars, loss, products[2], None, 1.0))


@every_backend
def test_mismatched_lists(backend: str) -> None:
    w = [torch.zeros(3)]
    with pytest.raises(ValueError, match="same length"):
        ops.update_(w, [], w, COEFFICIENTS, lr=1.0, backend=backend)
    with pytest.raises(ValueError, match=r"\(3,\).*\(4,\)"):
        ops.dots(w, [torch.zeros(4)], backend=backend)


@native_only
def test_native_operators_check_their_arguments() -> None:
    w, z = [torch.zeros(3, 2)], [torch.zeros(3, 2)]
    scalars = torch.zeros(len(SCALARS), dtype=torch.float64)
    namespace = torch.ops.curveball_fused
    for arguments in (
        (w, z, [torch.zeros(3, 2, dtype=torch.int64)], scalars),
        (w, [torch.zeros(3, 2, dtype=torch.float64)], w, scalars),
        ([torch.zeros(3, 2, dtype=torch.complex64)], z, w, scalars),
        (w, z, [torch.zeros(2, 3)], scalars),
        (w, z, [torch.zeros(2, 3).t()], scalars),
        (w, [], w, scalars),
        (w, z, w, scalars.float()),  # not float64
        (w, z, w, scalars[:2]),
        ([torch.zeros(1).expand(3, 2)], z, w, scalars),
    ):
        with pytest.raises(RuntimeError):
            namespace.update_(*arguments, [1], [1.0], [0.0], None)
    for groups in (([2], [1.0], [0.0], None), ([1], [1.0, 0.5], [0.0], None), ([1], [1.0], [], None)):
        with pytest.raises(RuntimeError, match="group_sizes"):
            namespace.update_(w, z, w, scalars, *groups)
    with pytest.raises(RuntimeError, match="lr_tensor"):
        namespace.update_(w, z, w, scalars, [1], [1.0], [0.0], torch.ones(2))
    with pytest.raises(RuntimeError):
        namespace.solve(COEFFICIENTS, torch.tensor(1.0), torch.zeros(5).double(), None, None, None, 1.0, None)
    with pytest.raises(RuntimeError):
        namespace.adapt_damping(COEFFICIENTS, torch.tensor(1.0), 0.5, 1.5, 0.9, 1e-6, 1e6)
