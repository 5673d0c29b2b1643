"""The picture: what it shows of a history, and where it may come from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from curveball_fused import CurveBall, plot_history, write_csv
from tests.helpers.training import advance, small

Figure = pytest.importorskip("matplotlib.figure").Figure
NAMES = ["loss", "lambd", "beta", "rho", "ratio"]


@pytest.fixture
def optimizer() -> CurveBall:
    """Twenty steps, of which the first and the seventh were skipped."""
    net, x, y = small()
    made = CurveBall(net.parameters(), lambd=2.0, lambda_max=2.0, lambda_low=0.4)
    for i in range(20):
        inputs = x * torch.nan if i in (0, 6) else x
        made.step(lambda: net(inputs), lambda out: F.cross_entropy(out, y))
    return made


def curves(axes: Any) -> list[Any]:
    return [line for line in axes.lines if len(line.get_xdata()) == 20]


def heights(axes: Any) -> list[float]:
    """Those of the dashed lines."""
    return [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]


@pytest.mark.filterwarnings("ignore::curveball_fused.TrainingWarning")
def test_shows_the_figures_the_limits_and_what_was_skipped(optimizer: CurveBall, tmp_path: Path) -> None:
    figure = plot_history(optimizer)
    history = optimizer.history()
    for axes, name in zip(figure.axes, NAMES, strict=True):
        (line, *_) = curves(axes)
        assert line.get_xdata().tolist() == list(range(1, 21))
        expected = history[name].clone()
        expected[[0, 6]] = torch.nan if name in ("loss", "beta", "rho") else expected[[0, 6]]
        torch.testing.assert_close(torch.as_tensor(line.get_ydata()), expected, rtol=0, atol=0, equal_nan=True)
        assert axes.get_yscale() == ("log" if name in ("loss", "lambd", "beta") else "linear")
    loss, lambd, _, rho, ratio = figure.axes
    assert heights(ratio) == [0.4, 1.5] and heights(rho) == [1.0] and heights(lambd) == [2.0] and heights(loss) == []
    assert ratio.get_ylim() == (-1, 4)  # however far away a single γ is
    (crosses,) = [line for line in loss.lines if line.get_marker() == "x"]
    assert torch.as_tensor(crosses.get_xdata()).tolist() == [1, 7]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["2 skipped"]
    figure.savefig(tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 10_000


@pytest.mark.filterwarnings("ignore::curveball_fused.TrainingWarning")
def test_draws_an_optimizer_a_history_and_a_file_alike(optimizer: CurveBall, tmp_path: Path) -> None:
    write_csv(optimizer, tmp_path / "history.csv")
    for source in (optimizer.history(), tmp_path / "history.csv", str(tmp_path / "history.csv")):
        for axes, expected in zip(plot_history(source).axes, plot_history(optimizer).axes):
            for a, b in zip(curves(axes), curves(expected), strict=True):
                pairs = [torch.as_tensor(line.get_ydata()).double() for line in (a, b)]
                torch.testing.assert_close(*pairs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore::curveball_fused.TrainingWarning")
def test_draws_trainings_over_each_other(optimizer: CurveBall) -> None:
    figure = plot_history(optimizer, label="first")
    assert plot_history(optimizer, figure.axes, label="second") is figure
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["first", "first: 2 skipped", "second", "second: 2 skipped"]
    assert len({line.get_color() for line in curves(figure.axes[0])}) == 2


def test_a_loss_that_is_negative_has_no_logarithm() -> None:
    net, x, y = small()
    optimizer = CurveBall(net.parameters(), maximize=True)
    optimizer.step(lambda: net(x), lambda out: -F.cross_entropy(out, y))
    assert plot_history(optimizer).axes[0].get_yscale() == "linear"


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y = small()
    optimizer = CurveBall(net.parameters())
    with pytest.raises(ValueError, match="no steps to draw yet"):
        plot_history(optimizer)
    advance(optimizer, net, x, y)
    with pytest.raises(ValueError, match="axes must be 5, for loss, lambd, beta, rho, ratio; got 2"):
        plot_history(optimizer, plot_history(optimizer).axes[:2])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_history(optimizer)
