"""The evidence of robustness: the page has what the raw data says, and the random nets are what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.evidence.random_problems import FAMILIES, random_problem
from benchmarks.evidence.records import Records
from benchmarks.evidence.robustness import METHODS, NETS, RECORDS, Training, cases, initial_loss, train
from benchmarks.evidence.robustness_figure import draw
from benchmarks.evidence.robustness_tables import Run
from curveball_fused import CurveBall


def test_no_run_is_missing() -> None:
    assert not list(RECORDS.missing(cases()))


def test_the_figure_is_drawn() -> None:
    assert [len(ax.get_lines()) > 1 for ax in draw().axes] == [True] * 4


def test_a_seed_names_a_problem() -> None:
    one, again = random_problem(7), random_problem(7)
    assert one.about == again.about
    assert all(torch.equal(p, q) for p, q in zip(one.make().parameters(), again.make().parameters()))
    for (x, y), (x_again, y_again) in zip(one.batches(2), again.batches(2), strict=True):
        assert torch.equal(x, x_again) and torch.equal(y, y_again)


def test_the_random_nets_differ() -> None:
    abouts = [random_problem(seed).about for seed in range(NETS)]
    assert len(set(abouts)) == NETS
    assert [sum(about.startswith(family) for about in abouts) for family in FAMILIES] == [NETS / len(FAMILIES)] * 5


@pytest.mark.parametrize("seed", range(NETS))
def test_each_random_net_takes_a_step(seed: int) -> None:
    problem = random_problem(seed)
    training = Training(problem, lambda params: CurveBall(params, preconditioner="kronecker"))
    before = [p.detach().clone() for p in training.net.parameters()]
    training.turn([next(problem.batches(1))])
    assert training.losses[0] < 3 * initial_loss(problem)
    assert int(training.optimizer.stats()["skipped_steps"]) == 0
    assert not all(torch.equal(p, q) for p, q in zip(training.net.parameters(), before))


def test_all_methods_of_a_net_train_on_the_same_batches() -> None:
    found = train(random_problem(5), METHODS, epochs=1)
    assert list(found["runs"]) == list(METHODS)
    assert all(
        len(run["losses"]) == 1 and run["losses"][0] < 2 * found["initial_loss"] for run in found["runs"].values()
    )


def run_of(losses: list[float | None], initial: float = 1.0) -> Run:
    """Four steps an epoch; four steps of 2 seconds, and then of 1 second."""
    own = {"losses": losses, "first_turn_seconds_per_step": 2.0, "later_median_seconds_per_step": 1.0}
    return Run({"steps_per_epoch": 4, "turn": 4, "initial_loss": initial}, own)


def test_the_loss_after_a_time_is_that_of_the_epoch_which_ends_then() -> None:
    run = run_of([0.8, 0.4, 0.2])
    assert run.seconds == 16
    assert [run.loss_after(seconds) for seconds in (4, 8, 10, 12, 16)] == pytest.approx([0.8, 0.8, 0.6, 0.4, 0.2])


def test_a_run_diverges_above_the_first_loss_or_where_it_has_no_number() -> None:
    assert run_of([0.5, 1.5]).diverged and run_of([None, 0.5]).diverged and not run_of([1.5, 0.5]).diverged


def test_a_jump_is_tenfold_from_the_lowest_loss_so_far() -> None:
    assert run_of([1.0, 0.01, 0.5, 0.02, 0.3]).jump == (0.01, 0.5) and run_of([1.0, 0.1, 0.9, 0.05]).jump is None


def test_a_loss_without_a_number_is_kept_as_none(tmp_path: Path) -> None:
    records = Records("some", ("case",), tmp_path)
    records.add({"case": "net 0", "runs": {"SGD": {"losses": [1.0, float("nan")]}}})
    assert records.read()[0]["runs"]["SGD"]["losses"] == [1.0, None]
