"""`python -m curveball_fused explain`."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

TASK = """
import torch, torch.nn.functional as F
from neighbor import width

def task():
    net, x, y = torch.nn.Linear(width, 3), torch.randn(5, width), torch.tensor([0, 1, 2, 0, 1])
    return lambda: net(x), lambda outputs: F.cross_entropy(outputs, y), net.parameters()

def half():
    return task()[:2]
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.py").write_text(TASK)
    (tmp_path / "neighbor.py").write_text("width = 4")
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_command_line(job: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    line = [sys.executable, "-m", "curveball_fused", "explain"]
    for target in ("job.py:task", "job:task"):
        done = subprocess.run([*line, target], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert 'curvature="auto" takes "linearize"' in done.stdout and "Loss: F.cross_entropy" in done.stdout


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("job.py:half", "must return (model_fn, loss_fn, params)"),
        ("job.py:other", "has no function 'other'"),
        ("job.py", "names no function"),
        ("missing.py:task", "there is no file missing.py"),
        ("missing:task", "No module named 'missing'; a file needs its .py"),
    ],
)
def test_wrong_command_lines(
    target: str, words: str, job: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["curveball_fused", "explain", target])
    monkeypatch.setattr("sys.path", list(sys.path))
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("curveball_fused", run_name="__main__")
    assert words in capsys.readouterr().err
