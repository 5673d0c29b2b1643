"""The emulated CUDA kernels for lists: sums and roundings, the order of warps and blocks, more than 2^31 elements."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from curveball_fused.backends.dtypes import compute_dtype
from curveball_fused.backends.scalars import Z_DOT_Z
from tests.helpers.emulated import DTYPES, operators, scalars
from tests.helpers.emulated_lists import CHUNK, draw, reserved, update_

HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "beta, rho", [(float("nan"), 0.9), (0.1, float("nan")), (float("inf"), 0.9), (0.1, -float("inf"))]
)
def test_a_skipped_step_changes_nothing(dtype: torch.dtype, beta: float, rho: float) -> None:
    w, z = draw(CHUNK + 77, dtype), draw(CHUNK + 77, compute_dtype(dtype))
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
    """rho - beta s cancels to 1e-6 here, of which float32 would keep one digit."""
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


def test_the_same_bits_in_any_order_of_warps_and_blocks(device: Any) -> None:
    lengths, dtypes = [1, 5 * CHUNK + 3, 0, 2 * CHUNK, 3, 777], [torch.float32, torch.bfloat16, torch.float64] * 2
    w, z, r = ([draw(n, f(d)) for n, d in zip(lengths, dtypes)] for f in (lambda d: d, compute_dtype, lambda d: d))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_than_2_31_elements(device: Any, dtype: torch.dtype) -> None:
    """Only the last blocks of the launch run; they must reach the last elements, and nothing else."""
    n, last = 2**31 + 3 * CHUNK + 5, CHUNK + 5
    w, z, r = reserved(n, dtype), reserved(n, compute_dtype(dtype)), reserved(n, dtype)
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
    expected_z = (0.8 - 0.3 * 0.2) * z_end - 0.3 * r_end
    torch.testing.assert_close(ends[1].double(), expected_z, rtol=1e-5, atol=1e-6)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(ends[0].double(), 0.97 * w_old + 0.6 * expected_z, rtol=rounding, atol=1e-5)
    assert not w[: 4 * CHUNK].any() and not w[n - last - 4 * CHUNK : n - last].any()
