"""A process that is killed while it saves a checkpoint leaves one that loads: the last, or the one before."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# Saves a checkpoint of a few megabytes, again and again; its numbers tell whether all of it is of one time.
SAVE = """
import sys, torch
from pathlib import Path
sys.path.insert(0, "examples")
from curveball_fused import CurveBall
from data_parallel import save

path, how = Path(sys.argv[1]), sys.argv[2]
model = torch.nn.Linear(1000, 1000)
optimizer = CurveBall(model.parameters())
for epoch in range(1, 100000):
    for p in model.parameters():
        p.data.fill_(epoch)
        optimizer.state[p]["z"].fill_(epoch)
    contents = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), epoch=epoch)
    save(path, **contents) if how == "beside" else torch.save(contents, path)
    if epoch == 3:
        print("started", flush=True)
"""


def killed_at(moment: float, path: Path, how: str) -> None:
    """Kill the process that saves, so many seconds after its first checkpoints."""
    with subprocess.Popen([sys.executable, "-c", SAVE, str(path), how], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"started\n"
        time.sleep(moment)
        process.kill()


def is_whole(path: Path) -> bool:
    """Whether the file loads, and all of it is of one epoch."""
    try:
        saved = torch.load(path)
    except (RuntimeError, EOFError, OSError):
        return False
    states = [each["z"] for key, each in saved["optimizer"]["state"].items() if isinstance(key, int)]
    return all(bool((t == saved["epoch"]).all()) for t in [*saved["model"].values(), *states])


@pytest.mark.slow
def test_what_is_left_always_loads(tmp_path: Path) -> None:
    moments = random.Random(0)
    for i in range(8):
        path = tmp_path / f"{i}.pt"
        killed_at(moments.uniform(0.0, 0.2), path, "beside")
        assert is_whole(path)


@pytest.mark.slow
def test_a_torn_checkpoint_is_seen(tmp_path: Path) -> None:
    """Saved in place it is torn in most cases, which shows that the moments above fall into the saving."""
    moments = random.Random(0)
    for i in range(8):
        path = tmp_path / f"{i}.pt"
        killed_at(moments.uniform(0.0, 0.2), path, "in place")
        if not is_whole(path):
            return
    raise AssertionError("no file was torn")
