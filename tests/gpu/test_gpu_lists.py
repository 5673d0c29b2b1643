"""`update_` and `dots` on the GPU, against float64 arithmetic, over shapes, dtypes, layouts and groups."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from curveball_fused import ops
from curveball_fused.backends.dtypes import compute_dtype
from curveball_fused.backends.scalars import DIRECTION_DAMPING, PREDICTED_CHANGE, SCALARS, Z_DOT_Z
from tests.gpu.device import DEVICE, DTYPES, draw, every_backend, to_device

BETA, RHO, LAMBD = 0.3, 0.8, 0.25
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(),
    "channels last": lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t.clone(),
    "with gaps": lambda t: torch.stack((t, t), dim=-1)[..., 0],
    "one past alignment": lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),
    "three past alignment": lambda t: torch.cat((t.new_zeros(3), t.flatten()))[3:].view(t.shape),
}
# Sides of vectors, chunks and launches.
SHAPES = (
    *((), (0,), (3, 0, 2), (1,), (15,), (16,), (17,), (1, 7, 1, 1), (5, 3, 4, 6), (64, 3, 7, 7)),
    *((16_383,), (16_385,), (65_535,), (65_536,), (65_537,), (131_071,), (1_000_003,)),
)


def exact(w: Tensor, z: Tensor, r: Tensor, lr: float, decay: float) -> tuple[Tensor, Tensor, Tensor]:
    """New z and w, and the magnitude of the terms of w, all in float64."""
    z_new = (RHO - BETA * LAMBD) * z.double() - BETA * r.double()
    return z_new, (1 - lr * decay) * w.double() + lr * z_new, w.double().abs() + z.double().abs() + r.double().abs()


def check(w: Tensor, z: Tensor, expected: tuple[Tensor, Tensor, Tensor]) -> None:
    """New z and w, within the roundings of their dtypes."""
    z_new, w_new, size = expected
    epsilon = 2 * torch.finfo(z.dtype).eps * size
    assert ((z.double() - z_new).abs() <= epsilon).all()
    # One rounding to the parameter's dtype, on top of the arithmetic in the state's.
    rounding = torch.finfo(w.dtype).eps * w_new.abs() / 2 if w.dtype != z.dtype else 0
    assert ((w.double() - w_new).abs() <= 2 * epsilon + rounding + torch.finfo(w.dtype).tiny).all()


@every_backend
@pytest.mark.parametrize("seed", range(12))
def test_update(backend: str, seed: int) -> None:
    choose = random.Random(seed)
    w, z, r = [], [], []
    for _ in range(choose.randrange(1, 9)):
        shape, dtype = choose.choice(SHAPES), choose.choice(DTYPES)
        gradient = choose.choice((dtype, compute_dtype(dtype)))
        for tensors, kind in ((w, dtype), (z, compute_dtype(dtype)), (r, gradient)):
            tensors.append(LAYOUTS[choose.choice(list(LAYOUTS))](draw(shape, kind)))
    lr, decay = choose.choice((1.0, 0.6)), choose.choice((0.0, 0.05))
    expected = [exact(*triple, lr, decay) for triple in zip(w, z, r)]
    strides = [t.stride() for t in w + z]
    rate = torch.tensor(lr, device=DEVICE, dtype=choose.choice((torch.float64, torch.float32))) if seed % 2 else lr
    if isinstance(rate, Tensor):  # as rounded to its dtype
        expected = [exact(*triple, rate.item(), decay) for triple in zip(w, z, r)]
    coefficients = to_device(BETA, RHO, LAMBD)
    total = ops.update_(w, z, r, coefficients, lr=rate, weight_decay=decay, backend=backend)
    for w_i, z_i, e in zip(w, z, expected):
        check(w_i, z_i, e)
    assert strides == [t.stride() for t in w + z]
    torch.testing.assert_close(total, sum((z_i.double().square().sum() for z_i in z), torch.zeros_like(total)))


@every_backend
@pytest.mark.parametrize("seed", range(8))
def test_dots(backend: str, seed: int) -> None:
    choose = random.Random(seed)
    z, r = [], []
    for _ in range(choose.randrange(1, 9)):
        shape, dtype = choose.choice(SHAPES), choose.choice(DTYPES)
        z.append(LAYOUTS[choose.choice(list(LAYOUTS))](draw(shape, compute_dtype(dtype))))
        r.append(LAYOUTS[choose.choice(list(LAYOUTS))](draw(shape, dtype)))
    result = ops.dots(z, r, backend=backend)
    flat_z, flat_r = (torch.cat([t.double().flatten() for t in tensors]) for tensors in (z, r))
    expected = torch.stack([(a * b).sum() for a, b in ((flat_z, flat_z), (flat_z, flat_r), (flat_r, flat_r))])
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-9)


@every_backend
def test_empty_lists(backend: str) -> None:
    empty = torch.zeros(0, device=DEVICE)
    assert ops.update_([], [], [], to_device(BETA, RHO, LAMBD), lr=1.0, backend=backend).item() == 0
    assert ops.dots([empty], [empty], backend=backend).tolist() == [0, 0, 0]


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "beta, rho", [(float("nan"), 0.9), (0.1, float("nan")), (float("inf"), 0.9), (0.1, float("-inf"))]
)
def test_coefficients_that_are_not_finite_change_nothing(
    backend: str, dtype: torch.dtype, beta: float, rho: float
) -> None:
    w, z = draw((3, 70_001), dtype), draw((3, 70_001), compute_dtype(dtype))
    r = torch.full_like(w, float("nan"))
    before = w.clone(), z.clone()
    total = ops.update_([w], [z], [r], to_device(beta, rho, 0.5), lr=0.5, weight_decay=0.1, backend=backend)
    assert torch.equal(w, before[0]) and torch.equal(z, before[1])
    torch.testing.assert_close(total, z.double().square().sum())


@every_backend
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("equal", [False, True])
def test_groups(backend: str, tensor_lr: bool, equal: bool) -> None:
    """Each group by its own lr and weight decay, and M for the rate that the quadratic model sees."""
    sizes, decays = [2, 0, 1, 3], [0.05, 0.2, 0.0, 0.3]
    rates = [0.75] * 4 if equal else [0.75, 9.0, 0.5, 1.25]  # exact in float32
    w = [draw((11_001, i), d) for i, d in enumerate((*DTYPES, torch.float32, torch.float64))]
    z, r = [draw(t.shape, compute_dtype(t.dtype)) for t in w], [draw(t.shape, t.dtype) for t in w]
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    expected = [exact(*t, rates[g], decays[g]) for *t, g in zip(w, z, r, groups)]
    scalars = to_device(BETA, RHO, *torch.randn(len(SCALARS) - 2).tolist())
    scalars[DIRECTION_DAMPING] = LAMBD
    before = scalars.clone()
    lr = [torch.tensor(rate, device=DEVICE) if tensor_lr and g % 2 else rate for g, rate in enumerate(rates)]
    new = ops.update_groups_(w, z, r, scalars, group_sizes=sizes, lr=lr, weight_decay=decays, backend=backend)
    for w_i, z_i, e in zip(w, z, expected):
        check(w_i, z_i, e)
    squares = [sum(float(z_i.double().square().sum()) for z_i, h in zip(z, groups) if h == g) for g in range(4)]
    model = dict(zip(SCALARS, before.tolist()))
    mean = sum(rate * square for rate, square in zip(rates, squares)) / sum(squares)
    wanted = before.clone()
    wanted[Z_DOT_Z] = sum(squares)
    if not equal:
        wanted[PREDICTED_CHANGE] = -mean * model["linear_term"] + 0.5 * mean**2 * model["quadratic_term"]
    torch.testing.assert_close(new, wanted, rtol=1e-9, atol=1e-12)
    assert torch.equal(scalars, before)


@every_backend
def test_thousands_of_tensors(backend: str) -> None:
    """More than one launch has room for, among them some that span many chunks."""
    sizes = [random.Random(i).randrange(9) for i in range(5000)]
    sizes[1234] = sizes[4321] = 300_007
    w, z, r = ([draw((n,), torch.float32) for n in sizes] for _ in range(3))
    expected = [exact(*t, 0.5, 0.1) for t in zip(w, z, r)]
    sums = ops.dots(z, r, backend=backend)
    flat_z, flat_r = torch.cat(z).double(), torch.cat(r).double()
    wanted = torch.stack((flat_z @ flat_z, flat_z @ flat_r, flat_r @ flat_r))
    torch.testing.assert_close(sums, wanted, rtol=1e-12, atol=1e-9)
    ops.update_(w, z, r, to_device(BETA, RHO, LAMBD), lr=0.5, weight_decay=0.1, backend=backend)
    check(torch.cat(w), torch.cat(z), tuple(torch.cat(parts) for parts in zip(*expected)))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_conversions_are_torchs(backend: str, dtype: torch.dtype) -> None:
    """Rounding to nearest even, subnormal numbers, infinities and NaN, in the vector body and in the tail."""
    special = torch.tensor([0.0, -0.0, 1e-40, 6e-8, 3e-8, 1e-5, 65504.0, 65519.0, 65520.0, 3.39e38, -3.4e38, 1e999])
    spread = torch.randn(20_000) * 10 ** torch.empty(20_000).uniform_(-8, 6)
    values = torch.cat((special, torch.tensor([float("nan")]), spread)).to(DEVICE)
    # z below this becomes zero, see next_z in csrc/formulas.h.
    z_of = values.where(~(values.abs() < 2.0**-103), 0.0)
    # z = 1 z - 0 r, and w = 0 w + lr z: only the rounding of lr z is left. 1e-40 / lr is a z that stays.
    for lr, start in ((1.0, values), (2.0**-40, 2.0**40 * values)):
        w, r, z = torch.ones_like(values).to(dtype), torch.zeros_like(values).to(dtype), start.clone()
        ops.update_([w], [z], [r], to_device(0.0, 1.0, 0.0), lr=lr, weight_decay=1 / lr, backend=backend)
        wanted = (z_of if lr == 1.0 else lr * start).to(dtype)
        torch.testing.assert_close(w, wanted, rtol=0, atol=0, equal_nan=True)
    # z = 0 z + 1 r: only the conversion of r.
    r, z = values.to(dtype), torch.ones_like(values)
    ops.update_([w.zero_()], [z], [r], to_device(-1.0, 0.0, 0.0), lr=0.0, backend=backend)
    torch.testing.assert_close(z, r.float().where(~(r.float().abs() < 2.0**-103), 0.0), rtol=0, atol=0, equal_nan=True)


@every_backend
def test_sums_of_many_terms_keep_their_accuracy(backend: str) -> None:
    """A hundred million terms of one sign: float32 accumulation would be off by 1e-3."""
    z = torch.full((100_000_000,), 0.1, device=DEVICE)
    expected = torch.full((3,), 1e8 * float(z[0]) ** 2, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(ops.dots([z], [z], backend=backend), expected, rtol=1e-9, atol=0)


@every_backend
def test_values_whose_square_overflows_float32(backend: str) -> None:
    z, w = torch.full((100,), 1e30, device=DEVICE), torch.zeros(100, device=DEVICE)
    assert ops.dots([z], [z], backend=backend)[0].item() == pytest.approx(1e62, rel=1e-5)
    total = ops.update_([w], [z], [w.clone()], to_device(0.0, 1.0, 0.0), lr=1.0, backend=backend)
    assert total.item() == pytest.approx(1e62, rel=1e-5)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_more_than_2_to_the_31_elements(backend: str, dtype: torch.dtype, need_memory: Callable[[float], None]) -> None:
    count = 2**31 + 70_001
    need_memory(1.1 * count * (2 * dtype.itemsize + 4))
    w, r = (torch.empty(count, dtype=dtype, device=DEVICE).normal_() for _ in range(2))
    z = torch.empty(count, device=DEVICE).normal_()
    # The two ends, and where 32-bit indices or byte offsets would wrap.
    starts = [0, 2**29 - 512, 2**30 - 512, 2**31 - 512, count - 1024]
    parts = [slice(start, start + 1024) for start in starts]
    expected = [exact(w[part], z[part], r[part], 0.5, 0.1) for part in parts]

    def squares() -> float:
        return sum(block.double().square().sum().item() for block in z.split(2**28))

    wanted = squares()
    assert ops.dots([z], [r], backend=backend)[0].item() == pytest.approx(wanted, rel=1e-11)
    coefficients = to_device(BETA, RHO, LAMBD)
    total = ops.update_([w], [z], [r], coefficients, lr=0.5, weight_decay=0.1, backend=backend)
    for part, e in zip(parts, expected):
        check(w[part], z[part], e)
    # The kernel summed what it computed, this what it wrote.
    assert total.item() == pytest.approx(squares(), rel=1e-11)
    # The new z has another variance than the old one: a part that was left out would show.
    assert total.item() == pytest.approx(count * ((RHO - BETA * LAMBD) ** 2 + BETA**2), rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    namespace, scalars = torch.ops.curveball_fused, torch.rand(len(SCALARS), dtype=torch.float64, device=DEVICE)
    products, loss = to_device(0.1, 0.2, 0.3, 0.4, 0.5), torch.tensor(1.5, dtype=dtype, device=DEVICE)
    rates = torch.tensor([0.5, 0.7], device=DEVICE)
    w, r = ([draw((5, 3), dtype), draw((4,), dtype)] for _ in range(2))
    z = [draw(t.shape, compute_dtype(dtype)) for t in w]
    check_op = torch.library.opcheck
    check_op(namespace.update_.default, (w, z, r, scalars, [2], [0.5], [0.1], None))
    check_op(namespace.update_.default, (w, z, r, scalars, [1, 1], [0.5, 0.6], [0.1, 0.0], rates))
    check_op(namespace.dots.default, (z, r))
    check_op(namespace.solve.default, (scalars, loss, products, None, None, None, 1.0, rates[:1]))
    check_op(namespace.solve.default, (scalars, loss, products, to_device(1.0, 2.0, 3.0), 0.1, 0.9, 1.0))
    check_op(namespace.adapt_damping.default, (scalars, loss, 0.5, 1.5, 0.9, 1e-6, 1e6))
    check_op(namespace.keep_coefficients.default, (scalars, loss, products[2], loss, -1.0))
    check_op(namespace.keep_coefficients.default, (scalars, loss, products[2], None, 1.0))
