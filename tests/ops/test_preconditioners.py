"""`precondition_`: every backend against float64 arithmetic, over shapes, dtypes and strides."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curveball_fused import backends, ops
from tests.helpers.layouts import LAYOUTS, layouts, shapes

ROOT = Path(__file__).parents[2]
NATIVE = backends.has_operators()
BACKENDS = ["torch"] + (["cpu"] if NATIVE else [])
DTYPES = [(v, r) for v in (torch.float32, torch.float64) for r in (v, torch.bfloat16, torch.float16)]
TAKEN = torch.tensor([0.3, 0.8], dtype=torch.float64)  # β and ρ
NAN, INF = float("nan"), float("inf")
native_only = pytest.mark.skipif(not NATIVE, reason="needs the native kernels")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize(("dtype", "r_dtype"), DTYPES, ids=str)
tensors = st.lists(st.tuples(shapes, st.sampled_from(DTYPES), layouts, layouts, layouts), max_size=5)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def squares(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A v, with zeros as in the first step here and there."""
    return torch.randn(shape, dtype=torch.float64).clamp(min=0).square().to(dtype)


class Truth(NamedTuple):
    """In float64."""

    v: Tensor
    p: Tensor
    u: Tensor


def exact(v: Tensor, r: Tensor, weight: float, decay: float, eps: float) -> Truth:
    average = decay * v.double() + (1 - decay) * r.double() ** 2
    p = (average / weight) ** 0.5 + eps
    return Truth(average, p, r.double() / p)


def total(products: list[Tensor]) -> Tensor:
    return sum((product.sum() for product in products), number(0.0))


@every_backend
@given(
    specs=tensors,
    decay=st.sampled_from([0.999, 0.9, 0.0]),
    eps=st.sampled_from([1e-8, 0.1]),
    step=st.sampled_from([1, 7]),
    with_z=st.booleans(),
    taken=st.booleans(),
)
def test_against_float64(
    backend: str, specs: list, decay: float, eps: float, step: int, with_z: bool, taken: bool
) -> None:
    v = [LAYOUTS[a](squares(shape, dtypes[0])) for shape, dtypes, a, _, _ in specs]
    r = [LAYOUTS[b](draw(shape, dtypes[1])) for shape, dtypes, _, b, _ in specs]
    z = [LAYOUTS[c](draw(shape, dtypes[0])) for shape, dtypes, _, _, c in specs]
    before, strides, weight = [t.clone() for t in v], [t.stride() for t in v], 1 - decay**step
    truths = [exact(v_i, r_i, weight, decay, eps) for v_i, r_i in zip(v, r)]
    scalars = TAKEN if taken else None
    u, dots = ops.precondition_(
        v, r, z if with_z else None, number(weight), decay=decay, eps=eps, scalars=scalars, backend=backend
    )
    assert len(u) == len(v) and [t.stride() for t in v] == strides
    for u_i, v_i, old, truth in zip(u, v, before, truths):
        epsilon = torch.finfo(v_i.dtype).eps
        assert u_i.dtype == v_i.dtype and u_i.shape == v_i.shape
        torch.testing.assert_close(u_i.double(), truth.u, rtol=8 * epsilon, atol=0)
        if taken:
            torch.testing.assert_close(v_i.double(), truth.v, rtol=4 * epsilon, atol=0)
        else:
            assert torch.equal(v_i, old)
    assert dots.dtype == torch.float64 and dots.shape == (3,)
    torch.testing.assert_close(dots[2], total([r_i.double() * u_i.double() for r_i, u_i in zip(r, u)]))
    if with_z:
        z_pz = total([z_i.double() ** 2 * truth.p for z_i, truth in zip(z, truths)])
        exactly = all(t.dtype == torch.float64 for t in v)
        torch.testing.assert_close(dots[0], z_pz, rtol=1e-12 if exactly else 2e-6, atol=0)
        zr = total([z_i.double() * r_i.double() for z_i, r_i in zip(z, r)])
        torch.testing.assert_close(dots[1], zr, rtol=1e-12, atol=1e-10)
    else:
        assert dots[:2].tolist() == [0, 0]


@every_backend
@every_dtype
def test_is_adams_step_without_momentum(backend: str, dtype: torch.dtype, r_dtype: torch.dtype) -> None:
    w = torch.nn.Parameter(draw((5, 7), dtype))
    adam = torch.optim.Adam([w], lr=1.0, betas=(0.0, 0.9), eps=1e-3)
    v = [torch.zeros(5, 7, dtype=dtype)]
    for t in range(1, 5):
        r, before = draw((5, 7), r_dtype), w.detach().clone()
        w.grad = r.to(dtype)
        adam.step()
        u, _ = ops.precondition_(v, [r], None, number(1 - 0.9**t), decay=0.9, eps=1e-3, scalars=TAKEN, backend=backend)
        torch.testing.assert_close(u[0], before - w.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(v[0], adam.state[w]["exp_avg_sq"])


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_place(backend: str, dtype: torch.dtype) -> None:
    """u may be r."""
    kernels, sizes = backends.preconditioner_kernels(backend), (16, 33, 3)
    r, z = [draw((n,), dtype) for n in sizes], [draw((n,), dtype) for n in sizes]
    v = [squares((n,), dtype) for n in sizes]
    u = [torch.empty_like(t) for t in v]
    dots = kernels.precondition_(u, v, r, z, number(0.2), 0.9, 1e-6, None)
    in_place = kernels.precondition_(r, v, r, z, number(0.2), 0.9, 1e-6, None)
    assert torch.equal(dots, in_place) and all(torch.equal(a, b) for a, b in zip(u, r))


@every_backend
@every_dtype
@pytest.mark.parametrize("coefficients", [(NAN, 0.9), (0.1, NAN), (INF, 0.9), (0.1, -INF)])
def test_a_step_that_is_skipped_leaves_v(
    backend: str, dtype: torch.dtype, r_dtype: torch.dtype, coefficients: tuple[float, float]
) -> None:
    v, r = squares((3, 41), dtype), draw((3, 41), r_dtype)
    r[0, ::2] = NAN
    before = v.clone()
    scalars = torch.tensor([*coefficients, 0.5, 1.0], dtype=torch.float64)
    ops.precondition_([v], [r], [v], number(0.1), decay=0.9, eps=1e-8, scalars=scalars, backend=backend)
    assert torch.equal(v, before)


@every_backend
@every_dtype
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [0, 17, 32], ids=["first", "amid", "last"])
def test_r_that_is_not_finite_is_told_by_the_sum(
    backend: str, dtype: torch.dtype, r_dtype: torch.dtype, bad: float, place: int
) -> None:
    v, r = squares((33,), dtype), draw((33,), r_dtype)
    r[place] = bad
    (u,), dots = ops.precondition_([v], [r], None, number(0.1), decay=0.9, eps=1e-8, backend=backend)
    assert not dots[2].isfinite()
    assert u[place].isnan() and torch.equal(u.isnan(), ~r.isfinite())


@every_backend
@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 1e20), (torch.float64, -1e160)])
def test_r_whose_square_overflows_is_told_by_the_sum(backend: str, dtype: torch.dtype, value: float) -> None:
    """Its p is infinite, and an r / p of zero would pass for a step."""
    r = torch.full((17,), value, dtype=dtype)
    _, dots = ops.precondition_([torch.zeros_like(r)], [r], None, number(0.1), decay=0.9, eps=1e-8, backend=backend)
    assert not dots[2].isfinite()


@every_backend
@every_dtype
def test_where_r_and_v_are_zero_u_is_zero(backend: str, dtype: torch.dtype, r_dtype: torch.dtype) -> None:
    v, r = torch.zeros(19, dtype=dtype), torch.zeros(19, dtype=r_dtype)
    smallest = torch.finfo(torch.float32).tiny
    for eps in (1e-8, smallest):
        (u,), dots = ops.precondition_([v], [r], [v], number(0.1), decay=0.9, eps=eps, backend=backend)
        assert torch.equal(u, v) and dots.tolist() == [0, 0, 0]


@every_backend
@every_dtype
def test_nothing_becomes_subnormal(backend: str, dtype: torch.dtype, r_dtype: torch.dtype) -> None:
    """v below the smallest normal number is zero, u below that over epsilon, of either sign, and no other."""
    tiny = torch.finfo(dtype).tiny
    v = (torch.tensor([1e-3, 0.9, 0.0, 2.5, 4.0, NAN], dtype=torch.float64) * tiny).to(dtype).repeat(7)
    r, halved = torch.zeros(42, dtype=r_dtype), v / 2
    ops.precondition_([v], [r], None, number(0.75), decay=0.5, eps=1e-8, scalars=TAKEN, backend=backend)
    expected = torch.where(halved < tiny, 0, halved)
    torch.testing.assert_close(v, expected, rtol=0, atol=0, equal_nan=True)

    if r_dtype == dtype:  # the others do not reach so low
        limit = tiny / torch.finfo(dtype).eps
        r = (torch.tensor([1e-9, -0.1, 0.9, -0.9, 4.0, -4.0, 0.0], dtype=torch.float64) * limit).to(dtype).repeat(5)
        (u,), _ = ops.precondition_([torch.zeros_like(r)], [r], None, number(0.5), decay=0.5, eps=1.0, backend=backend)
        gone = r.abs() < limit
        assert (u[gone] == 0).all() and torch.equal(u[~gone], r[~gone])


@every_backend
def test_small_r_is_not_forgotten(backend: str) -> None:
    """An r of which z would be negligible still counts in v: u is its sign, and not r / ε."""
    v, r = [torch.zeros(20)], [torch.full((20,), -1e-15)]
    u, _ = ops.precondition_(v, r, None, number(1 - 0.999), decay=0.999, eps=1e-30, backend=backend)
    torch.testing.assert_close(u[0], torch.full((20,), -1.0), rtol=1e-5, atol=0)


@every_backend
def test_thousands_of_small_tensors(backend: str) -> None:
    sizes = torch.randint(0, 9, (3000,)).tolist()
    v, r, z = [squares((n,), torch.float32) for n in sizes], *([draw((n,), torch.float32) for n in sizes] for _ in "rz")
    truth = exact(torch.cat(v), torch.cat(r), 0.3, 0.8, 1e-4)
    u, dots = ops.precondition_(v, r, z, number(0.3), decay=0.8, eps=1e-4, scalars=TAKEN, backend=backend)
    torch.testing.assert_close(torch.cat(u).double(), truth.u, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat(v).double(), truth.v, rtol=1e-6, atol=0)
    z_all, r_all = torch.cat(z).double(), torch.cat(r).double()
    expected = torch.stack((z_all @ (truth.p * z_all), z_all @ r_all, r_all @ truth.u))
    torch.testing.assert_close(dots, expected, rtol=1e-6, atol=1e-9)


@every_backend
def test_sums_of_many_terms_keep_their_accuracy(backend: str) -> None:
    """Ten million terms of one sign: float32 accumulation would be off by 1e-3."""
    v, r, z = (torch.full((10_000_000,), value) for value in (0.0, 0.1, 0.3))
    (u,), dots = ops.precondition_([v], [r], [z], number(0.1), decay=0.9, eps=1.0, backend=backend)
    r_0, u_0, z_0 = (float(t[0]) for t in (r, u, z))
    for ours, exactly, precision in zip(dots, (z_0 * 1.1 * z_0, z_0 * r_0, r_0 * u_0), (1e-7, 1e-9, 1e-9)):
        torch.testing.assert_close(ours, number(1e7 * exactly), rtol=precision, atol=0)


@native_only
def test_the_same_bits_for_any_number_of_threads() -> None:
    sizes = [1, 100_003, 0, 65_536, 3, 700_001]
    v, r, z = [squares((n,), torch.float32) for n in sizes], *([draw((n,), torch.float32) for n in sizes] for _ in "rz")
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            own = [t.clone() for t in v]
            u, dots = ops.precondition_(own, r, z, number(0.1), decay=0.9, eps=1e-8, scalars=TAKEN, backend="cpu")
            results.append([dots, *u, *own])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


BITS = """
import torch
from curveball_fused import ops
torch.manual_seed(0)
for dtype, r_dtype in {dtypes}:
    magnitudes = 10.0 ** torch.empty(40_001, dtype=torch.float64).uniform_(-18, 4)
    r, z = (magnitudes * torch.randn(40_001).double()).to(r_dtype), torch.randn(40_001).to(dtype)
    v = torch.rand(40_001).to(dtype) * magnitudes.square().to(dtype)
    (u,), dots = ops.precondition_(
        [v], [r], [z], torch.tensor(0.1, dtype=torch.float64), decay=0.99, eps=1e-8, scalars=torch.ones(2).double(),
        backend="cpu",
    )
    print(dots.tolist(), u.double().sum().item(), v.double().sum().item(), hash(tuple(u.tolist() + v.tolist())))
"""


@native_only
@pytest.mark.slow
def test_the_same_bits_from_every_instruction_set() -> None:
    results = []
    for name in backends.build_info()["cpu instruction sets"].split(","):
        process = subprocess.run(
            [sys.executable, "-c", BITS.format(dtypes=DTYPES)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"CURVEBALL_INSTRUCTION_SET": name, "CURVEBALL_REQUIRE_NATIVE": "1"},
        )
        if "CURVEBALL_INSTRUCTION_SET names" not in process.stderr:  # this processor has it
            assert process.returncode == 0, process.stderr
            results.append(process.stdout)
    assert results[0] and all(result == results[0] for result in results)


@every_backend
def test_empty_lists(backend: str) -> None:
    for z in ([], None):
        u, dots = ops.precondition_([], [], z, number(0.1), decay=0.9, eps=1e-8, backend=backend)
        assert u == [] and dots.tolist() == [0, 0, 0] and dots.dtype == torch.float64


@every_backend
def test_a_graph_that_needs_the_old_v_says_so(backend: str) -> None:
    v, r = torch.ones(3), [torch.ones(3)]
    x = torch.ones(3, requires_grad=True)
    y = (x * v).sum()
    ops.precondition_([v], r, None, number(0.1), decay=0.9, eps=1e-8, backend=backend)
    y.backward(retain_graph=True)
    ops.precondition_([v], r, None, number(0.1), decay=0.9, eps=1e-8, scalars=TAKEN, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@every_backend
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(decay=1.0), "decay must be at least 0"),
        (dict(decay=-0.1), "decay must be at least 0"),
        (dict(decay=NAN), "decay must be at least 0"),
        (dict(eps=0.0), "eps must be"),
        (dict(eps=1e-46), "eps must be"),  # zero in float32
        (dict(eps=INF), "eps must be"),
        (dict(eps=NAN), "eps must be"),
        (dict(weight=torch.tensor(0.1)), "weight must be 0-dim float64"),
        (dict(weight=torch.ones(1).double()), "weight must be 0-dim float64"),
        (dict(scalars=torch.ones(1).double()), "scalars must be"),
        (dict(scalars=torch.ones(2)), "scalars must be"),
        (dict(r=[]), "same length"),
        (dict(z=[torch.ones(3)] * 2), "same length"),
        (dict(r=[torch.ones(4)]), r"\(3,\).*\(4,\)"),
        (dict(z=[torch.ones(4)]), r"\(3,\).*\(4,\)"),
    ],
    ids=str,
)
def test_bad_arguments(backend: str, changes: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = dict(
        v=[torch.ones(3)], r=[torch.ones(3)], z=None, weight=number(0.1), decay=0.9, eps=1e-8, backend=backend
    )
    with pytest.raises(ValueError, match=words):
        ops.precondition_(**(arguments | changes))


@native_only
def test_native_operators_check_their_arguments() -> None:
    t, other, scalars, weight = [torch.ones(3, 2)], [torch.ones(2, 3)], torch.ones(3).double(), number(0.1)
    half, double = [t[0].half()], [t[0].double()]
    operator = torch.ops.curveball_fused.precondition_
    operator(t, t, half, [], weight, 0.9, 1e-8, None)
    for arguments, words in (
        ((half, half, half, [], weight, 0.9, 1e-8, None), r"v\[0\] has dtype float16"),
        ((t, t, double, [], weight, 0.9, 1e-8, None), r"r\[0\] has dtype float64"),
        ((double, double, t, [], weight, 0.9, 1e-8, None), r"r\[0\] has dtype float32"),
        ((double, t, t, [], weight, 0.9, 1e-8, None), r"u\[0\] has dtype float64"),
        ((t, t, t, half, weight, 0.9, 1e-8, None), r"z\[0\] has dtype float16"),
        ((other, t, t, [], weight, 0.9, 1e-8, None), r"u\[0\].*sizes"),
        ((t, t, other, [], weight, 0.9, 1e-8, None), r"r\[0\].*sizes"),
        ((t, t, t, [other[0].t()], weight, 0.9, 1e-8, None), r"z\[0\] is laid out differently"),
        (([torch.ones(1).expand(3, 2)],) * 3 + ([], weight, 0.9, 1e-8, None), "not dense"),
        (([], t, t, [], weight, 0.9, 1e-8, None), "same length"),
        ((t, t, [], [], weight, 0.9, 1e-8, None), "same length"),
        ((t, t, t, t * 2, weight, 0.9, 1e-8, None), "same length"),
        ((t, t, t, [], weight.float(), 0.9, 1e-8, None), "weight has dtype"),
        ((t, t, t, [], weight, 1.0, 1e-8, None), "decay"),
        ((t, t, t, [], weight, 0.9, 0.0, None), "eps"),
        ((t, t, t, [], weight, 0.9, 1e-8, scalars.float()), "scalars has dtype"),
        ((t, t, t, [], weight, 0.9, 1e-8, scalars[:1]), "scalars must be"),
    ):
        with pytest.raises(RuntimeError, match=words):
            operator(*arguments)


@native_only
@every_dtype
def test_opcheck(dtype: torch.dtype, r_dtype: torch.dtype) -> None:
    u, v, z = ([squares(shape, dtype) for shape in ((5, 3), (4,))] for _ in range(3))
    r = [draw(shape, r_dtype) for shape in ((5, 3), (4,))]
    operator = torch.ops.curveball_fused.precondition_.default
    torch.library.opcheck(operator, (u, v, r, z, number(0.1), 0.9, 1e-8, TAKEN))
    torch.library.opcheck(operator, (u, v, r, [], number(0.1), 0.9, 1e-8, None))
