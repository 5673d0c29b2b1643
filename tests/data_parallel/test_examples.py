"""The programs of the documentation: they run, learn, and resume."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def losses(*command: str) -> list[float]:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [float(number) for number in re.findall(r"loss ([\d.]+)", done.stdout)]


def test_accumulation() -> None:
    found = losses("examples/accumulation.py")
    assert len(found) == 5 and found[-1] < 0.5 * found[0]


@pytest.mark.slow
def test_data_parallel_resumes_with_another_number_of_processes(tmp_path: Path) -> None:
    def run(processes: int, epochs: int, checkpoint: str) -> list[float]:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
        options = (f"--checkpoint={tmp_path / checkpoint}", f"--epochs={epochs}")
        return losses(*launcher, "examples/data_parallel.py", *options)

    whole = run(2, 4, "whole.pt")
    assert run(2, 2, "resumed.pt") + run(2, 4, "resumed.pt") == whole
    assert whole[-1] < 0.5 * whole[0]
    run(2, 2, "alone.pt")
    assert run(1, 4, "alone.pt")[-1] == pytest.approx(whole[-1], rel=0.2)  # batch norm has other batches
