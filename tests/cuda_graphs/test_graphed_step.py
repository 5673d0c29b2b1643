"""Graphed steps against ordinary ones, bit for bit, with operators recorded on the CPU in the place of CUDA graphs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from curveball_fused import CurveBall, make_graphed_step
from curveball_fused.cuda_graphs import graphed_step
from tests.helpers import recorded_graph
from tests.helpers.graphed_nets import BATCHES, X, Y, eager, graphed, net
from tests.helpers.training import SETTINGS, assert_equal


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed_step, "Pool", recorded_graph.Pool)
    monkeypatch.setattr(graphed_step, "Capture", recorded_graph.Capture)


def both(
    steps: int,
    change: Callable[[int, CurveBall], None] = lambda step, optimizer: None,
    half: Any = None,
    **options: Any,
) -> list[CurveBall]:
    """Train by ordinary and by graphed steps; assert that they agree in every bit of all that a step changes."""
    results, optimizers = [], []
    for make in (eager, graphed):
        model = net()
        groups = [
            dict(params=model[0].parameters(), weight_decay=0.1),
            dict(params=list(model.parameters())[2:], lr=0.7),
        ]
        optimizer = CurveBall(groups, **options)
        scheduler = CosineAnnealingLR(optimizer, steps)

        def model_fn(x: Tensor, model: nn.Module = model) -> Tensor:
            with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
                return model(x)

        torch.manual_seed(8)
        step = make(optimizer, model_fn)
        seen: list[Tensor] = []
        for i in range(steps):
            change(i, optimizer)
            loss, outputs = step(X[i % BATCHES], Y[i % BATCHES])
            seen += [loss, outputs.clone()]
            scheduler.step()
        results.append([*seen, *model.state_dict().values(), *optimizer.history().values(), torch.get_rng_state()])
        optimizers.append(optimizer)
    assert_equal(*results)
    assert optimizers[0].state_dict()["state"][0]["step"] == steps
    return optimizers


@pytest.mark.parametrize(
    "options",
    [
        {},
        SETTINGS | dict(lambda_interval=3),
        dict(average=0.8, direction="gradient", solve_interval=4, lambda_interval=6),
        dict(curvature="forward", lambda_interval=2),
        dict(curvature="double_backward"),
        dict(auto_lambda=False, rho=0.9, backend="torch"),
        dict(half=torch.bfloat16),
        dict(half=torch.float16, direction="gradient", solve_interval=2),
        dict(preconditioner="kronecker"),
        dict(preconditioner="kronecker", solve_interval=3, half=torch.float16),
    ],
    ids=str,
)
def test_equal_to_ordinary_steps(options: dict[str, Any]) -> None:
    both(60, **options)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "without curvature": lambda out, y: F.relu(1 + out - out.gather(1, y[:, None])).mean(),
    "not convex": lambda out, y: (out.softmax(1).gather(1, y[:, None]) - 2).sin().mean(),
    "log-probabilities": F.nll_loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_equal_to_ordinary_steps_with_another_loss(name: str) -> None:
    results = []
    for as_graph in (False, True):
        model = nn.Sequential(net(), nn.LogSoftmax(1))
        optimizer = CurveBall(model.parameters(), lambd=0.1)
        loss_fn = LOSSES[name]
        torch.manual_seed(8)
        step = make_graphed_step(optimizer, model, loss_fn, (X[0], Y[0])) if as_graph else None
        losses = []
        for i in range(12):
            x, y = X[i % BATCHES], Y[i % BATCHES]
            loss, _ = step(x, y) if step else optimizer.step(lambda: model(x), lambda out: loss_fn(out, y))
            losses.append(loss)
        results.append([*losses, *model.state_dict().values(), *optimizer.history().values()])
    assert_equal(*results)


def test_two_hundred_steps_with_a_rate_on_the_device() -> None:
    def change(step: int, optimizer: CurveBall) -> None:
        if step == 0:
            optimizer.param_groups[0]["lr"] = torch.tensor(0.9)
        if step == 100:
            optimizer.param_groups[0]["lr"].mul_(0.3)
        if step == 150:
            optimizer.param_groups[1]["lr"] = 0.05

    both(200, change)


def test_a_batch_that_is_not_finite_is_skipped_on_the_device() -> None:
    model = net()
    model[1].track_running_stats = False  # which would take in the NaN, as with any optimizer
    optimizer = CurveBall(model.parameters())
    step = graphed(optimizer, model)
    step(X[0], Y[0])
    before = [t.clone() for t in model.state_dict().values()]
    loss, _ = step(torch.full_like(X[0], torch.nan), Y[0])
    assert loss.isnan() and optimizer.stats()["skipped_steps"] == 1
    assert_equal(before, list(model.state_dict().values()))
    assert step(X[1], Y[1])[0].isfinite() and optimizer.stats()["skipped_steps"] == 1


def test_making_it_changes_nothing() -> None:
    model = net()
    optimizer = CurveBall(model.parameters(), lambda_interval=2)
    eager(optimizer, model)(X[0], Y[0])
    twin, other = copy.deepcopy((model, optimizer))
    generators, stats = torch.get_rng_state(), optimizer.stats()
    graphed(optimizer, model)
    assert_equal([*stats.values(), generators], [*optimizer.stats().values(), torch.get_rng_state()])
    assert_equal(list(twin.state_dict().values()), list(model.state_dict().values()))
    assert_equal(list(other.history().values()), list(optimizer.history().values()))
    assert optimizer.state_dict()["state"][0]["step"] == 1


def test_ordinary_steps_and_checkpoints_in_between() -> None:
    results = []
    for make in (eager, graphed):
        model = net()
        optimizer = CurveBall(model.parameters(), lambda_interval=3)
        torch.manual_seed(4)
        step = make(optimizer, model)
        for i in range(5):
            step(X[i], Y[i])
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        for i in range(4):
            eager(optimizer, model)(X[i][:9], Y[i][:9])
            step(X[i], Y[i])
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        for i in range(4):
            step(X[i], Y[i])
        results.append([*model.state_dict().values(), *optimizer.stats().values()])
    assert_equal(*results)


@pytest.mark.parametrize(
    "options",
    [{}, dict(average=0.8, direction="gradient", solve_interval=2), dict(preconditioner="kronecker", solve_interval=2)],
)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("how", ["frozen", "cleared", "fresh"])
def test_state_that_others_have_changed(how: str, half: bool, options: dict[str, Any]) -> None:
    """A parameter frozen for a while; no state; that of an optimizer before its first step."""
    results = []
    for make in (eager, graphed):
        model = net()
        optimizer = CurveBall(model.parameters(), lambd=0.2, **options)
        fresh = copy.deepcopy(optimizer.state_dict())
        torch.manual_seed(4)

        def model_fn(x: Tensor, model: nn.Module = model) -> Tensor:
            with torch.autocast("cpu", torch.float16, enabled=half):
                return model(x)

        step = make(optimizer, model_fn)
        for i in range(3):
            step(X[i], Y[i])
        if how == "frozen":
            model[0].weight.requires_grad_(False)
            eager(optimizer, model_fn)(X[0], Y[0])
            model[0].weight.requires_grad_(True)
        elif how == "cleared":
            optimizer.state.clear()
        else:
            optimizer.load_state_dict(fresh)
        for i in range(3):
            step(X[i], Y[i])
        eager(optimizer, model_fn)(X[3], Y[3])
        results.append([*model.state_dict().values(), *optimizer.stats().values()])
    assert_equal(*results)


def test_inside_autocast() -> None:
    results = []
    for make in (eager, graphed):
        model = net()
        optimizer = CurveBall(model.parameters())
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16):
            step = make(optimizer, model)
            losses = [step(X[i % BATCHES], Y[i % BATCHES])[0] for i in range(12)]
        results.append([*losses, *model.state_dict().values()])
    assert_equal(*results)


def test_long_intervals_need_no_search() -> None:
    model = net()
    step = graphed(
        CurveBall(
            model.parameters(), lambda_interval=10**9, direction="gradient", solve_interval=10**8 + 1, average=0.5
        ),
        model,
    )
    assert step(X[0], Y[0])[0].isfinite()


def test_batches_may_be_nested() -> None:
    model, other = net(0.0), net(0.0)
    optimizer, twin = CurveBall(model.parameters()), CurveBall(other.parameters())

    def model_fn(inputs: dict[str, Any]) -> Tensor:
        return model(inputs["x"]) * inputs["scales"][0]

    def loss_fn(outputs: Tensor, targets: tuple[Tensor, float]) -> Tensor:
        return F.cross_entropy(outputs, targets[0], label_smoothing=targets[1])

    def batch(i: int) -> tuple[Any, Any]:
        return {"x": X[i], "scales": [X[i][0, 0].abs(), "a word"]}, (Y[i], 0.1)

    step = make_graphed_step(optimizer, model_fn, loss_fn, batch(0))
    for i in range(3):
        x, scale, y = X[i], X[i][0, 0].abs(), Y[i]
        loss, outputs = twin.step(lambda: other(x) * scale, lambda out: F.cross_entropy(out, y, label_smoothing=0.1))
        assert_equal([loss, outputs], list(step(*batch(i))))
    inputs, targets = batch(0)
    with pytest.raises(ValueError, match="'a word' where this batch has 'another'"):
        step({"x": inputs["x"], "scales": [inputs["scales"][0], "another"]}, targets)
    with pytest.raises(ValueError, match="structure"):
        step(inputs["x"], targets)


def test_hooks_run_and_schedulers_are_content() -> None:
    model = net()
    optimizer = CurveBall(model.parameters())
    step = graphed(optimizer, model)
    scheduler = CosineAnnealingLR(optimizer, 10)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(X[0], Y[0])
        scheduler.step()
    assert calls == ["before", "after"]


def test_a_stale_graph_of_autograd_is_an_error() -> None:
    model = net()
    step = graphed(CurveBall(model.parameters()), model)
    loss = model(X[0]).sum()
    step(X[0], Y[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("preconditioner", [None, "kronecker"])
def test_outputs_of_a_structure(preconditioner: str | None) -> None:
    """Those of each batch, in their structure and dtypes, and what depends on no parameter too."""
    results = []
    for make in (eager, graphed):
        model = net()
        optimizer = CurveBall(model.parameters(), preconditioner=preconditioner)

        def model_fn(x: Tensor, model: nn.Module = model) -> dict[str, Any]:
            out = model(x)
            return {"logits": out, "half": (2 * out).bfloat16(), "size": x.square().sum(), "name": "net"}

        def loss_fn(out: dict[str, Any], y: Tensor) -> Tensor:
            return F.cross_entropy(out["logits"], y) + 1e-3 * out["half"].square().mean()

        torch.manual_seed(8)
        step = make(optimizer, model_fn, loss_fn)
        seen: list[Tensor] = []
        for i in range(12):
            loss, out = step(X[i % BATCHES], Y[i % BATCHES])
            assert out["name"] == "net" and out["half"].dtype == torch.bfloat16 and not out["logits"].requires_grad
            seen += [loss, out["logits"].clone(), out["half"].clone(), out["size"].clone()]
        results.append([*seen, *model.state_dict().values()])
    assert_equal(*results)
