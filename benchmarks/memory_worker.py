"""A few training steps in a process of their own: the peaks of its resident memory in MiB, without and with them.

    python -m benchmarks.memory_worker <case> <method> <batch> <steps>

The first is after a step of a tiny net, which imports everything.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from benchmarks.nets import CASES, Case
from benchmarks.optimizers import FROM_PACKAGE, OPTIMIZERS, PACKAGE
from benchmarks.steps import STEPS

_TINY = Case(
    "", lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), lambda n: (torch.randn(n, 2), torch.ones(n).long()), 1
)


def peak_mib() -> float:
    """Peak of this program's resident memory.

    On Linux ru_maxrss is at least what the parent had when it started this process, so where the kernel knows the
    peak of the program alone, that is used.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        scale = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM"))


def peaks(name: str, method: str, batch: int, steps: int) -> tuple[float, float]:
    """What this program prints of `CASES[name]`."""
    command = [sys.executable, "-m", "benchmarks.memory_worker", name, method, str(batch), str(steps)]
    imports, peak = map(float, subprocess.check_output(command, text=True).split())
    return imports, peak


def main() -> None:
    name, method, batch, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    if method in FROM_PACKAGE and find_spec(PACKAGE) is not None:
        import_module(PACKAGE)
    make = (STEPS | OPTIMIZERS)[method]
    make(_TINY, 1)()  # imports what is imported at the first step
    imports = peak_mib()
    step = make(CASES[name], batch)
    for _ in range(steps):
        loss = step()
    if not torch.isfinite(loss):
        raise RuntimeError(f"{method} diverged on {name}")
    print(imports, peak_mib())


if __name__ == "__main__":
    main()
