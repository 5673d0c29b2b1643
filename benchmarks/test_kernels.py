"""The kernels that cross the parameters, against torch's own on the same memory: 32M float32, 64 tensors."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.compare import compare
from benchmarks.report import Report, bar, cores, threads_text
from curveball_fused import ops
from curveball_fused.backends.reference import parameters as reference

COUNT, SIZE = 64, 2**25 // 64
UPDATE_BAR, DOTS_BAR, PRECONDITION_BAR = 1.10, 1.15, 1.00
ROUNDS, OTHER_ROUNDS, PEDANTIC_ROUNDS = 40, 10, 10
THREADS = sorted({1, cores()})
# β, ρ and λ by which the numbers stay in range however often the update is repeated.
BETA, RHO, LAMBD, LR = 1e-3, 0.9, 0.1, 1e-3

Tensors = tuple[Tensor, ...]


@pytest.fixture(scope="module")
def flat() -> Tensors:
    """Parameters, state and gradient as one vector each."""
    torch.manual_seed(0)
    return torch.randn(COUNT * SIZE), torch.randn(COUNT * SIZE), torch.randn(COUNT * SIZE)


@pytest.mark.parametrize("threads", THREADS)
def test_update(
    threads: int,
    flat: Tensors,
    report: Report,
    benchmark: BenchmarkFixture,
    set_threads: Callable[[int], None],
) -> None:
    set_threads(threads)
    w, z, r = (list(vector.split(SIZE)) for vector in flat)
    coefficients = torch.tensor([BETA, RHO, LAMBD], dtype=torch.float64)
    sgd = _sgd(w, z, r)

    def foreach() -> Tensor:
        torch._foreach_mul_(z, RHO - BETA * LAMBD)
        torch._foreach_add_(z, r, alpha=-BETA)
        torch._foreach_add_(w, z, alpha=LR)
        return torch.stack(torch._foreach_norm(z)).square().sum()

    calls: dict[str, Callable[[], object]] = {
        "torch.optim.SGD, fused": sgd.step,
        "ops.update_": lambda: ops.update_(w, z, r, coefficients, lr=LR, backend="cpu"),
        "torch._foreach": foreach,
        "reference.update_": lambda: ops.update_(w, z, r, coefficients, lr=LR, backend="torch"),
    }
    note = (
        "z ← (ρ-βλ) z - βr, w ← w + lr z, and z·z, which SGD does not compute, on 32M float32 in 64 tensors; "
        f"{threads_text(threads)}. All rows work on the same memory."
    )
    _measure(f"update_, {threads_text(threads)}", note, calls, "ops.update_", UPDATE_BAR, report, benchmark)
    assert torch.isfinite(flat[0]).all()


@pytest.mark.parametrize("threads", THREADS)
def test_dots(
    threads: int,
    flat: Tensors,
    report: Report,
    benchmark: BenchmarkFixture,
    set_threads: Callable[[int], None],
) -> None:
    set_threads(threads)
    _, flat_z, flat_r = flat
    z, r = list(flat_z.split(SIZE)), list(flat_r.split(SIZE))

    def three_dots() -> Tensor:
        pairs = ((z, z), (z, r), (r, r))
        return torch.stack([torch.stack([a.dot(b) for a, b in zip(*p, strict=True)]).sum() for p in pairs])

    def foreach() -> Tensor:
        products = (torch._foreach_mul(a, b) for a, b in ((z, z), (z, r), (r, r)))
        return torch.stack([torch.stack([p.sum() for p in product]).sum() for product in products])

    calls: dict[str, Callable[[], object]] = {
        "torch.dot, one sum": lambda: torch.dot(flat_z, flat_r),
        "ops.dots, three sums": lambda: ops.dots(z, r, backend="cpu"),
        "torch.dot per tensor, three sums": three_dots,
        "torch._foreach_mul, three sums": foreach,
        "reference.dots, three sums": lambda: reference.dots(z, r),
    }
    note = (
        "z·z, z·r and r·r of two lists of 64 tensors, 32M float32 each, with sums in double precision, against "
        f"one torch.dot, a single sum over the same memory as two flat vectors; {threads_text(threads)}."
    )
    _measure(f"dots, {threads_text(threads)}", note, calls, "ops.dots, three sums", DOTS_BAR, report, benchmark)


@pytest.mark.parametrize("threads", THREADS)
def test_precondition(
    threads: int,
    flat: Tensors,
    report: Report,
    benchmark: BenchmarkFixture,
    set_threads: Callable[[int], None],
) -> None:
    set_threads(threads)
    w, z, r = (list(vector.split(SIZE)) for vector in flat)
    v = list(flat[2].square().split(SIZE))
    adam = _adam(w, z, v, r)
    weight, taken = torch.tensor(0.5, dtype=torch.float64), torch.ones(2, dtype=torch.float64)

    def ours(scalars: Tensor | None, backend: str = "cpu") -> object:
        return ops.precondition_(v, r, z, weight, decay=0.999, eps=1e-8, scalars=scalars, backend=backend)

    calls: dict[str, Callable[[], object]] = {
        "torch.optim.Adam, fused": adam.step,
        "ops.precondition_": lambda: ours(taken),
        "ops.precondition_, v stays": lambda: ours(None),
        "ops.precondition_, v stays, no z": lambda: ops.precondition_(
            v, r, None, weight, decay=0.999, eps=1e-8, backend="cpu"
        ),
        "reference.precondition_": lambda: ours(taken, "torch"),
    }
    # Adam reads w, z, v, r and writes w, z, v; ours reads v, r, z and writes u, v.
    moved = dict(zip(calls, (28, 20, 16, 12, 20), strict=True))
    note = (
        "u ← r / p, v, and z·Pz, z·r and r·u, on 32M float32 in 64 tensors, against a whole step of Adam; GB/s: of "
        f"the memory that must be read and written; {threads_text(threads)}."
    )
    title = f"precondition_, {threads_text(threads)}"
    _measure(title, note, calls, "ops.precondition_", PRECONDITION_BAR, report, benchmark, moved)


def _measure(
    title: str,
    note: str,
    calls: dict[str, Callable[[], object]],
    ours: str,
    most: float,
    report: Report,
    benchmark: BenchmarkFixture,
    moved: dict[str, int] | None = None,
) -> None:
    """Compares `calls` with the first of them, and times `ours` alone for pytest-benchmark's own table.

    The pair that a bar judges takes turns by itself: some of the others fill the caches with temporary tensors. `moved`
    has the bytes of an element, for a column of GB/s.
    """
    for call in calls.values():
        call()
    baseline = next(iter(calls))
    pair = {name: calls[name] for name in (baseline, ours)}
    timings = compare(calls, baseline, OTHER_ROUNDS) | compare(pair, baseline, ROUNDS)
    rows = [
        {"": name, **timing.columns(), "bar": bar(timing.ratio, most) if name == ours else None}
        for name, timing in timings.items()
    ]
    if moved is not None:
        for row, (name, timing) in zip(rows, timings.items(), strict=True):
            row["GB/s"] = moved[name] * COUNT * SIZE / 1e9 / statistics.median(timing.rounds)
    report.add(title, note, rows)
    benchmark.extra_info["comparison"] = rows
    benchmark.pedantic(calls[ours], rounds=PEDANTIC_ROUNDS)


def _sgd(w: list[Tensor], z: list[Tensor], r: list[Tensor]) -> torch.optim.SGD:
    """Fused momentum SGD on the tensors given: parameters, momentum buffers and gradients."""
    params = [torch.nn.Parameter(w_i) for w_i in w]
    optimizer = torch.optim.SGD(params, lr=1e-6, momentum=RHO, fused=True)
    for p, z_i, r_i in zip(params, z, r, strict=True):
        p.grad = r_i
        optimizer.state[p]["momentum_buffer"] = z_i
    return optimizer


def _adam(w: list[Tensor], z: list[Tensor], v: list[Tensor], r: list[Tensor]) -> torch.optim.Adam:
    """Fused Adam on the tensors given: parameters, averages of gradients and of their squares, and gradients."""
    params = [torch.nn.Parameter(w_i) for w_i in w]
    optimizer = torch.optim.Adam(params, lr=1e-6, fused=True)
    for p, z_i, v_i, r_i in zip(params, z, v, r, strict=True):
        p.grad = r_i
        optimizer.state[p] |= {"step": torch.tensor(0.0), "exp_avg": z_i, "exp_avg_sq": v_i}
    return optimizer
