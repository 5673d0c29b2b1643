"""`precondition_in_bases` and `update_statistics_`: every backend against dense float64 matrices."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from curveball_fused import backends, ops
from curveball_fused.backends.reference import bases as reference
from curveball_fused.backends.scalars import GATHERED
from tests.helpers.bases_cases import (
    CASES,
    INF,
    NAN,
    Case,
    Problem,
    dense,
    every_backend,
    every_dtype,
    every_list,
    factors_of,
    lengths,
    make,
    native_only,
    number,
    scalars,
    turned,
)

ROOT = Path(__file__).parents[2]


def precondition(p: Problem, backend: str, z: list[Tensor] | None, **options: Any) -> tuple[list[Tensor], ...]:
    arguments: dict[str, Any] = dict(left=p.left, right=p.right, decay=0.8, eps=1e-3, backend=backend)
    return ops.precondition_in_bases(p.v, p.r, z, number(0.3), **(arguments | options))


@every_backend
@every_dtype
@pytest.mark.parametrize("with_z", [True, False])
@every_list
def test_against_dense_matrices(backend: str, dtype: torch.dtype, with_z: bool, cases: list[Case]) -> None:
    p = make(cases, dtype)
    before = [t.clone() for t in p.v]
    u, in_bases, dots = precondition(p, backend, p.z if with_z else None)
    tolerance = dict(rtol=1e-11, atol=1e-12) if dtype == torch.float64 else dict(rtol=2e-4, atol=2e-5)
    expected = torch.zeros(3, dtype=torch.float64)
    for i, (r_turned, z_turned) in enumerate(zip(turned(p, p.r), turned(p, p.z))):
        root = ((0.8 * p.v[i].double() + 0.2 * r_turned**2) / 0.3).sqrt() + 1e-3
        back = Problem(p.v, p.r, p.z, [None if q is None else q.mT for q in p.left],
                       [None if q is None else q.mT for q in p.right])  # fmt: skip
        whole = [r_turned / root if j == i else torch.zeros_like(t) for j, t in enumerate(p.r)]
        torch.testing.assert_close(u[i].double(), turned(back, whole)[i], **tolerance)
        torch.testing.assert_close(in_bases[i].double(), r_turned, **tolerance)
        assert u[i].dtype == in_bases[i].dtype == dtype and u[i].shape == p.r[i].shape
        if with_z:
            expected[:2] += torch.stack([(z_turned**2 * root).sum(), (z_turned * r_turned).sum()])
        expected[2] += (r_turned**2 / root).sum()
    scale = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(dots, expected, rtol=scale, atol=scale * sum(t.numel() for t in p.r))
    assert all(torch.equal(a, b) for a, b in zip(p.v, before))


@every_backend
@every_dtype
@pytest.mark.parametrize("gather", [True, False])
@every_list
def test_what_the_metric_learns(backend: str, dtype: torch.dtype, gather: bool, cases: list[Case]) -> None:
    p = make(cases, dtype)
    in_bases = [t.to(dtype) for t in turned(p, p.r)]
    left, right = factors_of(p)
    before = [[None if t is None else t.clone() for t in tensors] for tensors in (p.v, left, right)]
    old = scalars()
    new = ops.update_statistics_(
        p.v, in_bases, p.r, old, number(0.7), left=left, right=right, decay=0.8, gather=gather, backend=backend
    )
    assert torch.equal(old, scalars())
    old[GATHERED] = 0.7
    assert torch.equal(new, old)
    tolerance = dict(rtol=1e-12, atol=1e-13) if dtype == torch.float64 else dict(rtol=1e-5, atol=1e-5)
    for i, r in enumerate(p.r):
        expected = 0.8 * before[0][i].double() + 0.2 * in_bases[i].double() ** 2
        torch.testing.assert_close(p.v[i].double(), expected, **tolerance)
        rows, columns = lengths(r.shape)
        m = r.double().reshape(rows, columns)
        for side, old_side, each in ((left, before[1], m), (right, before[2], m.T)):
            if side[i] is None:
                continue
            gram = each @ each.T
            if not gather:
                assert torch.equal(side[i], old_side[i])
                continue
            ones = torch.ones_like(side[i]) if side[i].dim() == 3 else None
            wanted = 0.8 * dense(old_side[i], len(gram)) + 0.2 * gram * (1 if ones is None else dense(ones, len(gram)))
            torch.testing.assert_close(dense(side[i], len(gram)), wanted, **tolerance)
            assert torch.equal(side[i], side[i].mT) or backend == "torch"
            if side[i].dim() == 3 and (beyond := side[i].shape[0] * side[i].shape[1] - len(gram)):
                assert (side[i][-1, -beyond:] == 0).all()  # and stays so


def by_itself(p: Problem, i: int) -> Problem:
    return Problem(*([tensors[i]] for tensors in p))


ALIKE = [
    Case((4, 6), "whole", "whole"),
    Case((4, 6), None, "whole"),
    Case((4, 6), "whole", None),
    Case((4, 6), 2, "whole"),
    Case((4, 6), 2, 3),
    Case((4, 6), 2, 4),
    Case((4, 2, 3), 2, 4),  # the matrix is the same
    Case((6, 4), "whole", "whole"),
    Case((5, 4), 3, "whole"),
]


@pytest.mark.parametrize("largest", [dict(), dict(LARGEST_STACK=60), dict(LARGEST_STACKED=23)], ids=str)
def test_those_that_are_alike_go_together(largest: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """And come out as they do alone, whatever else is in the list and however many a stack holds."""
    for name, value in largest.items():
        monkeypatch.setattr(reference, name, value)
    p = make([*ALIKE, *ALIKE[::-1], *ALIKE], torch.float64)
    together = precondition(p, "torch", p.z)
    alone = [precondition(by_itself(p, i), "torch", by_itself(p, i).z) for i in range(len(p.v))]
    for which in range(2):
        torch.testing.assert_close(together[which], [result[which][0] for result in alone], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(together[2], sum(result[2] for result in alone), rtol=1e-13, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(together[0], precondition(p, "torch", p.z)[0]))
    factors = factors_of(p)
    once, singly = ([[None if t is None else t.clone() for t in side] for side in factors] for _ in range(2))
    options = dict(decay=0.8, gather=True, backend="torch")
    v = [t.clone() for t in p.v]
    ops.update_statistics_(v, together[1], p.r, scalars(), number(0.7), left=once[0], right=once[1], **options)
    for i, r in enumerate(p.r):
        left, right = [singly[0][i]], [singly[1][i]]
        ops.update_statistics_([v[i]], [together[1][i]], [r], scalars(), number(0.7), left=left, right=right, **options)
    torch.testing.assert_close(once, singly, rtol=1e-13, atol=1e-13)


def test_which_tensors_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "LARGEST_STACKED", 10)
    monkeypatch.setattr(reference, "LARGEST_STACK", 20)
    assert reference.stacks([], []) == []
    assert reference.stacks(["a", None, "b", "a", "b"], [1, 1, 3, 1, 3]) == [[0, 3], [2, 4]]
    assert reference.stacks(["a"] * 5, [10] * 5) == [[0, 1], [2, 3], [4]]
    assert reference.stacks(["a"] * 3, [11] * 3) == [[0], [1], [2]]


@every_backend
@every_dtype
@pytest.mark.parametrize("coefficients", [(NAN, 0.9), (0.1, NAN), (INF, 0.9), (0.1, -INF)])
@pytest.mark.parametrize("r_is_finite", [True, False])  # a step may be skipped for its loss, too
def test_a_step_that_is_skipped_leaves_everything(
    backend: str, dtype: torch.dtype, coefficients: tuple[float, float], r_is_finite: bool
) -> None:
    p = make(CASES[:4], dtype)
    left, right = factors_of(p)
    everything = [t for t in (*p.v, *left, *right) if t is not None]
    before = [t.clone() for t in everything]
    if not r_is_finite:
        p.r[0][0, 0] = NAN
    old = scalars(*coefficients)
    new = ops.update_statistics_(
        p.v, p.r, p.r, old, number(0.7), left=left, right=right, decay=0.8, gather=True, backend=backend
    )
    assert torch.equal(new, old) or torch.equal(new.nan_to_num(), old.nan_to_num())
    assert all(torch.equal(a, b) for a, b in zip(everything, before))


@every_backend
@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 1e19), (torch.float64, 1e154)])
def test_a_trace_that_overflows_leaves_all_factors(backend: str, dtype: torch.dtype, value: float) -> None:
    """No square does: v sees it."""
    p = make([CASES[0], CASES[12]], dtype)
    left, right = factors_of(p)
    factors = [t for t in (*left, *right) if t is not None]
    before = [t.clone() for t in factors]
    p.r[0].fill_(value)
    ops.update_statistics_(
        p.v, p.r, p.r, scalars(), number(0.7), left=left, right=right, decay=0.8, gather=True, backend=backend
    )
    assert all(torch.equal(a, b) for a, b in zip(factors, before))
    assert (p.v[0] > 0.1 * value**2).all() and p.v[0].isfinite().all()


@every_backend
@every_dtype
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("which", range(3))
def test_r_that_is_not_finite_is_told_by_the_sum(backend: str, dtype: torch.dtype, bad: float, which: int) -> None:
    p = make([CASES[12], CASES[3], CASES[9]], dtype)
    p.r[which].view(-1)[-1] = bad
    _, _, dots = precondition(p, backend, p.z)
    assert not dots[2].isfinite()


@every_backend
@every_dtype
def test_strides_and_half_precision(backend: str, dtype: torch.dtype) -> None:
    """What is not contiguous, or r of another dtype than v, is read as if it were; v keeps its strides."""
    p = make([Case((6, 4, 3, 3), "whole", "whole"), Case((20, 30), 7, 10)], dtype)
    half = [t.to(torch.bfloat16) for t in p.r]
    same = p._replace(r=[t.to(dtype) for t in half])
    odd = Problem(
        [t.mT.contiguous().mT for t in p.v],
        [half[0].contiguous(memory_format=torch.channels_last), half[1].T.contiguous().T],
        [t.mT.contiguous().mT for t in p.z],
        [q.mT.contiguous().mT for q in p.left if q is not None],
        [q.mT.contiguous().mT for q in p.right if q is not None],
    )
    expected, found = precondition(same, backend, same.z), precondition(odd, backend, odd.z)
    rounding = 0 if backend == "cpu" else 20 * torch.finfo(dtype).eps  # a BLAS sums strided matrices in another order
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)
    for problem in (same, odd):
        left, right = ([q.clone() for q in side] for side in factors_of(problem))
        ops.update_statistics_(
            problem.v, expected[1], problem.r, scalars(), number(0.7), left=left, right=right, decay=0.8, gather=True,
            backend=backend,
        )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(same.v, odd.v))
    assert odd.v[0].stride() == p.v[0].mT.contiguous().mT.stride() != p.v[0].stride()


@every_backend
def test_factors_that_are_not_contiguous_are_written(backend: str) -> None:
    p = make([CASES[0]], torch.float64)
    left, right = factors_of(p)
    odd = left[0].repeat_interleave(2, dim=0)[::2]
    for factor in (left[0], odd):
        ops.update_statistics_(
            [p.v[0].clone()], p.r, p.r, scalars(), number(0.7), left=[factor], right=right, decay=0.8, gather=True,
            backend=backend,
        )  # fmt: skip
    assert not odd.is_contiguous() and torch.equal(odd, left[0])


@native_only
@every_dtype
@pytest.mark.parametrize("case", [case for case in CASES if case.left or case.right], ids=str)
def test_kernels_get_what_lies_straight_in_memory(dtype: torch.dtype, case: Case) -> None:
    """Those of GPUs, for which torch rotates, walk over it without asking; this one asks."""
    p = make([case], dtype)
    strict = torch.ops.curveball_fused.precondition_
    found = reference.precondition_in_bases(strict, p.v, p.r, p.z, p.left, p.right, number(0.3), 0.8, 1e-3)
    rounding = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, precondition(p, "torch", p.z), rtol=rounding, atol=rounding)
    left, right = factors_of(p)
    reference.update_statistics_(strict, p.v, found[1], p.r, left, right, number(0.7), 0.8, scalars(), True)
    assert found[1][0].is_contiguous()


@every_backend
def test_autocast_changes_nothing(backend: str) -> None:
    p = make(CASES, torch.float32)
    expected = precondition(p, backend, p.z)
    with torch.autocast("cpu", torch.bfloat16):
        found = precondition(p, backend, p.z)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    factors = [factors_of(p) for _ in range(2)]
    for (left, right), enabled in zip(factors, (False, True), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            ops.update_statistics_(
                [t.clone() for t in p.v], expected[1], p.r, scalars(), number(0.7), left=left, right=right, decay=0.8,
                gather=True, backend=backend,
            )  # fmt: skip
    torch.testing.assert_close(factors[0], factors[1], rtol=0, atol=0)


@native_only
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x86 processors take them for zero")
@every_dtype
def test_products_that_would_be_subnormal_are_zero(dtype: torch.dtype) -> None:
    """Such ones took most of the time of a net that has learned its data; all that is not a product keeps them."""
    p, tiny = make([Case((20, 30), "whole", None)], dtype), torch.finfo(dtype).tiny
    p.r[0].fill_(tiny)
    _, (found,), _ = precondition(p, "cpu", p.z)
    assert turned(p, p.r)[0].abs().max() > tiny / 10 and not found.any()
    assert (p.r[0] / 2).all()
    p.r[0].fill_(tiny**0.5 / 2)
    left, right = factors_of(p)
    for factor in (*left, *right):
        if factor is not None:
            factor.zero_()
    ops.update_statistics_(p.v, [found], p.r, scalars(), number(0.7), left=left, right=right, decay=0.8, gather=True)
    assert left[0] is not None and not left[0].any()
    assert (torch.full((20,), tiny, dtype=dtype) / 2).all()


@native_only
def test_the_same_bits_for_any_number_of_threads() -> None:
    p = make([*CASES, Case((900, 700), 100, 100)], torch.float32)
    before, results = factors_of(p), []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            u, in_bases, dots = precondition(p, "cpu", p.z)
            own = [t.clone() for t in p.v]
            left, right = ([None if t is None else t.clone() for t in side] for side in before)
            ops.update_statistics_(
                own, in_bases, p.r, scalars(), number(0.7), left=left, right=right, decay=0.8, gather=True
            )
            results.append([dots, *u, *in_bases, *own, *(t for t in (*left, *right) if t is not None)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@native_only
@pytest.mark.slow
@pytest.mark.parametrize("name", backends.build_info().get("cpu instruction sets", "").split(","))
def test_every_instruction_set(name: str) -> None:
    """They differ in the last bits of products, so each is compared with the dense matrices."""
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "dense or learns"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"CURVEBALL_INSTRUCTION_SET": name, "CURVEBALL_REQUIRE_NATIVE": "1"},
    )
    if "CURVEBALL_INSTRUCTION_SET names" in process.stdout + process.stderr:
        pytest.skip(f"this processor has no {name}")
    assert process.returncode == 0 and "passed" in process.stdout, process.stdout[-3000:]


@every_backend
def test_empty_lists(backend: str) -> None:
    u, in_bases, dots = ops.precondition_in_bases(
        [], [], None, number(0.1), left=[], right=[], decay=0.9, eps=1e-8, backend=backend
    )
    assert u == in_bases == [] and dots.tolist() == [0, 0, 0]


@every_backend
def test_a_graph_that_needs_the_old_statistics_says_so(backend: str) -> None:
    p = make([CASES[0]], torch.float32)
    left, right = factors_of(p)
    for t in (p.v[0], left[0], right[0]):
        x = torch.ones_like(t, requires_grad=True)
        y = (x * t).sum()
        ops.update_statistics_(
            p.v, p.r, p.r, scalars(), number(0.7), left=left, right=right, decay=0.8, gather=True, backend=backend
        )
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


@native_only
@every_dtype
def test_opcheck(dtype: torch.dtype) -> None:
    p = make([Case((5, 3), "whole", 2), Case((4,), None, None)], dtype)
    u, in_bases = ([torch.zeros_like(t) for t in p.v] for _ in range(2))
    bases, sides = [q.contiguous() for q in (p.left[0], p.right[0])], [3, 0]
    operators = torch.ops.curveball_fused
    arguments = u, in_bases, p.v, p.r, p.z, bases, sides, number(0.1), 0.9, 1e-8
    torch.library.opcheck(operators.precondition_in_bases.default, arguments)
    arguments = p.v, in_bases, bases, p.r, sides, number(0.1), 0.9, scalars(), True
    torch.library.opcheck(operators.update_statistics_.default, arguments)
