"""The kernels that cross the parameters: on 10⁹ of them, on ResNet-50's, in bfloat16, and against torch.compile."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.compare import Spread
from benchmarks.gpu.measure import BANDWIDTH_BAR, MARK, ROUNDS, Call, as_text, bandwidth_table, in_turn, ratio
from benchmarks.report import Report, bar
from curveball_fused import backends, ops
from curveball_fused.backends.reference import parameters as reference
from curveball_fused.backends.scalars import DIRECTION_DAMPING, SCALARS
from tests.gpu.device import BACKENDS, DEVICE, launches, resnet50, to_device

COUNT, SIZE = 256, 3_906_250  # 10⁹ elements
SGD, ADAM, COMPILED = "torch.optim.SGD, fused", "torch.optim.Adam, fused", "torch.compile"
# By these, the numbers stay in range however often the update is repeated.
BETA, RHO, LAMBD, LR = 1e-3, 0.9, 0.1, 1e-3
LAUNCHES_BAR = 3
WALL_STEPS = 50


def tensors(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype, device=DEVICE).normal_() for shape in shapes]


def scalars() -> Tensor:
    values = to_device(BETA, RHO, LAMBD, *[0.0] * (len(SCALARS) - 3))
    values[DIRECTION_DAMPING] = LAMBD
    return values


def sgd(w: list[Tensor], z: list[Tensor], r: list[Tensor]) -> torch.optim.SGD:
    """Fused momentum SGD on the tensors given: parameters, momentum buffers and gradients."""
    params = [torch.nn.Parameter(w_i) for w_i in w]
    optimizer = torch.optim.SGD(params, lr=1e-6, momentum=RHO, fused=True)
    for p, z_i, r_i in zip(params, z, r, strict=True):
        p.grad = r_i
        optimizer.state[p]["momentum_buffer"] = z_i
    return optimizer


def adam(w: list[Tensor], z: list[Tensor], v: list[Tensor], r: list[Tensor]) -> torch.optim.Adam:
    """Fused Adam on the tensors given: parameters, averages of gradients and of their squares, and gradients."""
    params = [torch.nn.Parameter(w_i) for w_i in w]
    optimizer = torch.optim.Adam(params, lr=1e-6, fused=True)
    for p, z_i, v_i, r_i in zip(params, z, v, r, strict=True):
        p.grad = r_i
        step = torch.zeros((), device=DEVICE)
        optimizer.state[p] |= {"step": step, "exp_avg": z_i, "exp_avg_sq": v_i}
    return optimizer


def update(w: list[Tensor], z: list[Tensor], r: list[Tensor], given: Tensor, backend: str) -> Tensor:
    return ops.update_groups_(
        w, z, r, given, group_sizes=[len(w)], lr=[LR], weight_decay=[0.0], backend=backend
    )  # fmt: skip


def test_update(report: Report, copy: Call) -> None:
    shapes, given = [(SIZE,)] * COUNT, scalars()
    w, z, r = (tensors(shapes, torch.float32) for _ in range(3))
    calls: dict[str, Call] = {SGD: sgd(w, z, r).step}
    calls |= {name: lambda b=name: update(w, z, r, given, b) for name in (*BACKENDS, "torch")}
    note = f"z ← (ρ-βλ) z - βr, w ← w + lr z, and z·z, which SGD does not compute: 10⁹ float32 in {COUNT} tensors."
    bandwidth_table(report, "update_, 10⁹ float32", note, copy, calls, 20.0 * COUNT * SIZE, BANDWIDTH_BAR, SGD, 1.05)


def test_dots(report: Report, copy: Call) -> None:
    z, r = (tensors([(SIZE,)] * COUNT, torch.float32) for _ in range(2))

    def torch_dot() -> Tensor:
        return torch.stack([torch.dot(a, b) for a, b in zip(z, r, strict=True)]).sum()

    calls: dict[str, Call] = {"torch.dot, one sum": torch_dot}
    calls |= {name: lambda b=name: ops.dots(z, r, backend=b) for name in (*BACKENDS, "torch")}
    note = f"z·z, z·r, r·r in double precision: 10⁹ float32 in {COUNT} tensors. torch.dot: one sum, in float32."
    traffic, baseline = 8.0 * COUNT * SIZE, "torch.dot, one sum"
    bandwidth_table(report, "dots, 10⁹ float32", note, copy, calls, traffic, BANDWIDTH_BAR, baseline)


def test_low_precision(report: Report, copy: Call) -> None:
    shapes, given = [(SIZE,)] * COUNT, scalars()
    w, r, z = tensors(shapes, torch.bfloat16), tensors(shapes, torch.bfloat16), tensors(shapes, torch.float32)
    calls: dict[str, Call] = {name: lambda b=name: update(w, z, r, given, b) for name in ("torch", *BACKENDS)}
    note = f"10⁹ bfloat16 w and r with float32 z in {COUNT} tensors."
    bandwidth_table(report, "update_, 10⁹ bfloat16", note, copy, calls, 14.0 * COUNT * SIZE, BANDWIDTH_BAR, "torch")
    calls = {name: lambda b=name: ops.dots(z, r, backend=b) for name in ("torch", *BACKENDS)}
    bandwidth_table(report, "dots, 10⁹ bfloat16", note, copy, calls, 6.0 * COUNT * SIZE, BANDWIDTH_BAR, "torch")


@pytest.mark.parametrize("kind", ["v moves", "v stays", "v moves, no z", "v moves, bfloat16 r"])
def test_precondition(kind: str, report: Report, copy: Call) -> None:
    """Into u that are there: making them takes the host's time."""
    shapes, r_dtype = [(SIZE,)] * COUNT, torch.bfloat16 if "bfloat16" in kind else torch.float32
    u, v, z = (tensors(shapes, torch.float32) for _ in range(3))
    r, weight = tensors(shapes, r_dtype), to_device(0.5)[0]
    for v_i in v:
        v_i.square_()
    has_z, taken = "no z" not in kind, None if "stays" in kind else to_device(BETA, RHO)

    def precondition(backend: str) -> Tensor:
        kernels = backends.preconditioner_kernels(backend)
        sums: Tensor = kernels.precondition_(u, v, r, z if has_z else [], weight, 0.999, 1e-8, taken)
        return sums

    calls: dict[str, Call] = {name: lambda b=name: precondition(b) for name in (*BACKENDS, "torch")}
    if kind == "v moves":
        calls = {ADAM: adam(u, z, v, r).step, **calls}
    baseline = ADAM if kind == "v moves" else "torch"
    # v, r and z are read, u and v written.
    traffic = (4.0 + r_dtype.itemsize + 4.0 * has_z + 4.0 + 4.0 * (taken is not None)) * COUNT * SIZE
    note = (
        f"u ← r / p with p = √(v / weight) + ε, {kind}; and {'r·u, z·Pz, z·r' if has_z else 'r·u'}, in double "
        f"precision: 10⁹ numbers in {COUNT} tensors. A step of Adam reads and writes 28 bytes a number."
    )
    bandwidth_table(report, f"precondition_, 10⁹, {kind}", note, copy, calls, traffic, BANDWIDTH_BAR, baseline)


def test_small_list(report: Report) -> None:
    """All parameter arithmetic of a step on 161 tensors."""
    w, z, r = (tensors(resnet50(), torch.float32) for _ in range(3))
    given, products, loss = scalars(), to_device(-0.5, 1.5, 0.7, 0.3, 2.0), to_device(1.25)[0]

    def solve_and_update(backend: str) -> Tensor:
        solved = ops.solve(given, loss, products, beta=BETA, rho=RHO, lr=LR, backend=backend)
        return update(w, z, r, solved, backend)

    calls: dict[str, Call] = {SGD: sgd(w, z, r).step}
    calls |= {name: lambda b=name: solve_and_update(b) for name in (*BACKENDS, "torch")}
    seconds, errors, marks = in_turn(calls)
    walls: dict[str, list[float]] = {name: [] for name in seconds}
    for _ in range(ROUNDS // 2):
        for name, own in walls.items():
            own.append(_wall(calls[name]))
    rows: list[dict[str, Any]] = []
    for name, call in calls.items():
        row: dict[str, Any] = {"": name, "device µs": errors.get(name), "/ SGD": None, "wall µs": None}
        row |= {"wall / SGD": None, "launches": None, "bar": None}
        if name in seconds:
            try:
                found = len(launches(call))
            except RuntimeError as error:
                found, errors[name] = None, f"launches: {error}"
            row |= {"device µs": f"{1e6 * Spread.of(seconds[name]).median:.1f}{marks[name]}"}
            row |= {"wall µs": round(1e6 * Spread.of(walls[name]).median, 1), "launches": found}
            if SGD in seconds:
                row |= {"/ SGD": as_text(ratio(seconds[name], seconds[SGD]))}
                row |= {"wall / SGD": as_text(ratio(walls[name], walls[SGD]))}
            if name in BACKENDS and found is not None:
                row |= {"bar": f"launches {bar(Spread.of([float(found)]), LAUNCHES_BAR)}"}
        rows.append(row)
    note = (
        "solve and update_ on ResNet-50's 161 tensors, 25.6 million float32, against the step of SGD; medians. Device: "
        f"behind a delay in which the host queues the work. Wall: {WALL_STEPS} calls, then a wait. Launches: kernels, "
        f"copies and fills of one call. {MARK}"
    )
    report.add("solve and update_, 161 tensors", note, rows)
    assert not errors, errors


def _wall(call: Call) -> float:
    """Seconds of one of many calls in a row."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(WALL_STEPS):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / WALL_STEPS


@pytest.mark.parametrize("name", ["update_", "dots"])
def test_against_compiled(name: str, report: Report, copy: Call) -> None:
    """On few tensors, as compiling takes time with each of them."""
    shapes, given = [(2**25,)] * 8, scalars()
    w, z, r = (tensors(shapes, torch.float32) for _ in range(3))
    rate = to_device(LR)
    compiled_update = torch.compile(reference.update_, dynamic=False)
    compiled_dots = torch.compile(reference.dots, dynamic=False)

    def compiled() -> Tensor:
        with torch.no_grad():
            if name == "dots":
                return compiled_dots(z, r)
            return compiled_update(w, z, r, given, [len(w)], [LR], [0.0], rate)

    def ours(backend: str) -> Tensor:
        return ops.dots(z, r, backend=backend) if name == "dots" else update(w, z, r, given, backend)

    calls: dict[str, Call] = {COMPILED: compiled, **{b: lambda b=b: ours(b) for b in BACKENDS}}
    note = f"{name} on 8 tensors of 2²⁵ float32, against torch.compile of `reference.{name}`."
    traffic = (8.0 if name == "dots" else 20.0) * 2**28
    bandwidth_table(report, f"{name} against torch.compile", note, copy, calls, traffic, BANDWIDTH_BAR, COMPILED, 1.0)
