"""The Kronecker metric on the GPU: whole steps over those of AdamW, its products by stacks, and ways to refresh."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.compare import Spread
from benchmarks.gpu.measure import MARK, ROUNDS, Call, as_text, in_turn, ratio
from benchmarks.large_nets import LARGE
from benchmarks.metric_steps import ADAMW, TURN, adamw, graphed_kronecker, kronecker, rows
from benchmarks.refreshes import SETTLED, SHAPES, WAYS, quality, side
from benchmarks.report import Report
from curveball_fused.backends.reference import bases as reference
from curveball_fused.backends.scalars import SCALARS
from curveball_fused.preconditioners import Preconditioner, fresh_state
from tests.gpu.device import BACKENDS, DEVICE, launches

TURNS = 3
LARGEST = reference.LARGEST_STACKED
ALONE = "each alone"


@pytest.mark.parametrize("name", LARGE)
def test_step(name: str, report: Report) -> None:
    case, half = LARGE[name], torch.bfloat16
    with DEVICE:  # where the networks and data are made
        steps = {ADAMW: adamw(case, half)}
        steps |= {backend: kronecker(case, half, backend) for backend in BACKENDS}
        steps |= {"graphed": graphed_kronecker(case, half)}
    table = rows(steps, DEVICE, TURNS)
    note = (
        f"Batch {case.batch}, bfloat16 by autocast; {TURNS} turns of {TURN} steps, of which one solves, by events. "
        "ms: the mean step. AdamW: zero_grad, forward, backward, step, not graphed. The others: "
        'preconditioner="kronecker" with defaults, by backend, and by `make_graphed_step`.'
    )
    report.add(f"step in the Kronecker metric, {case.name}", note, table)
    assert all(step().isfinite() for step in steps.values())


@pytest.mark.parametrize("name", LARGE)
def test_stacks(name: str, report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    """Direction and statistics alone, with stacks of larger and larger matrices."""
    with torch.device("meta"):
        shapes = [p.shape for p in LARGE[name].build().parameters()]
    r = [torch.empty(shape, device=DEVICE).normal_() for shape in shapes]
    scalars = torch.ones(len(SCALARS), dtype=torch.float64, device=DEVICE)
    metric = Preconditioner([fresh_state(r_i) for r_i in r], scalars, "auto", gather=True)

    def both(largest: int) -> Tensor:
        monkeypatch.setattr(reference, "LARGEST_STACKED", largest)
        return metric.learn(metric.direction(r), scalars)

    calls: dict[str, Call] = {ALONE: partial(both, 0)}
    calls |= {f"up to 2^{i}": partial(both, 2**i) for i in (16, 18, 20, 22)}
    seconds, errors, marks = in_turn(calls)
    table: list[dict[str, Any]] = []
    for name_, call in calls.items():
        row: dict[str, Any] = {"": name_, "ms": errors.get(name_)}
        row |= {f"/ {ALONE}": None, "launches": None, "MiB": None}
        if name_ in seconds:
            spread = Spread.of(seconds[name_])
            row["ms"] = as_text(Spread(1e3 * spread.median, 1e3 * spread.p20, 1e3 * spread.p80)) + marks[name_]
            row["launches"], row["MiB"] = len(launches(call)), _allocated(call)
            if ALONE in seconds:
                row[f"/ {ALONE}"] = as_text(ratio(seconds[name_], seconds[ALONE]))
        table.append(row)
    note = (
        f"u = P⁻¹r, v and all factors of {len(r)} parameters of float32, by the elements of the largest matrix that "
        f"goes into a stack, in the package {LARGEST:,}. MiB: the most that a call allocates. Median (20th-80th "
        f"percentile) of {ROUNDS} rounds, device time. {MARK}"
    )
    report.add(f"the Kronecker metric by stacks, {LARGE[name].name}", note, table)
    assert not errors, errors


def _allocated(call: Call) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20)


@pytest.mark.parametrize(("count", "n"), SHAPES)
def test_refresh(count: int, n: int, report: Report) -> None:
    factor, basis = side(count, n, DEVICE, settled=True)
    calls: dict[str, Call] = {name: partial(way, factor, basis) for name, way in WAYS.items()}
    seconds, errors, marks = in_turn(calls)
    table: list[dict[str, Any]] = []
    for name, way in WAYS.items():
        row: dict[str, Any] = {
            "": name,
            "µs": errors.get(name),
            "/ QR": None,
            "error of QᵀQ": None,
            "off diagonal": None,
        }
        if name in seconds:
            row["µs"] = f"{1e6 * Spread.of(seconds[name]).median:.0f}{marks[name]}"
            row["/ QR"] = as_text(ratio(seconds[name], seconds["QR"])) if "QR" in seconds else None
            row["error of QᵀQ"], row["off diagonal"] = quality(way, count, n, DEVICE)
        table.append(row)
    note = (
        f"{count} matrices of {n} x {n} at once, float32; medians. Error of QᵀQ: its largest entry over {SETTLED} "
        "refreshes from the identity. Off diagonal: the norm of what QᵀFQ then has there, over that of F; where it "
        f"stays large, the way is no refresh, whatever it costs. {MARK}"
    )
    report.add(f"refresh, {count} of {n} x {n}", note, table)
    assert not errors, errors
