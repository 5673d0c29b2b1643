"""What is logged: each figure at its step, once."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from curveball_fused import CurveBall, log_to_tensorboard, state
from curveball_fused.backends.scalars import SCALARS
from tests.helpers.trainers import required
from tests.helpers.training import advance, small


class Recorder:
    """Has what SummaryWriter has."""

    def __init__(self) -> None:
        self.logged: dict[str, list[tuple[int, float]]] = defaultdict(list)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert type(value) is float and type(step) is int
        self.logged[tag].append((step, value))


def test_every_step_once_for_each_writer_and_prefix() -> None:
    net, x, y = small()
    optimizer, first, second = CurveBall(net.parameters()), Recorder(), Recorder()
    log_to_tensorboard(optimizer, first)
    for steps in (2, 3):
        advance(optimizer, net, x, y, steps)
        for _ in range(2):
            log_to_tensorboard(optimizer, first)
    log_to_tensorboard(optimizer, second)
    log_to_tensorboard(optimizer, first, prefix="again/")
    history = optimizer.history()
    for name, values in history.items():
        expected = list(zip(range(1, 6), values.tolist()))
        assert name == "step" or first.logged[f"curveball/{name}"] == second.logged[f"curveball/{name}"] == expected
        assert name == "step" or first.logged[f"again/{name}"] == expected
    assert len(second.logged) == len(history) - 1


def test_gamma_only_where_there_is_one() -> None:
    net, x, y = small()
    optimizer, writer = CurveBall(net.parameters(), auto_lambda=False), Recorder()
    advance(optimizer, net, x, y, 2)
    log_to_tensorboard(optimizer, writer)
    assert "curveball/ratio" not in writer.logged and len(writer.logged["curveball/loss"]) == 2


def test_a_folder_is_no_writer() -> None:
    optimizer: Any = CurveBall(small()[0].parameters())
    with pytest.raises(TypeError, match=r"SummaryWriter\(folder\)"):
        log_to_tensorboard(optimizer, "runs")  # type: ignore[arg-type]


def test_steps_that_no_history_holds_any_more_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "HISTORY", 3)
    monkeypatch.setitem(state.SHAPES, "history", (3, len(SCALARS)))
    net, x, y = small()
    optimizer, writer = CurveBall(net.parameters()), Recorder()
    for steps in (2, 5):
        advance(optimizer, net, x, y, steps)
        log_to_tensorboard(optimizer, writer)
    assert [step for step, _ in writer.logged["curveball/loss"]] == [1, 2, 5, 6, 7]


def test_tensorboard_itself(tmp_path: Path) -> None:
    required("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    net, x, y = small()
    optimizer = CurveBall(net.parameters())
    with SummaryWriter(tmp_path) as writer:
        for _ in range(2):
            advance(optimizer, net, x, y, 3)
            log_to_tensorboard(optimizer, writer)
    events: Any = EventAccumulator(str(tmp_path))
    events.Reload()
    read = [(event.step, event.value) for event in events.Scalars("curveball/loss")]
    history = optimizer.history()
    assert read == list(zip(history["step"].tolist(), history["loss"].float().tolist()))


def test_the_package_imports_neither_tensorboard_nor_matplotlib() -> None:
    code = (
        "import sys, curveball_fused as c; c.plot_history, c.write_csv, c.diagnose, c.log_to_tensorboard;"
        "print({'matplotlib', 'tensorboard'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "set()", done.stderr
