"""The CSV file: the figures of the history, each step once, whatever happens between two calls."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch

from curveball_fused import CurveBall, state, write_csv
from curveball_fused.backends.scalars import SCALARS
from tests.helpers.training import advance, small


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    """A history of four steps."""
    monkeypatch.setattr(state, "HISTORY", 4)
    monkeypatch.setitem(state.SHAPES, "history", (4, len(SCALARS)))


def read(path: Path) -> list[dict[str, float]]:
    with open(path, newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def same(rows: list[dict[str, float]], history: dict[str, torch.Tensor]) -> bool:
    expected = [dict(zip(history, row)) for row in zip(*(values.tolist() for values in history.values()))]
    pairs = [(a[k], b[k]) for a, b in zip(rows, expected, strict=True) for k in history]
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in pairs)


def test_has_the_history(tmp_path: Path) -> None:
    net, x, y = small()
    optimizer, path = CurveBall(net.parameters(), lambda_interval=2), tmp_path / "history.csv"
    write_csv(optimizer, path)
    assert read(path) == []
    for steps in (3, 0, 4):
        advance(optimizer, net, x, y, steps) if steps else None
        write_csv(optimizer, path)
        assert same(read(path), optimizer.history())
    assert [row["step"] for row in read(path)] == [1, 2, 3, 4, 5, 6, 7]
    assert path.read_bytes().count(b"step,") == 1


@pytest.mark.usefixtures("four")
def test_what_no_history_holds_any_more_stays_or_is_missing(tmp_path: Path) -> None:
    net, x, y = small()
    optimizer, path = CurveBall(net.parameters()), tmp_path / "history.csv"
    for steps in (3, 3, 5):
        advance(optimizer, net, x, y, steps)
        write_csv(optimizer, path)
    rows = read(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert same(rows[-4:], optimizer.history())


def test_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    net, x, y = small()
    optimizer, path = CurveBall(net.parameters()), tmp_path / "history.csv"
    advance(optimizer, net, x, y, 3)
    checkpoint = optimizer.state_dict()
    resumed = CurveBall(net.parameters())
    resumed.load_state_dict(checkpoint)
    advance(optimizer, net, x, y, 4)
    write_csv(optimizer, path)
    advance(resumed, net, x, y, 2)
    write_csv(resumed, path)
    assert same(read(path), resumed.history()) and len(read(path)) == 5


def test_a_line_that_was_not_finished_is_written_again(tmp_path: Path) -> None:
    net, x, y = small()
    optimizer, path = CurveBall(net.parameters()), tmp_path / "history.csv"
    advance(optimizer, net, x, y, 3)
    write_csv(optimizer, path)
    whole = path.read_bytes()
    for end in (1, 20, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:end])
        write_csv(optimizer, path)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("there", ["another training", "another file", "no lines", "ahead"])
def test_what_is_not_its_own_it_leaves_alone(there: str, tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    net, x, y = small(seed=1)
    other = CurveBall(net.parameters())
    advance(other, net, x, y, 2)
    write_csv(other, path)
    if there == "another file":
        path.write_text("a,b\n1,2\n")
    elif there == "no lines":
        path.write_text("notes")
    elif there == "ahead":
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(lines[0] + b"900," + lines[1].partition(b",")[2])
    before = path.read_bytes()
    net, x, y = small()
    optimizer = CurveBall(net.parameters())
    advance(optimizer, net, x, y, 5)
    with pytest.raises(ValueError, match="give another path"):
        write_csv(optimizer, path)
    assert path.read_bytes() == before
