"""One process with a batch against two with half of it each, on one thread a process; and what a step sends."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.compare import Spread
from benchmarks.nets import CASES
from benchmarks.report import Report, cores

METHODS = {"AdamW": "AdamW, fused", "published": "CurveBall", "kronecker": 'CurveBall, "kronecker"'}
ROUNDS = 2


@pytest.mark.skipif(cores() < 2, reason="two processes need two cores")
@pytest.mark.parametrize("name", ["mlp", "gpt", "basic_bn"])
def test_data_parallel(name: str, report: Report) -> None:
    net, _, _ = CASES[name].make()
    gradient = sum(p.numel() * p.element_size() for p in net.parameters())
    rows = []
    for method, title in METHODS.items():
        one, two = [], []
        for _ in range(ROUNDS):  # in turn, as the machine may be shared
            one.append(_run(name, method, 1))
            two.append(_run(name, method, 2))
        times = [[1e3 * run["median"] for run in runs] for runs in (one, two)]
        speedup = Spread.of([a / b for a, b in zip(*times, strict=True)])
        sent = two[-1]["sent"]
        rows.append(
            {
                "": title,
                "1 process, ms": Spread.of(times[0]).median,
                "2 processes, ms": Spread.of(times[1]).median,
                **speedup.columns("times as fast"),
                "sent, bytes": sent,
                "over the gradient's": None if sent is None else round(sent / gradient, 4),
            }
        )
    note = (
        f"{CASES[name].batch} samples a step, in one process or half of them in each of two, one thread each, gloo; "
        f"means of turns of 20 steps, of which the median; {ROUNDS} runs of each in turn. The gradient has "
        f"{gradient:,} bytes."
    )
    report.add(f"data parallel, {CASES[name].name}", note, rows)


def _run(name: str, method: str, processes: int) -> Any:
    command = [sys.executable, "-m", "benchmarks.replicas", name, method, str(processes)]
    return json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
