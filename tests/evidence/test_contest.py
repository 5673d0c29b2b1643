"""The contest: targets, times and scores are what the rules say, and every contestant trains."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.evidence.contest import __main__ as contest
from benchmarks.evidence.contest import times, trials
from benchmarks.evidence.contest.contestants import ADAMW, CONTESTANTS, KRONECKER, KRONECKER_COSINE, PUBLISHED
from benchmarks.evidence.contest.figure import draw
from benchmarks.evidence.contest.score import RECORDS, SEEDS, median_times, profile, ratios, score, time_to_target
from benchmarks.evidence.contest.workloads import WORKLOADS, Workload
from benchmarks.study.data import Data, digits
from benchmarks.study.nets import cross_entropy, perceptron
from benchmarks.study.tasks import TASKS, Task

AVAILABLE = [name for name, contestant in CONTESTANTS.items() if contestant.installed]


def timed(workload: str, contestant: str, early: float, later: float) -> dict[str, Any]:
    seconds = {"first_turn_seconds_per_step": early, "later_median_seconds_per_step": later}
    return {"workload": workload, "contestant": contestant, **seconds}


def run_of(contestant: str, losses: list[list[float | None]], workload: str = "lenet") -> dict[str, Any]:
    return {"workload": workload, "contestant": contestant, "losses": losses, "target": 0.5}


# LeNet's budget has 500 steps: 500 seconds of AdamW.
TIMES = {
    ("lenet", "AdamW"): timed("lenet", "AdamW", 1.0, 1.0),
    ("lenet", "SOAP"): timed("lenet", "SOAP", 6.0, 2.0),
}


def test_the_time_to_the_target_is_that_of_the_first_evaluation_there() -> None:
    assert time_to_target(run_of("AdamW", [[100, 0.9], [200, 0.5], [300, 0.7]]), TIMES) == pytest.approx(200 / 500)
    dearer = (20 * 6 + 80 * 2) / 500
    assert time_to_target(run_of("SOAP", [[100, 0.4]]), TIMES) == pytest.approx(dearer)


def test_a_target_that_is_never_reached_or_too_late_takes_for_ever() -> None:
    assert time_to_target(run_of("AdamW", [[100, 0.9], [200, None]]), TIMES) == math.inf
    assert time_to_target(run_of("AdamW", []), TIMES) == math.inf
    assert time_to_target(run_of("AdamW", [[751, 0.4]]), TIMES) == math.inf


def test_as_many_steps_are_planned_as_take_the_share() -> None:
    assert times.steps_within(TIMES, "lenet", "AdamW", 1.45) == 725
    steps = times.steps_within(TIMES, "lenet", "SOAP", 1.45)
    assert times.share_of_budget(TIMES, "lenet", "SOAP", steps) <= 1.45
    assert times.share_of_budget(TIMES, "lenet", "SOAP", steps + 1) > 1.45


def test_two_of_three_seeds_must_reach_the_target() -> None:
    reached = [run_of("AdamW", [[steps, 0.5]]) for steps in (100, 300)]
    missed = run_of("AdamW", [[100, 0.9]])
    assert median_times([*reached, missed], TIMES) == {"lenet": {"AdamW": 300 / 500}}
    assert median_times([reached[0], missed, missed], TIMES) == {"lenet": {"AdamW": math.inf}}


def test_profile_and_score_of_an_example() -> None:
    medians = {
        "one": {"a": 0.2, "b": 0.3, "c": math.inf},
        "two": {"a": 1.0, "b": 0.4, "c": 0.8},
        "three": {"a": math.inf, "b": math.inf, "c": math.inf},  # counts against all
        "four": {"a": 0.5, "b": 0.1},  # c has not entered
    }
    assert ratios(medians, "a") == pytest.approx([1, 2.5, math.inf, 5])
    assert ratios(medians, "b") == pytest.approx([1.5, 1, math.inf, 1])
    assert ratios(medians, "c") == pytest.approx([math.inf, 2, math.inf, math.inf])
    assert [profile(ratios(medians, "a"), tau) for tau in (1, 2.5, 5)] == [0.25, 0.5, 0.75]
    assert score(ratios(medians, "a")) == pytest.approx((3 + 1.5) / 3 / 4)  # above 4 nothing is gained
    assert score(ratios(medians, "b")) == pytest.approx((2.5 + 3 + 3) / 3 / 4)


def test_the_score_is_the_integral_of_the_profile() -> None:
    found = [1.0, 1.7, 3.2, 5.0, math.inf]
    taus = torch.linspace(1, 4, 30001).tolist()
    assert score(found) == pytest.approx(sum(profile(found, tau) for tau in taus) / len(taus), abs=1e-3)


def test_the_target_is_the_best_median_of_the_best_trials() -> None:
    def made(optimizer: str, trial: int, seed: int, loss: float | None) -> dict[str, Any]:
        own = {"workload": "mlp", "optimizer": optimizer, "trial": trial, "seed": seed}
        return own | {"validation_loss": loss}

    records = []
    for optimizer, level in zip(trials.RANGES, (0.5, 0.4, 0.3, 0.6)):
        records += [made(optimizer, 0, trials.TRIAL_SEED, None), made(optimizer, 1, trials.TRIAL_SEED, level - 0.1)]
        fresh = zip(trials.FRESH_SEEDS, (level + 0.2, level, None))
        records += [made(optimizer, 1, seed, loss) for seed, loss in fresh]
    assert trials.best_trial(records, "mlp", "AdamW")["trial"] == 1
    assert trials.target(records, "mlp") == pytest.approx(0.5)  # 0.3 + 0.2, between 0.3 and infinity


def test_trials_are_drawn_within_their_ranges_and_the_same_again() -> None:
    for optimizer, ranges in trials.RANGES.items():
        drawn = [trials.setting_of(optimizer, trial) for trial in range(trials.TRIALS)]
        assert drawn == [trials.setting_of(optimizer, trial) for trial in range(trials.TRIALS)]
        for name, (low, high) in ranges.items():
            values = [setting[name] for setting in drawn]
            assert low <= min(values) < (low * high) ** 0.5 < max(values) <= high


def test_the_rate_rises_and_then_falls_to_nothing() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = trials.warm_up_and_cosine(optimizer, 100)
    rates = []
    for _ in range(101):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[100] == pytest.approx(0)


def test_no_setting_was_chosen_on_these_tasks() -> None:
    assert len(WORKLOADS) == 8
    chosen_on = [task.build for task in TASKS.values() if task.half == "chosen"]
    assert not any(workload.task.build in chosen_on for workload in WORKLOADS.values())


def tiny(batch: int | None) -> Workload:
    """Digits: classes in batches, or with a full batch one pixel of the others."""
    data = digits()
    x, validation_x = data.x.flatten(1), data.validation_x.flatten(1)
    if batch:
        sets = Data(x, data.y, validation_x, data.validation_y)
        task = Task("", "reported", lambda: perceptron(64, 8, 10), lambda: sets, cross_entropy, batch, 1)
    else:
        sets = Data(x, x[:, 9:10], validation_x, validation_x[:, 9:10])
        task = Task("", "reported", _tanh_net, lambda: sets, F.mse_loss, None, 1)
    return Workload("tiny", "", task, 100)


def _tanh_net() -> nn.Module:
    return perceptron(64, 8, 1, activation=nn.Tanh)


ENTRIES = [(name, batch) for name in AVAILABLE for batch in (64, None) if CONTESTANTS[name].enters(tiny(batch))]


@pytest.mark.parametrize(("name", "batch"), ENTRIES)
def test_each_contestant_trains(name: str, batch: int | None) -> None:
    workload = tiny(batch)
    training = CONTESTANTS[name].start(workload, workload.task.make(0), 30)
    x, y = next(workload.batches(0, 1))
    before = training.loss(x, y).item()
    taken = [training.step(x, y) for _ in range(30)]
    assert all(count >= 1 for count in taken)
    assert training.loss(x, y).item() < before
    assert math.isfinite(training.validation_loss())


def test_no_run_is_missing() -> None:
    runs = [{"workload": w, "contestant": n, "seed": s} for s in SEEDS for w in WORKLOADS for n in CONTESTANTS]
    entered = [r for r in runs if CONTESTANTS[r["contestant"]].enters(WORKLOADS[r["workload"]])]
    assert not list(RECORDS.missing(entered))
    assert {(r["workload"], r["contestant"]) for r in entered} == set(times.read())


def test_all_runs_had_the_targets_of_the_trials() -> None:
    made = trials.RECORDS.read()
    targets = {workload: trials.target(made, workload) for workload in WORKLOADS}
    assert all(run["target"] == targets[run["workload"]] for run in RECORDS.read())


def test_the_best_rates_are_larger_than_the_contestant_s() -> None:
    """As the page says."""
    made = trials.RECORDS.read()
    assert all(trials.best_trial(made, name, "AdamW")["setting"]["lr"] > 1e-3 for name in WORKLOADS)


def test_who_reaches_what() -> None:
    """As the page says."""
    medians = median_times(RECORDS.read(), times.read())
    reached = {name: {w for w, own in medians.items() if own.get(name, math.inf) < math.inf} for name in CONTESTANTS}
    assert max(reached, key=lambda name: len(reached[name])) == KRONECKER
    assert len(reached[KRONECKER_COSINE]) == len(reached[KRONECKER]) - 1
    assert not reached[PUBLISHED] and not reached[ADAMW]
    assert set().union(*reached.values()) == set(WORKLOADS) - {"teacher", "burgers"}
    assert {name for name in CONTESTANTS if "mlp" in reached[name]} == {"Muon + AdamW", "Schedule-Free AdamW"}
    assert min(medians["friedman"], key=lambda name: medians["friedman"][name]) == "Levenberg-Marquardt"
    assert 2.5 < times.relative_cost(times.read(), "mlp", KRONECKER) < 3.5


def test_a_run_ends_at_its_target() -> None:
    found = contest.train("friedman", "AdamW", 0, steps=80, target=0.8)["losses"]
    assert found[-1][1] <= 0.8 < found[-2][1] and found[-1][0] < 80


def test_the_figure_is_drawn() -> None:
    left, right = draw().axes
    assert len(left.get_lines()) > 1 and len(right.patches) == len(CONTESTANTS)
