"""Warnings: each speaks where it should, what it says to try helps, and a healthy training gives none."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall, TrainingWarning, diagnose, guard
from curveball_fused.cuda_graphs.host_reads import NoHostReads
from tests.helpers import half_nets, nets

HERE = Path(__file__).name
METRICS: dict[str, dict[str, Any]] = {
    "published": {},
    "averaged": dict(average=0.9),
    "kronecker": dict(preconditioner="kronecker"),
}


def trained(name: str, steps: int, **options: Any) -> tuple[CurveBall, float]:
    """The optimizer of a net of tests/helpers/nets.py, full batch, and the loss at the end."""
    net, x = nets.make(name)
    y = torch.randint(0, 3, (len(x),))
    optimizer = CurveBall(net.parameters(), **options)
    for _ in range(steps):
        loss, _ = optimizer.step(lambda: net(x), lambda out: F.cross_entropy(out, y))
    return optimizer, float(loss)


def the_warning(optimizer: CurveBall) -> str:
    """What the history warns of, one thing, told where the history is asked for, and once."""
    with pytest.warns(TrainingWarning) as caught:
        optimizer.history(1)
    assert [Path(w.filename).name for w in caught] == [HERE]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.history()
    text = str(caught[0].message)
    assert diagnose(optimizer) == [text]  # as often as it is asked for
    return text


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", nets.NETS)
def test_a_healthy_training_gives_none(name: str, metric: str) -> None:
    net, x = nets.make(name)
    y = torch.randint(0, 3, (len(x),))
    optimizer = CurveBall(net.parameters(), **METRICS[metric])
    for _ in range(5):
        for _ in range(25):
            optimizer.step(lambda: net(x), lambda out: F.cross_entropy(out, y))
        assert diagnose(optimizer) == []


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["published", "kronecker"])
@pytest.mark.parametrize("name", nets.NETS)
def test_nor_does_one_that_goes_on_when_all_is_learned(name: str, metric: str) -> None:
    assert diagnose(trained(name, 1500, **METRICS[metric])[0]) == []


def batches(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        for rows in torch.randperm(len(x), generator=generator).split(size):
            yield x[rows], y[rows]


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_nor_does_one_on_digits_in_float32(metric: str) -> None:
    """In the Kronecker metric until the loss is zero but for its rounding, of which γ is made then."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, classes = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 6 - 0.8, torch.tensor(classes)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
    optimizer = CurveBall(net.parameters(), **METRICS[metric])
    for i, (inputs, targets) in enumerate(itertools.islice(batches(x, y, 64), 2000)):
        optimizer.step(lambda: net(inputs), lambda out: F.cross_entropy(out, targets))
        if i % 50 == 0:
            assert diagnose(optimizer) == []


def number(text: str, name: str) -> float:
    """The value that a warning says to try."""
    (found,) = re.findall(rf"(?:[Tt]ry|with|begin with) {name}=([\d.e+-]*\d)", text)
    return float(found)


def test_lambda_at_its_upper_bound() -> None:
    options = dict(lambd=1e-3, lambda_max=1e-3)
    optimizer, loss = trained("tied weights", 110, **options)
    text = the_warning(optimizer)
    assert "λ stays at lambda_max=0.001 and would grow further" in text
    better = dict(lambda_max=number(text, "lambda_max"), lambd=number(text, "lambd"))
    assert better == dict(lambda_max=0.1, lambd=0.01)
    assert trained("tied weights", 110, **better)[1] < 0.4 < 5 < loss


def test_lambda_at_its_lower_bound() -> None:
    optimizer, loss = trained("attention", 100, lambda_factor=0.95, lambda_min=0.9)
    text = the_warning(optimizer)
    assert "λ stays at lambda_min=0.9 and would fall further" in text
    lower = number(text, "lambda_min")
    assert lower == 0.009
    assert trained("attention", 100, lambda_factor=0.95, lambda_min=lower)[1] < 0.5 * loss


def test_gamma_below_its_limit() -> None:
    optimizer, loss = trained("tied weights", 110, lambd=1.5e-3)
    text = the_warning(optimizer)
    assert re.search(r"In \d+ of the last 20 adaptations of λ γ, .* was below lambda_low=0.5", text)
    assert "grows by 0.5% each time" in text
    better, better_loss = trained("tied weights", 110, lambd=number(text, "lambd"))
    assert diagnose(better) == [] and better_loss < loss


def noisy(debug: bool = False) -> tuple[CurveBall, Callable[[], None]]:
    """A model that takes its noise from where a step cannot put it back."""
    net, x = nets.make("attention")
    y = torch.randint(0, 3, (len(x),))
    noise = itertools.cycle(torch.randn(1009, len(x), 3, dtype=torch.float64))
    optimizer = CurveBall(net.parameters(), debug=debug)

    def step() -> None:
        optimizer.step(lambda: net(x) + next(noise), lambda out: F.cross_entropy(out, y))

    return optimizer, step


def test_gamma_of_a_model_that_is_another_one_in_each_run() -> None:
    optimizer, step = noisy()
    for _ in range(100):
        step()
    assert "If two runs on one batch do not give the same loss" in the_warning(optimizer)
    _, step = noisy(debug=True)  # which the warning says to try
    with pytest.raises(RuntimeError, match="model_fn, run once more, has a relative error"):
        step()


@pytest.mark.parametrize(
    ("options", "said", "better"),
    [
        (dict(lambd=1e4), "as λ = 8.2e+03 rules: γ = 2.00 is above lambda_high", dict(lambd=80.0)),
        (dict(lambd=1e4, lambda_factor=0.9999), "rules", dict(lambd=1e4, lambda_factor=0.99)),
        (dict(lambd=1e4), "rules", dict(preconditioner="kronecker")),
    ],
    ids=["lambda", "its factor", "metric"],
)
def test_rho_at_its_limit(options: dict[str, Any], said: str, better: dict[str, Any]) -> None:
    optimizer, loss = trained("attention", 200, **options)
    text = the_warning(optimizer)
    assert text.startswith("curveball_fused: In the last 200 steps ρ was at its limit, 1") and said in text
    for name, value in better.items():
        said_so = f'{name}="{value}"' if isinstance(value, str) else f"{name}={value:g}"
        assert said_so in text or options.get(name) == value
    assert trained("attention", 200, **better)[1] < 0.99 * loss


@pytest.mark.parametrize("metric", METRICS)
def test_a_learning_rate_of_another_optimizer(metric: str) -> None:
    optimizer, loss = trained("attention", 200, lr=1e-3, **METRICS[metric])
    assert "the loss fell slowly, as lr=0.001 takes that part of each step: leave it at 1" in the_warning(optimizer)
    assert trained("attention", 200, **METRICS[metric])[1] < 0.9 * loss


def test_a_small_learning_rate_where_rho_is_at_its_limit() -> None:
    slow = dict(lambd=1e4, auto_lambda=False)
    assert "as lr=0.3 takes that part of each step" in the_warning(trained("attention", 200, lr=0.3, **slow)[0])
    assert "ρ was at its limit, 1" in the_warning(trained("attention", 200, lr=0.6, **slow)[0])


def test_rho_that_is_fixed_is_no_sign() -> None:
    assert diagnose(trained("attention", 200, lr=1e-3, rho=1.0, auto_lambda=False)[0]) == []


def test_skipped_for_the_loss() -> None:
    net, x = nets.make("attention")
    y = torch.randint(0, 3, (len(x),))
    optimizer = CurveBall(net.parameters())
    for i in range(6):
        inputs = x * torch.nan if i in (3, 4) else x
        optimizer.step(lambda: net(inputs), lambda out: F.cross_entropy(out, y))
    text = the_warning(optimizer)
    assert "2 of the last 6 steps were skipped. In 2 the loss was not finite: look for NaN in the batch" in text


def test_skipped_ever_since() -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = CurveBall([w])
    for _ in range(12):
        optimizer.step(lambda: w * torch.inf, lambda out: out.square().sum())
    assert "12 of the last 12 steps were skipped, the last 10 of them in a row: nothing moves" in the_warning(optimizer)


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected")
def test_skipped_for_a_derivative() -> None:
    w = nn.Parameter(torch.zeros(3))
    optimizer = CurveBall([w])
    optimizer.step(lambda: w + 0.0, lambda out: out.square().sum().sqrt())
    assert "derivatives were not" in the_warning(optimizer)
    with pytest.raises(RuntimeError, match=r"SqrtBackward|PowBackward"), torch.autograd.detect_anomaly():
        (w + 0.0).square().sum().sqrt().backward()


def test_skipped_by_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard.Comparison, "failed", lambda self: torch.ones((), dtype=torch.bool))
    monkeypatch.setattr(guard, "INTERVAL", 1)
    optimizer, _ = trained("attention", 11)
    text = the_warning(optimizer)
    assert "Jacobian products were not each other's transpose: debug=True, for a few steps" in text
    assert "derivatives" not in text


def in_float16(scale: float, steps: int, **options: Any) -> CurveBall:
    model = half_nets.net()
    optimizer = CurveBall(model.parameters(), **options)
    for _ in range(steps):
        optimizer.step(half_nets.under(torch.float16, model), lambda out: scale * half_nets.cross_entropy(out))
    return optimizer


def test_a_loss_scale_may_look_for_its_size() -> None:
    optimizer = in_float16(1.0, 60)
    rows = optimizer._shared["history"]
    assert diagnose(optimizer) == []
    rows[:9, 0] = torch.nan
    assert diagnose(optimizer) == []
    rows[:10, 0] = torch.nan
    assert (
        "float16 ends at 65504: compute in bfloat16, or begin with shorter steps, by lambd=10" in diagnose(optimizer)[0]
    )


def test_shorter_steps_are_shorter_than_the_metric_has_them() -> None:
    optimizer = in_float16(1.0, 12, preconditioner="kronecker")
    optimizer._shared["history"][:12, 0] = torch.nan
    assert "begin with shorter steps, by lambd=300." in diagnose(optimizer)[0]


def test_each_kind_is_told_once_for_each_optimizer() -> None:
    first, second = (trained("attention", 6, lr=0.1)[0] for _ in range(2))
    for optimizer in (first, second):
        optimizer._shared["history"][2, 0] = torch.nan
        the_warning(optimizer)


def test_no_step_reads_anything() -> None:
    net, x = nets.make("attention")
    y = torch.randint(0, 3, (len(x),))
    optimizer = CurveBall(net.parameters())
    optimizer.step(lambda: net(x), lambda out: F.cross_entropy(out, y))
    optimizer.history()
    with NoHostReads(torch.device("cpu")):
        optimizer.step(lambda: net(x), lambda out: F.cross_entropy(out, y))
