"""The text of the CUDA kernel for Adam's diagonal, run on the CPU, against float64 arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curveball_fused.backends.reference import preconditioners as reference
from tests.helpers.diagonal_truth import check_precondition, weight_of
from tests.helpers.emulated import operators, scalars
from tests.helpers.emulated_lists import CHUNK, draw, reserved, surroundings

HALVES = [torch.float16, torch.bfloat16]
COMBINATIONS = [(v, r) for v in (torch.float32, torch.float64) for r in (v, *HALVES)]
every_combination = pytest.mark.parametrize("v_dtype, r_dtype", COMBINATIONS, ids=str)
NAN, INF = float("nan"), float("inf")

sizes = st.one_of(
    st.sampled_from([0, 1, 7, 8, 9, 31, 33, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 8, 3 * CHUNK - 5]),
    st.integers(0, 400),
)
offsets = st.one_of(st.just((0, 0, 0, 0)), st.tuples(*[st.integers(0, 9)] * 4))
tensor = st.tuples(sizes, st.sampled_from(COMBINATIONS), offsets)


def lists(specs: list) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """u, v, r and z of (size, dtypes, offsets)."""
    u = [draw(n, v, places[0]) for n, (v, _), places in specs]
    v = [draw(n, v, places[1]).abs_() for n, (v, _), places in specs]
    r = [draw(n, r, places[2]) for n, (_, r), places in specs]
    return u, v, r, [draw(n, v, places[3]) for n, (v, _), places in specs]


@given(
    specs=st.lists(tensor, max_size=4),
    with_z=st.booleans(),
    moves=st.booleans(),
    seed=st.integers(0, 1000),
    threads=st.sampled_from([32, 128]),
)
def test_precondition(device: Any, specs: list, with_z: bool, moves: bool, seed: int, threads: int) -> None:
    """Sizes around those of vectors and chunks, all dtypes at once, arrays misaligned alike or not."""
    device.set_seed(seed)
    device.set_threads(threads)
    u, v, r, z = lists(specs)
    around = [surroundings(t) for t in u + v]
    check_precondition(operators.precondition_, u, v, r, z if with_z else [], scalars() if moves else None)
    assert all(torch.equal(before, surroundings(t)) for before, t in zip(around, u + v))


@pytest.mark.parametrize("threads", [32, 128, 512])
@pytest.mark.parametrize("with_z", [True, False])
@every_combination
def test_long_tensors(device: Any, v_dtype: torch.dtype, r_dtype: torch.dtype, with_z: bool, threads: int) -> None:
    """Whole chunks, with several vectors under way in each thread, and ends; one launch, and one that adds up."""
    device.set_threads(threads)
    for offset in (0, 1, 3):
        u, v, r, z = lists([(2 * CHUNK + 511, (v_dtype, r_dtype), (offset,) * 4)])
        check_precondition(operators.precondition_, u, v, r, z if with_z else [], scalars())
        assert device.launches() == [(3, threads, 0), (1, threads, 0)]


@pytest.mark.parametrize("offsets", [(0, 0, 0, 0), (3, 3, 3, 3), (1, 2, 3, 0)])
def test_without_z(device: Any, offsets: tuple[int, ...]) -> None:
    u, v, r, _ = lists([(CHUNK, (torch.float32, torch.float32), offsets)])
    sums = check_precondition(operators.precondition_, u, v, r, [])
    assert sums[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_u_may_be_r(dtype: torch.dtype) -> None:
    _, v, r, z = lists([(n, (dtype, dtype), (0, 0, 0, 0)) for n in (CHUNK + 5, 3)])
    apart = [torch.empty_like(t) for t in r]
    expected = operators.precondition_(apart, v, [t.clone() for t in r], z, weight_of(v[0]), 0.9, 1e-8, None)
    sums = operators.precondition_(r, v, r, z, weight_of(v[0]), 0.9, 1e-8, None)
    assert torch.equal(sums, expected) and all(torch.equal(a, b) for a, b in zip(r, apart))


@every_combination
@pytest.mark.parametrize("beta, rho", [(NAN, 0.9), (0.1, NAN), (INF, 0.9), (0.1, -INF)])
def test_a_skipped_step_keeps_v(v_dtype: torch.dtype, r_dtype: torch.dtype, beta: float, rho: float) -> None:
    u, v, r, z = lists([(CHUNK + 77, (v_dtype, r_dtype), (0, 1, 0, 0))])
    r[0][:5] = NAN
    v[0][:2] = torch.tensor([NAN, -0.0])
    before = v[0].clone()
    operators.precondition_(u, v, r, z, weight_of(v[0]), 0.9, 1e-8, scalars(beta, rho))
    bits = {4: torch.int32, 8: torch.int64}[v_dtype.itemsize]
    assert torch.equal(v[0].view(bits), before.view(bits))


@every_combination
def test_as_the_reference(v_dtype: torch.dtype, r_dtype: torch.dtype) -> None:
    """Numbers that are subnormal, huge, infinite or NaN: zeros, infinities and NaN are where the reference has them."""
    special = torch.tensor([0.0, 6e-8, 1e-20, 1e-30, 1e-40, 6e4, 1e19, 3e38, INF, -INF, NAN], dtype=torch.float64)
    n = len(special)
    r = special.repeat_interleave(n).to(r_dtype)
    v = special.abs().repeat(n).to(v_dtype)
    results = []
    for run in (operators.precondition_, reference.precondition_):
        u, new_v = torch.empty_like(v), v.clone()
        sums = run([u], [new_v], [r], [], weight_of(v), 0.999, 1e-8, scalars())
        results.append((u, new_v, sums))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=0, equal_nan=True)


def test_many_tensors(device: Any) -> None:
    """As few launches as the table of a launch allows, and one that adds up."""
    device.set_threads(64)
    for count, launches in ((64, 2), (65, 2), (512, 2), (513, 3)):
        lengths = torch.randint(1, 9, (count,)).tolist()
        lengths[count // 2] = 3 * CHUNK + 1
        u, v, r, z = lists([(n, (torch.float32, torch.float32), (0, 0, 0, 0)) for n in lengths])
        check_precondition(operators.precondition_, u, v, r, z, scalars())
        assert len(device.launches()) == launches


def test_dense_tensors_of_any_strides() -> None:
    u, v, r, z = (
        torch.rand(2, 5, 3, 7).to(memory_format=torch.channels_last).to(dtype)
        for dtype in (torch.float32, torch.float32, torch.bfloat16, torch.float32)
    )
    expected = torch.empty_like(u)
    sums = operators.precondition_([u], [v], [r], [z], weight_of(v), 0.9, 1e-8, None)
    truth = reference.precondition_([expected], [v], [r], [z], weight_of(v), 0.9, 1e-8)
    torch.testing.assert_close((u, sums), (expected, truth), rtol=1e-6, atol=0)


def test_nothing_to_do() -> None:
    weight = weight_of(torch.zeros(()))
    for empty in ([], [torch.zeros(3, 0, 2)]):
        sums = operators.precondition_(empty, empty, empty, empty, weight, 0.9, 1e-8, scalars())
        assert sums.tolist() == [0.0, 0.0, 0.0]


def test_arguments_that_do_not_fit() -> None:
    v, weight = [torch.zeros(3, 2)], weight_of(torch.zeros(()))
    for lists_, options in (
        (([], v, v, v), (weight, 0.9, 1e-8, None)),
        ((v, v, v, [*v, *v]), (weight, 0.9, 1e-8, None)),
        (([v[0].double()], v, v, v), (weight, 0.9, 1e-8, None)),
        ((v, v, [v[0].double()], v), (weight, 0.9, 1e-8, None)),
        ((v, v, v, [v[0].half()]), (weight, 0.9, 1e-8, None)),
        (([v[0].half()], [v[0].half()], [v[0].half()], []), (weight, 0.9, 1e-8, None)),
        ((v, v, [torch.zeros(2, 3).t()], v), (weight, 0.9, 1e-8, None)),
        ((v, v, v, v), (weight.float(), 0.9, 1e-8, None)),
        ((v, v, v, v), (weight, 0.9, 1e-8, scalars()[:1])),
    ):
        with pytest.raises(RuntimeError):
            operators.precondition_(*lists_, *options)


def test_the_same_bits_in_any_order_of_warps_and_blocks(device: Any) -> None:
    lengths = [1, 5 * CHUNK + 3, 0, 2 * CHUNK, 3, 777]
    u, v, r, z = lists([(n, COMBINATIONS[i], (0, 0, 0, 0)) for i, n in enumerate(lengths)])
    results = []
    for seed, poison in [(0, 0xFF), (1, 0xFF), (2, 0x00), (3, 0x7B)]:
        device.set_seed(seed)
        device.set_poison(poison)
        copies = [torch.empty_like(t) for t in u], [t.clone() for t in v]
        sums = operators.precondition_(*copies, r, z, weight_of(v[0]), 0.9, 1e-8, scalars())
        results.append([sums, *copies[0], *copies[1]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_factors_are_formed_in_double() -> None:
    """1 - decay is 1e-6 here, of which float32 would keep one digit."""
    u, v, r, z = lists([(64, (torch.float32, torch.float32), (0, 0, 0, 0))])
    v[0].zero_()
    check_precondition(operators.precondition_, u, v, r, z, scalars(), decay=1 - 1e-6, eps=1e-8)


def test_sums_keep_their_range() -> None:
    """z² p and r u beyond float32."""
    v, r, z = torch.full((100,), 1e38), torch.full((100,), 1e-10), torch.full((100,), 1e30)
    u = torch.empty(100)
    sums = operators.precondition_([u], [v], [r], [z], weight_of(v), 0.9, 1e-8, None)
    assert sums[0].item() == pytest.approx(100 * 1e60 * (0.9 * 1e38 / weight_of(v).item()) ** 0.5, rel=1e-5)
    assert sums[1].item() == pytest.approx(1e22, rel=1e-5)


@pytest.mark.parametrize("r_dtype", [torch.float32, torch.bfloat16])
def test_more_than_2_31_elements(device: Any, r_dtype: torch.dtype) -> None:
    """Only the last blocks of the launch run; they must reach the last elements, and nothing else."""
    n, last = 2**31 + 3 * CHUNK + 5, CHUNK + 5
    u, v, z = (reserved(n, torch.float32) for _ in range(3))
    r = reserved(n, r_dtype)
    r_end, v_end = torch.randn(last).to(r_dtype), torch.rand(last)
    r[n - last :], v[n - last :] = r_end, v_end
    device.set_block_limit(2)
    sums = operators.precondition_([u], [v], [r], [z], weight_of(v), 0.9, 1e-3, scalars())
    assert [blocks for blocks, _, _ in device.launches()] == [n // CHUNK + 1, 1]
    assert sums.isnan().all()  # of the blocks that did not run
    expected = torch.empty(last)
    reference.precondition_([expected], [v_end], [r_end], [], weight_of(v), 0.9, 1e-3, scalars())
    torch.testing.assert_close((u[n - last :], v[n - last :]), (expected, v_end), rtol=1e-5, atol=0)
    for t in (u, v):
        assert not t[: 4 * CHUNK].any() and not t[n - last - 4 * CHUNK : n - last].any()
