"""The evidence of networks: all runs are there, the nets are the method's, all methods train, the tables are right."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.evidence import method_nets, network_tables, network_times, networks
from benchmarks.evidence.network_figure import draw
from benchmarks.evidence.network_tasks import CHOOSING, NETWORKS, WITHOUT_DROPOUT, Network, error
from benchmarks.evidence.networks import FIXED, GRIDS, METHODS, RECORDS, Setting, parts, setting_of, train
from benchmarks.evidence.photographs import CROP, crops
from benchmarks.study.data import Data
from benchmarks.study.nets import cross_entropy, perceptron
from benchmarks.study.tasks import Task


def test_no_run_is_missing() -> None:
    runs = RECORDS.read()
    assert not [key for name in CHOOSING for key in RECORDS.missing(networks.grid_runs(name))]
    assert not [key for name in NETWORKS for key in RECORDS.missing(networks.reported_runs(runs, name))]
    assert {times["network"] for times in network_times.TIMES.read()} == set(WITHOUT_DROPOUT)


def test_the_figure_is_drawn() -> None:
    axes = draw().axes
    assert [len(ax.get_lines()) for ax in axes] == [len(METHODS)] * 2 * len(WITHOUT_DROPOUT)


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("mlp", (784,), 784 * 128 + 128 + 128 * 64 + 64 + 64 * 32 + 32 + 32 * 10 + 10),
        ("basic", (1, 28, 28), 36_410),
        ("basic_bn", (1, 28, 28), 36_410 + 2 * (16 + 16 + 32 + 32)),
        ("resnet18", (1, 28, 28), 176_258),
        ("vgg_f", (3, CROP, CROP), 232_697),
    ],
)
def test_nets_have_the_layout_that_they_are_named_after(name: str, shape: tuple[int, ...], parameters: int) -> None:
    net = NETWORKS[name].task.make(0)
    classes = 25 if name == "vgg_f" else 10
    assert net(torch.randn(2, *shape)).shape == (2, classes)
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_dropout_adds_no_weights_and_is_off_where_errors_are_counted() -> None:
    torch.manual_seed(0)
    net = method_nets.basic(norms=True, dropout=0.3)
    plain = method_nets.basic(norms=True)
    assert [p.shape for p in net.parameters()] == [p.shape for p in plain.parameters()]
    x = torch.randn(8, 1, 28, 28)
    assert not torch.equal(net(x), net(x))
    y = net.eval()(x).argmax(-1)
    assert error(net, x, y) == 0.0 and net.training


def test_crops_to_validate_with_are_of_other_places() -> None:
    """Each pixel of these images is a number of its own."""
    images = [torch.arange(3.0 * 512 * 640).view(3, 512, 640) + i for i in range(2)]
    sets = crops(images, train=30, validation=20)
    assert sets.x.shape == (60, 3, CROP, CROP) and sets.validation_x.shape == (40, 3, CROP, CROP)
    assert sets.y.bincount().tolist() == [30, 30] and sets.validation_y.bincount().tolist() == [20, 20]
    assert not torch.isin(sets.validation_x[:20, 0], sets.x[:30, 0]).any()
    assert sets.x.mean().abs() < 1e-3 and abs(sets.x.std() - 1) < 1e-3


def tiny() -> Network:
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    task = Task("tiny", "reported", lambda: perceptron(5, 8, 2), lambda: Data(x, y, x, y), cross_entropy, 16, 25)
    return Network(task, lambd=1.0)


SETTINGS: dict[str, Setting] = {
    method: {"lr": 0.03} if method in GRIDS else {} if method == networks.KRONECKER else {"lambd": 1.0}
    for method in METHODS
}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains(method: str) -> None:
    found = train(tiny(), method, SETTINGS[method], seed=0)
    assert found["steps"] == 100 and len(found["losses"]) == len(found["errors"]) == 10
    assert found["losses"][-1] < 0.5 * found["losses"][0]
    assert found["errors"][-1] < found["errors"][0]
    assert found["train_error"] == found["validation_error"] < 0.1


def test_a_fixed_damping_stays() -> None:
    training = networks.Training(tiny(), FIXED, {"lambd": 3.0}, seed=0)
    for x, y in tiny().task.batches(0):
        training.step(x, y)
    assert float(training.optimizer.stats()["lambd"]) == 3.0  # type: ignore[attr-defined]


def test_a_run_that_diverges_ends_without_errors() -> None:
    found = train(tiny(), "SGD", {"lr": 1e30}, seed=0)
    assert math.isnan(found["losses"][-1])
    assert found["train_error"] is None and found["validation_error"] is None


def test_losses_of_tenths() -> None:
    assert parts(list(map(float, range(20))), 20) == [0.5 + 2 * i for i in range(10)]
    assert [math.isnan(part) for part in parts([1.0] * 15, 20)] == [False] * 7 + [True] * 3


def run(method: str, seed: int, final: float | None, setting: Setting, wrong: float | None = 0.1) -> dict[str, Any]:
    losses = [*[1.0 - 0.1 * i for i in range(9)], final]
    key = {"network": "mlp", "method": method, "setting": setting, "seed": seed, "steps": 100}
    return key | {"losses": losses, "train_error": wrong, "validation_error": wrong}


def test_the_rate_with_the_lowest_final_loss_is_taken_by_the_network_and_those_like_it() -> None:
    runs = [run("SGD", 0, loss, {"lr": lr}) for lr, loss in ((0.1, None), (0.03, 0.2), (0.01, 0.3))]
    assert setting_of(runs, "mlp", "SGD") == {"lr": 0.03}
    runs = [each | {"network": "basic"} for each in runs]
    assert setting_of(runs, "basic_dropout", "SGD") == {"lr": 0.03}
    assert setting_of([], "basic", FIXED) == {"lambd": 10} and setting_of([], "vgg_f", FIXED) == {"lambd": 1}


@pytest.fixture
def handmade() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All have a loss of 0.1, but Adam diverges with a seed, and the Kronecker metric has 0.05 at twice the time."""
    runs = [run(method, 0, 0.1, {"lr": lr}) for method, rates in GRIDS.items() for lr in rates]
    for seed in networks.SEEDS:
        for method in METHODS:
            setting = setting_of(runs, "mlp", method)
            final = 0.05 if method == networks.KRONECKER else None if (method, seed) == ("Adam", 2) else 0.1
            runs.append(run(method, seed, final, setting, wrong=None if final is None else final))
    seconds = {method: {"early": 1.0, "later": 2.0 if method == networks.KRONECKER else 1.0} for method in METHODS}
    return runs, [{"network": "mlp", "turn": network_times.TURN, "seconds": seconds}]


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_tables_of_a_handmade_record(
    handmade: tuple[list[dict[str, Any]], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, times = handmade
    for name in ("NETWORKS", "WITHOUT_DROPOUT", "CHOOSING"):
        whole = getattr(network_tables, name)
        one = {"mlp": whole["mlp"]} if isinstance(whole, dict) else ["mlp"]
        monkeypatch.setattr(network_tables, name, one)
    column = {method: i + 1 for i, method in enumerate(METHODS)}
    errors = rows(network_tables.errors_table(runs))[2]
    assert errors[column[networks.KRONECKER]] == "5.0 / 5.0" and errors[column["SGD"]] == "10.0 / 10.0"
    assert errors[column["Adam"]] == network_tables.DIVERGED
    losses = rows(network_tables.losses_table(runs))[2]
    assert losses[column["SGD"]] == "0.1, 0.1" and losses[column["Adam"]] == "0.1, diverged"
    in_time = rows(network_tables.seconds_table(runs, times))[2]
    assert in_time[column["SGD"]] == "0.1" and in_time[column[networks.KRONECKER]] == "0.5"  # that of step 60
    ahead = {row[0]: row[1:] for row in rows(network_tables.ahead_table(runs, times))[2:]}
    assert ahead[networks.KRONECKER] == ["1 of 1", "0 of 1", "1 of 1"] and ahead[FIXED] == ["0 of 1"] * 3
    assert rows(network_tables.cost_table(times))[2][1:4] == ["1e+03", "2.00", "1.00"]
    grid = rows(network_tables.grid_table(runs))[2]
    assert grid[1] == "**0.1**" and grid[2] == "0.1"


def test_seconds_are_of_early_and_later_steps(handmade: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> None:
    _, times = handmade
    assert network_times.seconds(times, "mlp", networks.KRONECKER, 10) == 10
    assert network_times.seconds(times, "mlp", networks.KRONECKER, 30) == 40


def test_steps_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    network = tiny()
    monkeypatch.setitem(NETWORKS, "tiny", network)

    class Noted(networks.Training):
        def __init__(self, network: Network, method: str, setting: Setting, seed: int) -> None:
            super().__init__(network, method, setting, seed)
            self.method = method

        def step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            order.append(self.method)
            return super().step(x, y)

    monkeypatch.setattr(network_times, "Training", Noted)
    found = network_times.measure("tiny", {method: SETTINGS[method] for method in ("SGD", "Adam")}, turns=3)
    turn = network_times.TURN
    assert order == (["SGD"] * turn + ["Adam"] * turn) * 3
    assert all(times["early"] > 0 and times["later"] > 0 for times in found["seconds"].values())
