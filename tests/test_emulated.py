"""The text of the CUDA kernels for lists of parameters, run on the CPU: against float64 arithmetic and `reference`.

A chunk has 1024 elements here, so that tensors of a few thousand are walked as large ones are on a GPU.
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulated import DTYPES, fresh, load, operators, scalars
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from curveball_fused import reference
from curveball_fused.reference import BETA, LAMBD, PREDICTED_CHANGE, RHO, SCALARS, Z_DOT_Z

device: Any = load()
CHUNK = 1024
HALVES = [torch.float16, torch.bfloat16]
BLOCK_SIZES = [32, 128, 512, 1024]
sizes = st.one_of(
    st.sampled_from([0, 1, 7, 8, 9, 31, 33, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 8, 3 * CHUNK - 5]),
    st.integers(0, 400),
)
offsets = st.one_of(st.tuples(st.just(0), st.just(0), st.just(0)), st.tuples(*[st.integers(0, 9)] * 3))
tensors = st.lists(st.tuples(sizes, st.sampled_from(DTYPES), offsets, st.booleans()), max_size=4)
launched = st.tuples(st.integers(0, 1000), st.sampled_from(BLOCK_SIZES[:2]))


@pytest.fixture(autouse=True)
def fresh_device() -> Iterator[None]:
    yield from fresh(device)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def draw(n: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """Random numbers, `offset` elements behind an address that is a multiple of 64 bytes."""
    buffer = torch.randn(offset + n + 9, dtype=torch.float64).to(dtype)
    return buffer[offset : offset + n]


def surroundings(t: Tensor) -> Tensor:
    """What lies before and behind a tensor that `draw` made."""
    buffer = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
    return torch.cat((buffer[: t.storage_offset()], buffer[t.storage_offset() + t.numel() :])).clone()


def update_(w: list[Tensor], z: list[Tensor], r: list[Tensor], s: Tensor, groups: Any = None, **options: Any) -> Tensor:
    """All tensors in one group of lr 0.6 and weight decay 0.05, unless `groups` = (sizes, rates, decays) says else."""
    return operators.update_(w, z, r, s, *(groups or ([len(w)], [0.6], [0.05])), options.get("lr_tensor"))


def check_update(w: list[Tensor], z: list[Tensor], r: list[Tensor], s: Tensor, lr: Any, decay: Any, run: Any) -> Tensor:
    """Runs the update and compares it with float64 arithmetic; lr and decay: of each tensor. Returns the scalars."""
    beta, rho, lambd = s[BETA].item(), s[RHO].item(), s[LAMBD].item()
    old = [(w_i.double().clone(), z_i.double().clone(), r_i.double()) for w_i, z_i, r_i in zip(w, z, r)]
    around = [surroundings(t) for t in w + z]
    result = run()
    for w_i, z_i, (w_old, z_old, r_old), lr_i, decay_i in zip(w, z, old, lr, decay):
        z_new = (rho - beta * lambd) * z_old - beta * r_old
        w_new = (1 - lr_i * decay_i) * w_old + lr_i * z_new
        epsilon = 2 * torch.finfo(z_i.dtype).eps * (w_old.abs() + z_old.abs() + r_old.abs())
        assert ((z_i.double() - z_new).abs() <= epsilon).all()
        # One rounding to the parameter's dtype, on top of the arithmetic in the state's.
        rounding = torch.finfo(w_i.dtype).eps * w_new.abs() / 2 if w_i.dtype != z_i.dtype else 0
        assert ((w_i.double() - w_new).abs() <= 2 * epsilon + rounding + torch.finfo(w_i.dtype).tiny).all()
    assert all(torch.equal(before, surroundings(t)) for before, t in zip(around, w + z))
    zz = sum((z_i.double().square().sum() for z_i in z), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(result[Z_DOT_Z], zz, rtol=1e-12, atol=0)
    return result


@settings(deadline=None, max_examples=200)
@given(specs=tensors, launched=launched)
def test_update(specs: list, launched: tuple[int, int]) -> None:
    """Sizes around those of vectors and chunks, all dtypes at once, arrays misaligned alike or not, r in float32."""
    device.set_seed(launched[0])
    device.set_threads(launched[1])
    w = [draw(n, dtype, places[0]) for n, dtype, places, _ in specs]
    z = [draw(n, state_dtype(dtype), places[1]) for n, dtype, places, _ in specs]
    r = [draw(n, state_dtype(dtype) if wide else dtype, places[2]) for n, dtype, places, wide in specs]
    s = scalars()
    result = check_update(w, z, r, s, [0.6] * len(w), [0.05] * len(w), lambda: update_(w, z, r, s))
    others = [i for i in range(len(SCALARS)) if i != Z_DOT_Z]
    assert torch.equal(result[others], s[others])


@pytest.mark.parametrize("threads", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_update_of_long_tensors(dtype: torch.dtype, threads: int, offset: int) -> None:
    """Whole chunks, with several vectors under way in each thread, and ends, at every block size."""
    device.set_threads(threads)
    n = 2 * CHUNK + 511
    w, z, r = (draw(n, d, offset) for d in (dtype, state_dtype(dtype), dtype))
    check_update([w], [z], [r], scalars(), [0.6], [0.05], lambda: update_([w], [z], [r], scalars()))
    assert device.launches() == [(3, threads, 0), (1, threads, 0)]


@settings(deadline=None, max_examples=200)
@given(specs=tensors, r_dtypes=st.lists(st.sampled_from(DTYPES), min_size=4, max_size=4), launched=launched)
def test_dots(specs: list, r_dtypes: list, launched: tuple[int, int]) -> None:
    device.set_seed(launched[0])
    device.set_threads(launched[1])
    z = [draw(n, state_dtype(dtype), places[0]) for n, dtype, places, _ in specs]
    r = [draw(n, dtype, places[1]) for (n, _, places, _), dtype in zip(specs, r_dtypes)]
    if not z:
        return
    flat_z, flat_r = (torch.cat([t.double() for t in list_]) for list_ in (z, r))
    expected = torch.stack((flat_z @ flat_z, flat_z @ flat_r, flat_r @ flat_r))
    torch.testing.assert_close(operators.dots(z, r), expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("threads", BLOCK_SIZES)
def test_dots_of_long_tensors(threads: int) -> None:
    device.set_threads(threads)
    z, r = draw(5 * CHUNK + 77, torch.float32), draw(5 * CHUNK + 77, torch.bfloat16)
    a, b = z.double(), r.double()
    torch.testing.assert_close(operators.dots([z], [r]), torch.stack((a @ a, a @ b, b @ b)), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_tensors_of_any_strides(dtype: torch.dtype) -> None:
    w, z, r = (
        torch.randn(2, 5, 3, 7).to(d).to(memory_format=torch.channels_last)
        for d in (dtype, state_dtype(dtype), state_dtype(dtype))
    )
    expected = [w.clone()], [z.clone()]
    update_([w], [z], [r], scalars())
    reference.update_(*expected, [r], scalars(), [1], [0.6], [0.05], None)
    torch.testing.assert_close(z, expected[1][0])
    torch.testing.assert_close(w, expected[0][0])


# ---------------------------------------------------------------------------------------------- many tensors, groups


def resnet_like_list(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    lengths = [random.Random(0).choice([1, 8, 64, 100, CHUNK + 3]) for _ in range(161)]
    return tuple([draw(n, d) for n in lengths] for d in (dtype, state_dtype(dtype), dtype))  # type: ignore[return-value]


@pytest.mark.parametrize("count, launches", [(64, 2), (65, 2), (512, 2), (513, 3), (3000, 7)])
def test_many_tensors(count: int, launches: int) -> None:
    """As few launches as the table of a launch allows: up to 512 tensors one, and one that adds up."""
    device.set_threads(64)
    lengths = torch.randint(1, 9, (count,)).tolist()
    lengths[count // 2] = 3 * CHUNK + 1
    w, z, r = ([draw(n, torch.float32) for n in lengths] for _ in range(3))
    check_update(w, z, r, scalars(), [0.6] * count, [0.05] * count, lambda: update_(w, z, r, scalars()))
    assert len(device.launches()) == launches
    flat_z, flat_r = torch.cat(z).double(), torch.cat(r).double()
    expected = torch.stack((flat_z @ flat_z, flat_z @ flat_r, flat_r @ flat_r))
    torch.testing.assert_close(operators.dots(z, r), expected, rtol=1e-12, atol=1e-11)
    assert len(device.launches()) == launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_parameter_arithmetic_of_a_step_is_three_launches(dtype: torch.dtype) -> None:
    device.set_threads(64)
    w, z, r = resnet_like_list(dtype)
    products, rate = torch.rand(5, dtype=torch.float64), torch.tensor(0.3)
    s = operators.solve(scalars(), torch.tensor(1.5, dtype=dtype), products, None, None, None, 1.0, rate)
    update_(w, z, r, s, ([100, 0, 61], [0.6, 0.1, 0.6], [0.05, 0.1, 0.0]))
    assert len(device.launches()) == 3


@pytest.mark.parametrize("rate_dtype", [None, *DTYPES])
def test_groups(rate_dtype: torch.dtype | None) -> None:
    """Each group's own rate, from a number or a tensor, and weight decay; and M of the rate that the model sees."""
    device.set_threads(128)
    lengths = [5, CHUNK + 1, 0, 30, 700, 8]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.bfloat16, torch.float32]
    w, z, r = ([draw(n, f(d)) for n, d in zip(lengths, dtypes)] for f in (lambda d: d, state_dtype, lambda d: d))
    group_sizes, rates, decays = [2, 0, 3, 1], [0.5, 0.125, 0.75, 0.25], [0.0, 0.3, 0.1, 0.02]
    lr_tensor = None if rate_dtype is None else torch.tensor(rates).to(rate_dtype)
    given_rates = rates if rate_dtype is None else [9.0] * 4
    group = [0, 0, 2, 2, 2, 3]
    expected = reference.update_(
        [t.clone() for t in w], [t.clone() for t in z], r, scalars(), group_sizes, given_rates, decays, lr_tensor
    )
    result = check_update(
        w,
        z,
        r,
        scalars(),
        [rates[g] for g in group],
        [decays[g] for g in group],
        lambda: update_(w, z, r, scalars(), (group_sizes, given_rates, decays), lr_tensor=lr_tensor),
    )
    assert expected[PREDICTED_CHANGE] != scalars()[PREDICTED_CHANGE]
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(4))
def test_groups_of_many_chunks(seed: int) -> None:
    """Several warps add up each group's sums, and begin with the next group at different times."""
    device.set_seed(seed)
    device.set_threads(64)
    w, z, r = ([draw(n * CHUNK, torch.float32) for n in (70, 50)] for _ in range(3))
    s = update_(w, z, r, scalars(), ([1, 1], [0.5, 0.25], [0.0, 0.0]))
    squares = torch.stack([t.double().square().sum() for t in z])
    torch.testing.assert_close(s[Z_DOT_Z], squares.sum(), rtol=1e-12, atol=0)
    mean = (0.5 * squares[0] + 0.25 * squares[1]) / squares.sum()
    torch.testing.assert_close(s[PREDICTED_CHANGE], -0.7 * mean + 0.5 * 0.4 * mean**2, rtol=1e-12, atol=0)


def test_more_groups_than_one_launch_takes() -> None:
    device.set_threads(32)
    count = 600
    w, z, r = ([draw(3, torch.float32) for _ in range(count)] for _ in range(3))
    rates = [0.1 + i / 1000 for i in range(count)]
    expected = reference.update_(
        [t.clone() for t in w], [t.clone() for t in z], r, scalars(), [1] * count, rates, [0.1] * count, None
    )
    result = check_update(
        w,
        z,
        r,
        scalars(),
        rates,
        [0.1] * count,
        lambda: update_(w, z, r, scalars(), ([1] * count, rates, [0.1] * count)),
    )
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)


def test_nothing_to_update() -> None:
    expected = scalars()
    expected[Z_DOT_Z] = 0.0
    assert torch.equal(update_([], [], [], scalars()), expected)
    assert torch.equal(update_([], [], [], scalars(), ([], [], [])), expected)
    empty = [torch.zeros(3, 0, 2)]
    assert torch.equal(update_(empty, empty, empty, scalars()), expected)
    assert torch.equal(operators.dots(empty, empty), torch.zeros(3, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "beta, rho", [(float("nan"), 0.9), (0.1, float("nan")), (float("inf"), 0.9), (0.1, -float("inf"))]
)
def test_a_skipped_step_changes_nothing(dtype: torch.dtype, beta: float, rho: float) -> None:
    w, z = draw(CHUNK + 77, dtype), draw(CHUNK + 77, state_dtype(dtype))
    r = torch.full_like(w, float("nan"))
    before, s = (w.clone(), z.clone()), scalars(beta, rho)
    result = update_([w], [z], [r], s)
    assert torch.equal(w, before[0]) and torch.equal(z, before[1])
    s[Z_DOT_Z] = z.double().square().sum()
    torch.testing.assert_close(result, s, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_16_bit_number_is_read_and_written_as_torch_does(dtype: torch.dtype) -> None:
    """w <- w + 0 z gives w back: all 65536 patterns pass through, in vectors and singly."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for offset in (0, 1):
        w = torch.cat((torch.zeros(offset, dtype=dtype), patterns))[offset:]
        z = torch.zeros(w.shape)
        update_([w], [z], [torch.zeros_like(w)], scalars(), ([1], [0.5], [0.0]))
        torch.testing.assert_close(w, patterns, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_to_16_bits_is_torchs(dtype: torch.dtype) -> None:
    """Ties to even, overflow to infinity, subnormal numbers, NaN."""
    exponents = torch.arange(-30, 20).double()
    ties = (1 + torch.arange(0, 64, dtype=torch.float64) / 2**12)[:, None] * 2**exponents
    special = torch.tensor([0.0, -0.0, 65519.9, 65520.0, 65536.0, 3.39e38, 1e-45, 6e-8, float("inf"), float("nan")])
    z = torch.cat((ties.flatten().float(), -ties.flatten().float(), special, torch.randn(1000)))
    for offset in (0, 1):
        w, state = torch.zeros(z.numel() + offset, dtype=dtype)[offset:], torch.cat((torch.zeros(offset), z))[offset:]
        update_([w], [state], [torch.zeros_like(w)], scalars(0.0, 1.0), ([1], [1.0], [0.0]))
        torch.testing.assert_close(w, z.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_factors_are_formed_in_double() -> None:
    """rho - beta lambda cancels to 1e-6 here, of which float32 would keep one digit."""
    w, z, r = torch.zeros(64), torch.ones(64), torch.zeros(64)
    s = scalars(1.0, 1000.000001, 1000.0)
    update_([w], [z], [r], s, ([1], [1.0], [0.0]))
    torch.testing.assert_close(z, torch.full_like(z, 1e-6), rtol=1e-6, atol=0)


def test_sums_keep_their_accuracy_and_range() -> None:
    z = torch.full((100_000,), 0.1)
    expected = torch.full((3,), 1e5 * float(z[0]) ** 2, dtype=torch.float64)
    torch.testing.assert_close(operators.dots([z], [z]), expected, rtol=1e-12, atol=0)
    huge, w = torch.full((100,), 1e30), torch.zeros(100)
    assert operators.dots([huge], [huge])[0].item() == pytest.approx(1e62, rel=1e-5)
    assert update_([w], [huge], [w.clone()], scalars(0.0, 1.0))[Z_DOT_Z].item() == pytest.approx(1e62, rel=1e-5)


def test_the_same_bits_in_any_order_of_warps_and_blocks() -> None:
    lengths, dtypes = [1, 5 * CHUNK + 3, 0, 2 * CHUNK, 3, 777], [torch.float32, torch.bfloat16, torch.float64] * 2
    w, z, r = ([draw(n, f(d)) for n, d in zip(lengths, dtypes)] for f in (lambda d: d, state_dtype, lambda d: d))
    results = []
    for seed, poison in [(0, 0xFF), (1, 0xFF), (2, 0x00), (3, 0x7B)]:
        device.set_seed(seed)
        device.set_poison(poison)
        copies = [t.clone() for t in w], [t.clone() for t in z]
        s = update_(*copies, r, scalars(), ([2, 4], [0.6, 0.3], [0.05, 0.0]))
        results.append([s, operators.dots(z, r), *copies[0], *copies[1]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---------------------------------------------------------------------------------------------- more than 2^31 elements


def reserved(n: int, dtype: torch.dtype) -> Tensor:
    """n zeros that take memory only where they are touched."""
    no_reserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, n * dtype.itemsize, flags=flags), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_than_2_31_elements(dtype: torch.dtype) -> None:
    """Only the last blocks of the launch run; they must reach the last elements, and nothing else."""
    n, last = 2**31 + 3 * CHUNK + 5, CHUNK + 5
    w, z, r = reserved(n, dtype), reserved(n, state_dtype(dtype)), reserved(n, dtype)
    ends = [t[n - last :] for t in (w, z, r)]
    for end in ends:
        end.copy_(torch.randn(last))
    z_end, r_end = ends[1].double(), ends[2].double()
    device.set_block_limit(2)
    dots = operators.dots([z], [r])
    assert [blocks for blocks, _, _ in device.launches()] == [n // CHUNK + 1, 1]
    assert dots.isnan().all()  # of the blocks that did not run
    w_old = ends[0].double()
    update_([w], [z], [r], scalars())
    expected_z = (0.8 - 0.3 * 0.25) * z_end - 0.3 * r_end
    torch.testing.assert_close(ends[1].double(), expected_z, rtol=1e-5, atol=1e-6)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(ends[0].double(), 0.97 * w_old + 0.6 * expected_z, rtol=rounding, atol=1e-5)
    assert not w[: 4 * CHUNK].any() and not w[n - last - 4 * CHUNK : n - last].any()
