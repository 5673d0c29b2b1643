"""The demo: what it prints and draws of runs that are given, and a short run of all of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
MODULES = ("demo", "demo_data", "demo_report", "demo_training")


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    for module in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(module)
    monkeypatch.syspath_prepend(EXAMPLES)
    import demo

    yield demo
    for name in MODULES:
        sys.modules.pop(name, None)


def runs_of(demo: ModuleType, final: float) -> dict[str, Any]:
    """Two runs of four steps for each optimizer; half a second a step for the first, a second more for each other."""
    training = sys.modules["demo_training"]
    steps = [0, 2, 4]
    runs: dict[str, Any] = {}
    for i, name in enumerate(demo.OPTIMIZERS):
        stats = {key: [1.0, 0.5, 0.5, 0.25] for key in training.STATS} if name.startswith("CurveBall") else {}
        seconds = [(i + 0.5) * step for step in steps]
        runs[name] = [
            training.Run(steps, seconds, [2.0, 1.0, final * (seed + 1)], [90.0, 10.0, 1.0], stats) for seed in (0, 1)
        ]
    return runs


def test_table_reads_slower_runs_at_the_time_of_the_shortest(demo):
    lines = sys.modules["demo_report"].table(runs_of(demo, final=0.1), epochs=1).splitlines()
    assert lines[0] == (
        "| | train loss, 1 epoch | test error, 1 epoch | train loss, 2.00 s | test error, 2.00 s | time per step |"
    )
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in demo.OPTIMIZERS]
    ends = "0.1500 ± 0.0707 | 1.00 ± 0.00 %"
    assert lines[2].endswith(f" | {ends} | {ends} | 500.0 ± 0.0 ms |")
    for line, milliseconds in zip(lines[3:], (1500, 2500, 3500)):
        assert line.endswith(f" | {ends} | 2.0000 ± 0.0000 | 90.00 ± 0.00 % | {milliseconds}.0 ± 0.0 ms |")


def test_numbers_as_json_give_the_same_table(demo):
    runs, report = runs_of(demo, final=0.1), sys.modules["demo_report"]
    run = sys.modules["demo_training"].Run
    again = {
        name: [run(**each) for each in group] for name, group in json.loads(json.dumps(report.as_json(runs))).items()
    }
    assert report.table(again, epochs=1) == report.table(runs, epochs=1)


@pytest.mark.parametrize("final", [0.1, 1e-6])
def test_names_in_the_picture_do_not_overlap(demo, tmp_path, monkeypatch, final):
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figures: list[Figure] = []
    saved = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), saved(self, *args, **kw)))
    sys.modules["demo_report"].picture(runs_of(demo, final), "title", tmp_path / "demo.png")
    for axes in figures[0].axes[:2]:
        boxes = [Text.get_window_extent(text) for text in axes.texts]  # an annotation's own has its line in it, too
        assert len(boxes) == len(demo.OPTIMIZERS)
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:i])


@pytest.mark.slow
def test_one_epoch_of_all_methods(demo, tmp_path, monkeypatch, capsys):
    picture, runs = tmp_path / "demo.png", tmp_path / "runs.json"
    monkeypatch.setattr(
        sys, "argv", ["demo.py", "--epochs", "1", "--seeds", "1", "--output", str(picture), "--runs", str(runs)]
    )
    threads = torch.get_num_threads()
    demo.main()
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    for name in demo.OPTIMIZERS:
        assert f"\n| {name} | " in printed
    assert "nan" not in printed
    assert picture.stat().st_size > 10_000
    assert {name: len(group) for name, group in json.loads(runs.read_text())["runs"].items()} == dict.fromkeys(
        demo.OPTIMIZERS, 1
    )
