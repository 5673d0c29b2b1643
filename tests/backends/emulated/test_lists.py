"""The text of the CUDA kernels for lists of parameters, run on the CPU: every list, against float64 arithmetic."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curveball_fused.backends.dtypes import compute_dtype
from curveball_fused.backends.reference import parameters as reference
from curveball_fused.backends.scalars import PREDICTED_CHANGE, SCALARS, Z_DOT_Z
from tests.helpers.emulated import DTYPES, operators, scalars
from tests.helpers.emulated_lists import CHUNK, check_update, draw, update_
from tests.helpers.subnormals import check_vanishing
from tests.helpers.tiers import slow

BLOCK_SIZES = [32, 128, 512, 1024]
sizes = st.one_of(
    st.sampled_from([0, 1, 7, 8, 9, 31, 33, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 8, 3 * CHUNK - 5]),
    st.integers(0, 400),
)
offsets = st.one_of(st.tuples(st.just(0), st.just(0), st.just(0)), st.tuples(*[st.integers(0, 9)] * 3))
tensor = st.tuples(sizes, st.sampled_from(DTYPES), offsets, st.booleans())
launched = st.tuples(st.integers(0, 1000), st.sampled_from(BLOCK_SIZES[:2]))


@given(specs=st.lists(tensor, max_size=4), launched=launched)
def test_update(device: Any, specs: list, launched: tuple[int, int]) -> None:
    """Sizes around those of vectors and chunks, all dtypes at once, arrays misaligned alike or not, r in float32."""
    device.set_seed(launched[0])
    device.set_threads(launched[1])
    w = [draw(n, dtype, places[0]) for n, dtype, places, _ in specs]
    z = [draw(n, compute_dtype(dtype), places[1]) for n, dtype, places, _ in specs]
    r = [draw(n, compute_dtype(dtype) if wide else dtype, places[2]) for n, dtype, places, wide in specs]
    s = scalars()
    result = check_update(w, z, r, s, [0.6] * len(w), [0.05] * len(w), lambda: update_(w, z, r, s))
    others = [i for i in range(len(SCALARS)) if i != Z_DOT_Z]
    assert torch.equal(result[others], s[others])


@pytest.mark.parametrize("threads", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_update_of_long_tensors(device: Any, dtype: torch.dtype, threads: int, offset: int) -> None:
    """Whole chunks, with several vectors under way in each thread, and ends, at every block size."""
    device.set_threads(threads)
    n = 2 * CHUNK + 511
    w, z, r = (draw(n, d, offset) for d in (dtype, compute_dtype(dtype), dtype))
    check_update([w], [z], [r], scalars(), [0.6], [0.05], lambda: update_([w], [z], [r], scalars()))
    assert device.launches() == [(3, threads, 0), (1, threads, 0)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_z_does_not_become_subnormal(dtype: torch.dtype) -> None:
    check_vanishing(lambda w, z, r: update_(w, z, r, scalars()), dtype)


@given(
    specs=st.lists(tensor, min_size=1, max_size=4),
    r_dtypes=st.lists(st.sampled_from(DTYPES), min_size=4, max_size=4),
    launched=launched,
)
def test_dots(device: Any, specs: list, r_dtypes: list, launched: tuple[int, int]) -> None:
    device.set_seed(launched[0])
    device.set_threads(launched[1])
    z = [draw(n, compute_dtype(dtype), places[0]) for n, dtype, places, _ in specs]
    r = [draw(n, dtype, places[1]) for (n, _, places, _), dtype in zip(specs, r_dtypes)]
    flat_z, flat_r = (torch.cat([t.double() for t in list_]) for list_ in (z, r))
    expected = torch.stack((flat_z @ flat_z, flat_z @ flat_r, flat_r @ flat_r))
    torch.testing.assert_close(operators.dots(z, r), expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("threads", BLOCK_SIZES)
def test_dots_of_long_tensors(device: Any, threads: int) -> None:
    device.set_threads(threads)
    z, r = draw(5 * CHUNK + 77, torch.float32), draw(5 * CHUNK + 77, torch.bfloat16)
    a, b = z.double(), r.double()
    torch.testing.assert_close(operators.dots([z], [r]), torch.stack((a @ a, a @ b, b @ b)), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_tensors_of_any_strides(dtype: torch.dtype) -> None:
    w, z, r = (
        torch.randn(2, 5, 3, 7).to(d).to(memory_format=torch.channels_last)
        for d in (dtype, compute_dtype(dtype), compute_dtype(dtype))
    )
    expected = [w.clone()], [z.clone()]
    update_([w], [z], [r], scalars())
    reference.update_(*expected, [r], scalars(), [1], [0.6], [0.05], None)
    torch.testing.assert_close(z, expected[1][0])
    torch.testing.assert_close(w, expected[0][0])


# ---------------------------------------------------------------------------------------------- many tensors, groups


def resnet_like_list(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    lengths = [random.Random(0).choice([1, 8, 64, 100, CHUNK + 3]) for _ in range(161)]
    return tuple([draw(n, d) for n in lengths] for d in (dtype, compute_dtype(dtype), dtype))  # type: ignore[return-value]


@pytest.mark.parametrize("count, launches", [(64, 2), (65, 2), (512, 2), (513, 3), slow(3000, 7)])
def test_many_tensors(device: Any, count: int, launches: int) -> None:
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
def test_the_parameter_arithmetic_of_a_step_is_three_launches(device: Any, dtype: torch.dtype) -> None:
    device.set_threads(64)
    w, z, r = resnet_like_list(dtype)
    products, rate = torch.rand(5, dtype=torch.float64), torch.tensor(0.3)
    s = operators.solve(scalars(), torch.tensor(1.5, dtype=dtype), products, None, None, None, 1.0, rate)
    update_(w, z, r, s, ([100, 0, 61], [0.6, 0.1, 0.6], [0.05, 0.1, 0.0]))
    assert len(device.launches()) == 3


@pytest.mark.parametrize("rate_dtype", [None, *DTYPES])
def test_groups(device: Any, rate_dtype: torch.dtype | None) -> None:
    """Each group's own rate, from a number or a tensor, and weight decay; and M of the rate that the model sees."""
    device.set_threads(128)
    lengths = [5, CHUNK + 1, 0, 30, 700, 8]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.bfloat16, torch.float32]
    w, z, r = ([draw(n, f(d)) for n, d in zip(lengths, dtypes)] for f in (lambda d: d, compute_dtype, lambda d: d))
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
def test_groups_of_many_chunks(device: Any, seed: int) -> None:
    """Several warps add up each group's sums, and begin with the next group at different times."""
    device.set_seed(seed)
    device.set_threads(64)
    w, z, r = ([draw(n * CHUNK, torch.float32) for n in (70, 50)] for _ in range(3))
    s = update_(w, z, r, scalars(), ([1, 1], [0.5, 0.25], [0.0, 0.0]))
    squares = torch.stack([t.double().square().sum() for t in z])
    torch.testing.assert_close(s[Z_DOT_Z], squares.sum(), rtol=1e-12, atol=0)
    mean = (0.5 * squares[0] + 0.25 * squares[1]) / squares.sum()
    torch.testing.assert_close(s[PREDICTED_CHANGE], -0.7 * mean + 0.5 * 0.4 * mean**2, rtol=1e-12, atol=0)


def test_more_groups_than_one_launch_takes(device: Any) -> None:
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
