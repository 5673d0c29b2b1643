"""The program of docs/monitoring.md runs as it stands there."""

from __future__ import annotations

import re
import sys
import types
import warnings
from pathlib import Path
from typing import ClassVar

import pytest

from curveball_fused import TrainingWarning

PAGE = Path(__file__).parents[2] / "docs" / "monitoring.md"


class SummaryWriter:
    """Stands for TensorBoard's where that is not installed."""

    tags: ClassVar[set[str]] = set()

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.tags.add(tag)


def test_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("matplotlib", "sklearn"):
        pytest.importorskip(module)
    tensorboard = types.ModuleType("torch.utils.tensorboard")
    tensorboard.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.chdir(tmp_path)
    (program, *_) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        exec(program.replace("range(20)", "range(2)"), {})
    assert (tmp_path / "history.png").stat().st_size > 10_000
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 1 + 2 * 15
    assert "curveball/loss" in SummaryWriter.tags
