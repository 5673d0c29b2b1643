"""Graphed steps against ordinary ones, bit for bit, with operators recorded on the CPU in the place of CUDA graphs."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import recorded_graph
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from training import SETTINGS, assert_equal

import curveball_fused
from curveball_fused import CurveBall, graphs, make_graphed_step

BATCHES = 7
X = torch.randn(BATCHES, 16, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(BATCHES * 16).view(BATCHES, 16) % 4


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "Pool", recorded_graph.Pool)
    monkeypatch.setattr(graphs, "Capture", recorded_graph.Capture)


def net(dropout: float = 0.2) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.GELU(), nn.Dropout(dropout), nn.LayerNorm(12), nn.Linear(12, 4)
    )


Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def eager(optimizer: CurveBall, model: Any) -> Step:
    return lambda x, y: optimizer.step(lambda: model(x), lambda out: F.cross_entropy(out, y))


def graphed(optimizer: CurveBall, model: Any) -> Step:
    return make_graphed_step(optimizer, model, F.cross_entropy, (X[3], Y[3]))


def both(
    steps: int,
    change: Callable[[int, CurveBall], None] = lambda step, optimizer: None,
    half: Any = None,
    **options: Any,
) -> list[CurveBall]:
    """Trains both ways; asserts that losses, outputs, weights, buffers, history and generators agree in every bit."""
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
    assert optimizers[0].state_dict()["state"]["curveball"]["step"] == steps
    return optimizers


@pytest.mark.parametrize(
    "options",
    [
        {},
        SETTINGS | dict(lambda_interval=3),
        dict(average=0.8, solve_interval=4, lambda_interval=6),
        dict(curvature="forward", lambda_interval=2),
        dict(curvature="double_backward"),
        dict(auto_lambda=False, rho=0.9, backend="torch"),
        dict(half=torch.bfloat16),
        dict(half=torch.float16, solve_interval=2),
    ],
    ids=str,
)
def test_equal_to_ordinary_steps(options: dict[str, Any]) -> None:
    both(60, **options)


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
    assert optimizer.state_dict()["state"]["curveball"]["step"] == 1


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


@pytest.mark.parametrize("how", ["frozen", "cleared", "fresh"])
def test_state_that_others_have_changed(how: str) -> None:
    """A parameter frozen for a while; no state; that of an optimizer before its first step."""
    results = []
    for make in (eager, graphed):
        model = net()
        optimizer = CurveBall(model.parameters(), lambd=0.2)
        fresh = copy.deepcopy(optimizer.state_dict())
        torch.manual_seed(4)
        step = make(optimizer, model)
        for i in range(3):
            step(X[i], Y[i])
        if how == "frozen":
            model[0].weight.requires_grad_(False)
            eager(optimizer, model)(X[0], Y[0])
            model[0].weight.requires_grad_(True)
        elif how == "cleared":
            optimizer.state.clear()
        else:
            optimizer.load_state_dict(fresh)
        for i in range(3):
            step(X[i], Y[i])
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


class Replacing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.net(x - self.mean)


def test_a_buffer_that_is_replaced_is_told_and_put_back() -> None:
    model = Replacing()
    mean = model.mean
    with pytest.raises(RuntimeError, match="replaces a buffer by a new tensor"):
        graphed(CurveBall(model.parameters()), model)
    assert model.mean is mean and mean.eq(0).all()


def test_long_intervals_need_no_search() -> None:
    model = net()
    step = graphed(CurveBall(model.parameters(), lambda_interval=10**9, solve_interval=10**8 + 1, average=0.5), model)
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


def test_other_batches_are_refused_and_change_nothing() -> None:
    model = net()
    optimizer = CurveBall(model.parameters())
    step = graphed(optimizer, model)
    step(X[0], Y[0])
    before = [t.clone() for t in (*model.state_dict().values(), *optimizer.stats().values())]
    for x, y in ((X[0][:5], Y[0][:5]), (X[0].double(), Y[0]), (X[0], Y[0].int()), (X[0], 3)):
        with pytest.raises(ValueError, match=r"one shape.*float32 tensor of shape|one shape.*int64 tensor of shape"):
            step(x, y)
    assert_equal(before, [*model.state_dict().values(), *optimizer.stats().values()])


@pytest.mark.parametrize("change", ["beta", "weight_decay", "requires_grad", "place", "buffer", "group"])
def test_what_the_graphs_hold_must_not_change(change: str) -> None:
    model = net()
    optimizer = CurveBall(model.parameters())
    step = graphed(optimizer, model)
    if change == "requires_grad":
        model[0].weight.requires_grad_(False)
    elif change == "place":
        model[0].weight.data = model[0].weight.data.clone()
    elif change == "buffer":
        model[1].running_mean = torch.zeros(12)
    elif change == "group":
        optimizer.add_param_group(dict(params=[nn.Parameter(torch.ones(2))]))
    else:
        optimizer.param_groups[0][change] = 0.5
    with pytest.raises(RuntimeError, match="changed since the graphs were made: call make_graphed_step again"):
        step(X[0], Y[0])


def reads_a_value(model: nn.Module, x: Tensor) -> Tensor:
    return model(x) if x.sum() > 100 else model(x + 1)


def picks_by_a_mask(model: nn.Module, x: Tensor) -> Tensor:
    return model(torch.cat((x[x[:, 0] > 0], x[x[:, 0] <= 0])))


def draws_on_the_host(model: nn.Module, x: Tensor) -> Tensor:
    return model(x * random.random())


def has_its_own_generator(model: nn.Module, x: Tensor) -> Tensor:
    return model(x + torch.rand(x.shape, generator=OWN))


OWN = torch.Generator()
REFUSED = {
    reads_a_value: r"_local_scalar_dense.*test_graphs.py:\d+, in reads_a_value.*on the device",
    picks_by_a_mask: r"aten\.index.*mask.*in picks_by_a_mask",
    draws_on_the_host: "draws random numbers on the host",
    has_its_own_generator: "generator of its own",
}


@pytest.mark.parametrize("model_fn", REFUSED)
def test_what_prevents_a_graph_is_named(model_fn: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = net()
    optimizer = CurveBall(model.parameters())
    before = [t.clone() for t in model.state_dict().values()]
    with pytest.raises(RuntimeError, match=REFUSED[model_fn]):
        make_graphed_step(optimizer, lambda x: model_fn(model, x), F.cross_entropy, (X[0], Y[0]))
    assert_equal(before, list(model.state_dict().values()))
    loss, _ = optimizer.step(lambda: model_fn(model, X[0]), lambda out: F.cross_entropy(out, Y[0]))
    assert loss.isfinite()


def test_arguments_are_checked() -> None:
    model = net()
    with pytest.raises(TypeError, match="must be a CurveBall; got SGD"):
        make_graphed_step(torch.optim.SGD(model.parameters()), model, F.cross_entropy, (X[0], Y[0]))  # type: ignore
    with pytest.raises(TypeError, match=r"two things, \(inputs, targets\)"):
        make_graphed_step(CurveBall(model.parameters()), model, F.cross_entropy, X[0])  # type: ignore
    with pytest.raises(TypeError, match="must be functions"):
        make_graphed_step(CurveBall(model.parameters()), None, F.cross_entropy, (X[0], Y[0]))  # type: ignore
    with pytest.raises(TypeError, match="holds a Generator: give tensors"):
        make_graphed_step(CurveBall(model.parameters()), model, F.cross_entropy, ([X[0], OWN], Y[0]))
    with pytest.raises(ValueError, match="debug=True"):
        make_graphed_step(CurveBall(model.parameters(), debug=True), model, F.cross_entropy, (X[0], Y[0]))


def test_on_a_cpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = net()
    with pytest.raises(RuntimeError, match=r"need parameters on a CUDA device; these are on cpu.*optimizer.step"):
        curveball_fused.make_graphed_step(CurveBall(model.parameters()), model, F.cross_entropy, (X[0], Y[0]))


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


def test_a_stale_graph_of_autograd_is_told() -> None:
    model = net()
    step = graphed(CurveBall(model.parameters()), model)
    loss = model(X[0]).sum()
    step(X[0], Y[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
