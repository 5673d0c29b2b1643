"""A few training steps in a process of their own; prints the peak of its resident memory in MiB.

    python -m benchmarks.memory_worker <case> <method> <batch> <steps>

No steps: what importing everything takes.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from benchmarks.nets import CASES
from benchmarks.steps import STEPS


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


def main() -> None:
    case, method, batch, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    if steps:
        step = STEPS[method](CASES[case], batch)
        for _ in range(steps):
            loss = step()
        if not torch.isfinite(loss):
            raise RuntimeError(f"{method} diverged on {case}")
    print(peak_mib())


if __name__ == "__main__":
    main()
