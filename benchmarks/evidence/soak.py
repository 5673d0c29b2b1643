"""Take 10⁵ steps of a tiny net by each method, and write down how much memory the process has, as it goes.

python -m benchmarks.evidence.soak
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.evidence.records import Records
from curveball_fused import CurveBall

STEPS, WARM_UP, SAMPLES = 100_000, 10_000, 10
METHODS: dict[str, dict[str, Any]] = {"published": {}, "kronecker": {"preconditioner": "kronecker"}}
RECORDS = Records("soak", ("method", "steps"))
BOUND = 4.0  # MiB by which the memory may grow after the warm-up: an object kept by each step would take more


def resident() -> float:
    """Return the resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def soak(options: dict[str, Any], steps: int, warm_up: int) -> dict[str, Any]:
    """Return the memory after the warm-up, and from there on in equal distances, with the first and the last loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    x, y = torch.randn(8, 2), torch.randn(8, 1)
    optimizer = CurveBall(model.parameters(), **options)
    memory, losses = [], []
    start = time.monotonic()
    for step in range(1, steps + 1):
        loss, _ = optimizer.step(lambda: model(x), lambda out: F.mse_loss(out, y))
        if step == 1 or step == steps:
            losses.append(loss.item())
        if step >= warm_up and (step - warm_up) % ((steps - warm_up) // SAMPLES) == 0:
            memory.append(round(resident(), 2))
    return {"memory": memory, "losses": losses, "seconds": round(time.monotonic() - start, 1)}


def main() -> None:
    torch.set_num_threads(1)
    for run in RECORDS.missing({"method": name, "steps": STEPS} for name in METHODS):
        made = soak(METHODS[run["method"]], STEPS, WARM_UP)
        grown = made["memory"][-1] - made["memory"][0]
        RECORDS.add({**run, "warm_up": WARM_UP, **made, "grown": round(grown, 2), "bound": BOUND})


if __name__ == "__main__":
    main()
