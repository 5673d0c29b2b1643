"""The operators of the Kronecker metric against the same in plain torch, whose products are a BLAS's: one thread."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.compare import compare
from benchmarks.report import Report
from curveball_fused import ops
from curveball_fused.backends.scalars import SCALARS
from curveball_fused.preconditioners import Block, fresh_state

CASES = {
    "16 of 32 x 32": [(32, 32)] * 16,
    "16 of 64 x 64": [(64, 64)] * 16,
    "4 of 128 x 128": [(128, 128)] * 4,
    "784 x 256": [(784, 256)],
    "16 vectors of 64": [(64,)] * 16,
}
LEARNED = "784 x 256, nearly no gradient"  # from 1 down to subnormal numbers, as of a net that has learned its data
CASES[LEARNED] = CASES["784 x 256"]
ROUNDS, CALLS = 20, 20


@pytest.mark.parametrize("name", CASES)
def test_metric_kernels(
    name: str, report: Report, benchmark: BenchmarkFixture, set_threads: Callable[[int], None]
) -> None:
    set_threads(1)
    torch.manual_seed(0)
    r = [torch.randn(shape) for shape in CASES[name]]
    if name == LEARNED:
        r = [t * 10 ** (-40 * torch.rand_like(t)) for t in r]
    blocks = [Block.of(fresh_state(t)) for t in r]
    v = [block.square_average for block in blocks]
    for side in (side for block in blocks for side in block.sides):
        side.basis.copy_(torch.linalg.qr(torch.randn_like(side.basis))[0])
    bases, factors = (
        {
            side: [None if (s := getattr(block, side)) is None else getattr(s, what) for block in blocks]
            for side in ("left", "right")
        }
        for what in ("basis", "factor")
    )
    weight = torch.tensor(0.5, dtype=torch.float64)
    scalars = torch.ones(len(SCALARS), dtype=torch.float64)

    def direction(backend: str) -> list[Tensor]:
        return ops.precondition_in_bases(v, r, None, weight, **bases, decay=0.9, eps=1e-8, backend=backend)[1]

    def both(backend: str) -> None:
        for _ in range(CALLS):
            turned = direction(backend)
            ops.update_statistics_(v, turned, r, scalars, weight, **factors, decay=0.9, gather=True, backend=backend)

    calls: dict[str, Callable[[], object]] = {"plain torch": lambda: both("torch"), "native": lambda: both("cpu")}
    for call in calls.values():
        call()
    timings = compare(calls, "plain torch", ROUNDS, units=CALLS)
    note = "u and the sums, then v and the factors, on matrices of float32; one thread."
    rows = [{"": method, **timing.columns()} for method, timing in timings.items()]
    report.add(f"operators of the Kronecker metric, {name}", note, rows)
    benchmark.extra_info["comparison"] = rows
    benchmark.pedantic(calls["native"], rounds=ROUNDS)
    assert all(t.isfinite().all() for t in v)
