"""The update of the weights in Triton, and its dot products, against float64 arithmetic: on a GPU, or interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from curveball_fused.backends.dtypes import compute_dtype
from curveball_fused.backends.scalars import Z_DOT_Z
from curveball_fused.backends.triton import launch_tables as triton_tables
from curveball_fused.backends.triton import parameters as triton_parameters
from tests.helpers.subnormals import check_vanishing
from tests.helpers.triton_cases import (
    DEVICE,
    DTYPES,
    INF,
    INTERPRETED,
    NAN,
    RUNTIME_WARNINGS,
    every_dtype,
    named,
    scalars,
)

pytestmark = RUNTIME_WARNINGS
BLOCK_MAIN, BLOCK_TAIL, CHUNK = triton_parameters.BLOCK_MAIN, triton_parameters.BLOCK_TAIL, triton_tables.CHUNK
SIZES = [1, 7, 0, 16, BLOCK_TAIL + 1, BLOCK_MAIN - 1, BLOCK_MAIN, BLOCK_MAIN + 1, CHUNK, CHUNK + BLOCK_MAIN + 3]


def draw(size: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """`size` numbers, `offset` elements after an aligned address."""
    return torch.randn(size + offset, dtype=torch.float64).to(dtype).to(DEVICE)[offset:]


def check_update(
    w: list[Tensor],
    z: list[Tensor],
    r: list[Tensor],
    sizes: list[int],
    lr: list[float],
    decay: list[float],
    lr_tensor: Tensor | None = None,
) -> None:
    """Runs update_ and holds w, z and the new scalars against float64."""
    before = scalars()
    beta, rho, damping = (named(before)[name] for name in ("beta", "rho", "direction_damping"))
    rates = lr if lr_tensor is None else lr_tensor.tolist()
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    expected = []
    for g, w_i, z_i, r_i in zip(groups, w, z, r, strict=True):
        z_new = (rho - beta * damping) * z_i.double() - beta * r_i.double()
        w_new = (1 - rates[g] * decay[g]) * w_i.double() + rates[g] * z_new
        expected.append((z_new, w_new, w_i.double().abs() + z_i.double().abs() + r_i.double().abs()))
    new = triton_parameters.update_(w, z, r, before, sizes, lr, decay, lr_tensor)
    squares = [0.0] * len(sizes)
    for g, w_i, z_i, (z_new, w_new, size) in zip(groups, w, z, expected, strict=True):
        squares[g] += z_i.double().square().sum().item()
        epsilon = 2 * torch.finfo(z_i.dtype).eps * size
        assert ((z_i.double() - z_new).abs() <= epsilon).all()
        # One rounding to w's dtype on top; the interpreter cuts bfloat16 off instead of rounding to nearest.
        ulps = 0.0 if w_i.dtype == z_i.dtype else 1.0 if INTERPRETED and w_i.dtype == torch.bfloat16 else 0.5
        rounding = ulps * torch.finfo(w_i.dtype).eps * w_new.abs() + torch.finfo(w_i.dtype).tiny
        assert ((w_i.double() - w_new).abs() <= 2 * epsilon + rounding).all()
    total = sum(squares)
    result = named(new)
    assert result["z_dot_z"] == pytest.approx(total, rel=1e-12)
    change = named(before)["predicted_change"]
    if len(set(rates)) > 1:
        mean = sum(rate * square for rate, square in zip(rates, squares)) / total if total else 0.0
        change = -mean * 1.5 + 0.5 * mean**2 * 0.7
    assert result["predicted_change"] == pytest.approx(change, rel=1e-12)
    others = {k: v for k, v in named(before).items() if k not in ("z_dot_z", "predicted_change")}
    assert others == {k: result[k] for k in others}


@every_dtype
def test_update_over_sizes(dtype: torch.dtype) -> None:
    w, z, r = ([draw(n, d) for n in SIZES] for d in (dtype, compute_dtype(dtype), dtype))
    check_update(w, z, r, [len(SIZES)], [0.6], [0.05])


@every_dtype
def test_z_does_not_become_subnormal(dtype: torch.dtype) -> None:
    def update(*lists: list[Tensor]) -> None:
        on_device = [[t.to(DEVICE) for t in tensors] for tensors in lists]
        triton_parameters.update_(*on_device, scalars(), [1], [0.6], [0.05], None)
        lists[1][0].copy_(on_device[1][0])

    check_vanishing(update, dtype)


@every_dtype
@pytest.mark.parametrize("misaligned", [0, 1, 2])
def test_update_at_odd_addresses(dtype: torch.dtype, misaligned: int) -> None:
    sizes = [1, BLOCK_MAIN + 5, 2 * BLOCK_MAIN]
    dtypes = (dtype, compute_dtype(dtype), dtype)
    lists = [[draw(n, d, offset=int(i == misaligned)) for n in sizes] for i, d in enumerate(dtypes)]
    check_update(*lists, [1, 2], [0.6, 0.9], [0.05, 0.0])


@pytest.mark.parametrize("lr_dtype", [None, *DTYPES], ids=str)
def test_groups_of_mixed_dtypes(lr_dtype: torch.dtype | None) -> None:
    """Four groups, one of them without tensors, dtypes in turn, r in the dtype of w or of z."""
    dtypes = [DTYPES[i % 4] for i in range(11)]
    w = [draw(3 + 700 * i, d) for i, d in enumerate(dtypes)]
    z = [draw(3 + 700 * i, compute_dtype(d)) for i, d in enumerate(dtypes)]
    r = [draw(3 + 700 * i, d if i % 2 else compute_dtype(d)) for i, d in enumerate(dtypes)]
    rates = None if lr_dtype is None else torch.tensor([0.5, 1.0, 0.25, 0.75], dtype=lr_dtype, device=DEVICE)
    check_update(w, z, r, [4, 1, 0, 6], [0.1, 0.7, 0.3, 0.9], [0.05, 0.0, 0.3, 0.01], rates)


def test_groups_of_equal_lr_keep_the_prediction() -> None:
    w, z, r = ([draw(50, torch.float32) for _ in range(4)] for _ in range(3))
    check_update(w, z, r, [1, 3], [0.3, 0.3], [0.0, 0.1])


def test_learning_rate_and_decay_in_full_precision() -> None:
    """Not rounded to float32 on the way: check_update's bounds are those of float64."""
    w, z, r = ([draw(100, torch.float64)] for _ in range(3))
    check_update(w, z, r, [1], [1 / 3], [0.1])


@every_dtype
@pytest.mark.parametrize("bad", [(NAN, 0.9), (0.1, NAN), (INF, 0.9), (0.1, -INF)])
def test_coefficients_that_are_not_finite_change_nothing(dtype: torch.dtype, bad: tuple[float, float]) -> None:
    w, z = [draw(BLOCK_MAIN + 300, dtype)], [draw(BLOCK_MAIN + 300, compute_dtype(dtype))]
    w[0][:2], z[0][:1] = NAN, -0.0
    before = w[0].clone(), z[0].clone()
    given = scalars(beta=bad[0], rho=bad[1])
    new = triton_parameters.update_(w, z, [torch.full_like(w[0], NAN)], given, [1], [0.5], [0.1])
    torch.testing.assert_close((w[0], z[0]), before, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(new[Z_DOT_Z], z[0].double().square().sum(), rtol=1e-12, atol=0)


def test_nothing_to_update() -> None:
    empty = [torch.zeros(0, device=DEVICE), torch.zeros(3, 0, device=DEVICE)]
    for lists, sizes in (([[], [], []], [0]), ([empty] * 3, [1, 1])):
        result = named(triton_parameters.update_(*lists, scalars(), sizes, [0.5] * len(sizes), [0.0] * len(sizes)))
        assert result == named(scalars()) | dict(z_dot_z=0.0)


def test_many_small_tensors() -> None:
    count = 300 if INTERPRETED else 5000
    sizes = torch.randint(0, 9, (count,)).tolist()
    w, z, r = ([draw(n, torch.float32) for n in sizes] for _ in range(3))
    check_update(w, z, r, [100, count - 100], [0.5, 0.2], [0.1, 0.0])


def test_tables_follow_the_tensors() -> None:
    """What is cached belongs to addresses, sizes and settings; values may change in place."""
    w, z, r = ([draw(40, torch.float32) for _ in range(2)] for _ in range(3))
    for lr in (0.5, 0.5, 0.25):
        check_update(w, z, r, [2], [lr], [0.1])
        r = [draw(40, torch.float32) for _ in range(2)]
    check_update([w[0][:9], w[1]], [z[0][:9], z[1]], [r[0][:9], r[1]], [2], [0.5], [0.1])


@every_dtype
def test_dots(dtype: torch.dtype) -> None:
    z, r = [draw(n, compute_dtype(dtype)) for n in SIZES], [draw(n, dtype) for n in SIZES]
    z += [draw(BLOCK_MAIN + 9, torch.float64, offset=1), draw(BLOCK_MAIN + 9, torch.float32)]
    r += [draw(BLOCK_MAIN + 9, torch.float16), draw(BLOCK_MAIN + 9, torch.float64, offset=1)]
    flat_z, flat_r = (torch.cat([t.double() for t in tensors]) for tensors in (z, r))
    expected = torch.stack((flat_z @ flat_z, flat_z @ flat_r, flat_r @ flat_r))
    torch.testing.assert_close(triton_parameters.dots(z, r), expected, rtol=1e-12, atol=1e-10)


def test_dots_of_values_whose_square_overflows_float32() -> None:
    z = [torch.full((100,), 1e30, device=DEVICE)]
    assert triton_parameters.dots(z, z).tolist() == pytest.approx([1e62] * 3, rel=1e-5)
    assert triton_parameters.dots([z[0][:0]], [z[0][:0]]).tolist() == [0, 0, 0]


def test_offsets_beyond_32_bits() -> None:
    """One program of a tensor that claims more than 2³² elements, of which only the last chunk is there."""
    first = 2**32 // CHUNK + 7
    begin, n = first * CHUNK, BLOCK_MAIN + 40
    z, r, partials = draw(n, torch.float32), draw(n, torch.float32), draw(3, torch.float64)
    expected = [(z.double() * z.double()).sum(), (z.double() * r.double()).sum(), (r.double() * r.double()).sum()]
    addresses = [t.data_ptr() - begin * t.element_size() for t in (z, r)]
    table = torch.tensor([*addresses, begin + n, 0, -first, -first, 0], device=DEVICE)
    launch = triton_tables.Launch((torch.float32, torch.float32), 1, 1, table)
    triton_parameters.run(triton_parameters.dots_kernel, launch, partials, 1)
    torch.testing.assert_close(partials, torch.stack(expected), rtol=1e-12, atol=0)

    w, numbers = draw(n, torch.float32), torch.tensor([0.5, 0.0], dtype=torch.float64, device=DEVICE)
    z_new = (0.8 - 0.3 * 0.2) * z.double() - 0.3 * r.double()
    w_new = w.double() + 0.5 * z_new
    addresses = [t.data_ptr() - begin * t.element_size() for t in (w, z, r)]
    table = torch.tensor([*addresses, begin + n, 0, -first, -first, 0], device=DEVICE)
    launch = triton_tables.Launch((torch.float32,) * 3, 1, 1, table)
    triton_parameters.run(triton_parameters.update_kernel, launch, scalars(), numbers, numbers[1:], partials)
    torch.testing.assert_close((w, z), (w_new.float(), z_new.float()))


def test_the_same_bits_again() -> None:
    z, r = ([draw(CHUNK + 77, torch.float32), draw(3000, torch.float32)] for _ in range(2))
    results = [triton_parameters.dots([t.clone() for t in z], [t.clone() for t in r]) for _ in range(5)]
    assert all(torch.equal(results[0], other) for other in results)


def test_lists_that_the_tables_would_hide_from_triton() -> None:
    w, z = [draw(5, torch.float32), draw(3, torch.float32)], [draw(5, torch.float32), draw(3, torch.float32)]
    elsewhere = [w[0], torch.zeros(3, device="meta")]
    settings = scalars(), [2], [1.0], [0.0]
    for arguments, words in (
        ((w, z, elsewhere), "meta.*one device"),
        ((w, z, [t.long() for t in w]), "r torch.int64"),
        ((w, [t.double() for t in z], w), "convert z to torch.float32"),
        (([t.long() for t in w], z, z), "convert it to float16"),
    ):
        with pytest.raises(RuntimeError, match=words):
            triton_parameters.update_(*arguments, *settings)
    with pytest.raises(RuntimeError, match=r"meta.*one device"):
        triton_parameters.dots(z, elsewhere)
