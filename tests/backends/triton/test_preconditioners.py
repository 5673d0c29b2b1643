"""Adam's diagonal in Triton, against float64 arithmetic: on a GPU, or interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from curveball_fused.backends.reference import preconditioners as reference
from curveball_fused.backends.triton import launch_tables as triton_tables
from curveball_fused.backends.triton import parameters as triton_parameters
from curveball_fused.backends.triton import preconditioners as triton_preconditioners
from tests.helpers.diagonal_truth import DECAY, EPS, check_precondition, exact, weight_of
from tests.helpers.triton_cases import DEVICE, INF, INTERPRETED, NAN, RUNTIME_WARNINGS, scalars

pytestmark = RUNTIME_WARNINGS
BLOCK_MAIN, BLOCK_TAIL, CHUNK = triton_parameters.BLOCK_MAIN, triton_parameters.BLOCK_TAIL, triton_tables.CHUNK
SIZES = [1, 7, 0, 16, BLOCK_TAIL + 1, BLOCK_MAIN - 1, BLOCK_MAIN, BLOCK_MAIN + 1, CHUNK, CHUNK + BLOCK_MAIN + 3]
COMBINATIONS = [(v, r) for v in (torch.float32, torch.float64) for r in (v, torch.float16, torch.bfloat16)]
every_combination = pytest.mark.parametrize("v_dtype, r_dtype", COMBINATIONS, ids=str)
run = triton_preconditioners.precondition_


def draw(size: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """`size` numbers, `offset` elements after an aligned address."""
    return torch.randn(size + offset, dtype=torch.float64).to(dtype).to(DEVICE)[offset:]


def lists(
    sizes: list[int], v_dtype: torch.dtype, r_dtype: torch.dtype, misaligned: int = -1
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """u, v, r and z, one of them at odd addresses."""
    dtypes = (v_dtype, v_dtype, r_dtype, v_dtype)
    u, v, r, z = ([draw(n, d, int(i == misaligned)) for n in sizes] for i, d in enumerate(dtypes))
    return u, [t.abs_() for t in v], r, z


@every_combination
@pytest.mark.parametrize("with_z", [True, False])
def test_precondition_over_sizes(v_dtype: torch.dtype, r_dtype: torch.dtype, with_z: bool) -> None:
    u, v, r, z = lists(SIZES, v_dtype, r_dtype)
    sums = check_precondition(run, u, v, r, z if with_z else [], scalars())
    assert with_z or sums[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("misaligned", range(4))
@pytest.mark.parametrize("r_dtype", [torch.float32, torch.bfloat16])
def test_odd_addresses(r_dtype: torch.dtype, misaligned: int) -> None:
    u, v, r, z = lists([1, BLOCK_MAIN + 5, 2 * BLOCK_MAIN], torch.float32, r_dtype, misaligned)
    check_precondition(run, u, v, r, z)
    check_precondition(run, u, v, r, [], scalars())


def test_mixed_dtypes() -> None:
    parts = [lists([3 + 700 * i], *COMBINATIONS[i % 6]) for i in range(8)]
    u, v, r, z = ([part[k][0] for part in parts] for k in range(4))
    check_precondition(run, u, v, r, z, scalars())


def test_factors_in_full_precision() -> None:
    u, v, r, z = lists([100], torch.float64, torch.float64)
    check_precondition(run, u, v, r, z, scalars(), decay=1 - 1 / 3, eps=1e-10)
    u, v, r, z = lists([64], torch.float32, torch.float32)
    v[0].zero_()
    check_precondition(run, u, v, r, z, scalars(), decay=1 - 1e-6, eps=1e-8)


def test_u_may_be_r() -> None:
    _, v, r, z = lists([BLOCK_MAIN + 300, 5], torch.float32, torch.float32)
    apart = [torch.empty_like(t) for t in r]
    expected = run(apart, v, r, z, weight_of(v[0]), DECAY, EPS)
    sums = run(r, v, r, z, weight_of(v[0]), DECAY, EPS)
    assert torch.equal(sums, expected) and all(torch.equal(a, b) for a, b in zip(r, apart, strict=True))


@every_combination
@pytest.mark.parametrize("bad", [(NAN, 0.9), (0.1, NAN), (INF, 0.9), (0.1, -INF)])
def test_a_skipped_step_keeps_v(v_dtype: torch.dtype, r_dtype: torch.dtype, bad: tuple[float, float]) -> None:
    u, v, r, z = lists([BLOCK_MAIN + 300], v_dtype, r_dtype)
    r[0][:5] = NAN
    v[0][:2] = torch.tensor([NAN, -0.0])
    before = v[0].clone()
    run(u, v, r, z, weight_of(v[0]), DECAY, EPS, scalars(beta=bad[0], rho=bad[1]))
    bits = {4: torch.int32, 8: torch.int64}[v_dtype.itemsize]
    assert torch.equal(v[0].view(bits), before.view(bits))


@every_combination
def test_as_the_reference(v_dtype: torch.dtype, r_dtype: torch.dtype) -> None:
    """Numbers that are subnormal, huge, infinite or NaN: zeros, infinities and NaN are where the reference has them."""
    special = [0.0, 6e-8, 1e-20, 1e-30, 6e4, 1e19, 3e38, INF, -INF, NAN, 1e-40]
    numbers, n = torch.tensor(special, dtype=torch.float64, device=DEVICE), len(special)
    r, v = numbers.repeat_interleave(n).to(r_dtype), numbers.abs().repeat(n).to(v_dtype)
    if INTERPRETED and r_dtype == torch.bfloat16:
        r[-n:] = 0  # the interpreter takes subnormal bfloat16 for zero
    results = []
    for function in (run, reference.precondition_):
        u, new_v = torch.empty_like(v), v.clone()
        sums = function([u], [new_v], [r], [], weight_of(v), 0.999, 1e-8, scalars())
        results.append((u, new_v, sums))
    torch.testing.assert_close(results[0], results[1], rtol=2e-6, atol=0, equal_nan=True)


def test_nothing_to_do() -> None:
    for empty in ([], [torch.zeros(0, device=DEVICE), torch.zeros(3, 0, device=DEVICE)]):
        weight = weight_of(torch.zeros((), device=DEVICE))
        assert run(empty, empty, empty, empty, weight, DECAY, EPS, scalars()).tolist() == [0.0, 0.0, 0.0]


def test_many_small_tensors() -> None:
    sizes = torch.randint(0, 9, (60 if INTERPRETED else 5000,)).tolist()
    check_precondition(run, *lists(sizes, torch.float32, torch.float32), scalars())


def test_offsets_beyond_32_bits() -> None:
    """One program of a tensor that claims more than 2³² elements, of which only the last chunk is there."""
    first = 2**32 // CHUNK + 7
    begin, n = first * CHUNK, BLOCK_MAIN + 40
    (u,), (v,), (r,), (z,) = lists([n], torch.float32, torch.float32)
    partials, weight = draw(3, torch.float64), weight_of(v)
    v_new, p = exact(v, r, weight.item(), DECAY, EPS)
    u_new = r.double() / p
    expected = torch.stack([(a * b).sum() for a, b in ((z * z.double(), p), (z.double(), r), (r.double(), u_new))])
    addresses = [t.data_ptr() - begin * t.element_size() for t in (u, v, r, z)]
    table = torch.tensor([*addresses, begin + n, 0, -first, -first, 0], device=DEVICE)
    launch = triton_tables.Launch((torch.float32,) * 4, 1, 1, table)
    kernel = triton_preconditioners.precondition_kernel
    triton_parameters.run(kernel, launch, weight, DECAY, EPS, scalars(), partials, 1, HAS_Z=True)
    torch.testing.assert_close((u, v), (u_new.float(), v_new.float()))
    torch.testing.assert_close(partials, expected, rtol=1e-6, atol=1e-4)


def test_the_same_bits_again() -> None:
    u, v, r, z = lists([CHUNK + 77, 3000], torch.float32, torch.float32)
    results = [run(u, v, [t.clone() for t in r], z, weight_of(v[0]), DECAY, EPS) for _ in range(3)]
    assert all(torch.equal(results[0], other) for other in results)


def test_lists_that_the_tables_would_hide_from_triton() -> None:
    u, v, r, z = lists([5, 3], torch.float32, torch.float32)
    elsewhere = [r[0], torch.zeros(3, device="meta")]
    for arguments, words in (
        ((u, v, elsewhere, z), "meta.*one device"),
        ((u, v, [t.long() for t in r], z), "r torch.int64"),
        ((u, v, [t.double() for t in r], z), "convert"),
        ((u, v, r, [t.half() for t in z]), "convert"),
        (([t.half() for t in u], [t.half() for t in v], r, []), "convert v to float32"),
    ):
        with pytest.raises(RuntimeError, match=words):
            run(*arguments, weight_of(v[0]), DECAY, EPS)
