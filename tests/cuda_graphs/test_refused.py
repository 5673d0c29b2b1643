"""What a graphed step refuses, by name, and that nothing is changed then; on the same fake of CUDA graphs."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curveball_fused
from curveball_fused import CurveBall, make_graphed_step
from curveball_fused.cuda_graphs import graphed_step
from tests.helpers import recorded_graph
from tests.helpers.graphed_nets import X, Y, graphed, net
from tests.helpers.training import assert_equal


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed_step, "Pool", recorded_graph.Pool)
    monkeypatch.setattr(graphed_step, "Capture", recorded_graph.Capture)


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


def test_functions_in_the_wrong_order() -> None:
    model = net()
    for loss in (F.cross_entropy, lambda out, y: F.cross_entropy(out, y)):
        with pytest.raises(TypeError, match=r"needs 2 arguments.*The model comes first"):
            make_graphed_step(CurveBall(model.parameters()), loss, model, (X[0], Y[0]))


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


class WithTable(nn.Module):
    """A frozen layer that no optimizer has, and a table that a longer input has it replace."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.net = nn.Linear(6, 6).requires_grad_(False), net()
        self.table = torch.arange(20.0)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > len(self.table):
            self.table = torch.arange(float(len(x)))
        return self.net(self.frozen(x) + self.table[: len(x), None])


def test_what_a_replay_reads_of_the_model_is_held() -> None:
    model = WithTable()
    optimizer = CurveBall(model.net.parameters())
    step = graphed(optimizer, model)
    table = weakref.ref(model.table)
    optimizer.step(lambda: model(torch.cat((X[0], X[1]))), lambda out: F.cross_entropy(out, torch.cat((Y[0], Y[1]))))
    assert table() is not None and table() is not model.table
    assert step(X[0], Y[0])[0].isfinite()


def test_a_frozen_parameter_that_is_replaced() -> None:
    model = WithTable()
    step = graphed(CurveBall(model.net.parameters()), model)
    model.frozen.load_state_dict(nn.Linear(6, 6).state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="changed since the graphs were made: call make_graphed_step again"):
        step(X[0], Y[0])


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
    reads_a_value: r"_local_scalar_dense.*test_refused.py:\d+, in reads_a_value.*on the device",
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


def test_what_failed_while_it_was_watched_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all that torch can do works under the watch for host reads; a capture that fails says what did not."""
    model, watched = net(), []

    def fails_when_watched(x: Tensor) -> Tensor:
        if watched:
            raise KeyError("the model's own")
        return model(x)

    refuse_host_reads = graphed_step.refuse_host_reads

    def watch(*args: Any) -> str:
        watched.append(True)
        try:
            return refuse_host_reads(*args)
        finally:
            watched.clear()

    monkeypatch.setattr(graphed_step, "refuse_host_reads", watch)

    def make() -> object:
        return make_graphed_step(CurveBall(model.parameters()), fails_when_watched, F.cross_entropy, (X[0], Y[0]))

    make()  # where the capture works, it does not matter

    class Failing(recorded_graph.Capture):
        @contextmanager
        def recording(self) -> Iterator[None]:
            with super().recording():
                yield
            raise RuntimeError("operation not permitted")

    monkeypatch.setattr(graphed_step, "Capture", Failing)
    words = (
        r"not permitted\. .*watched.*failed with KeyError: \"the model's own\", at .*test_refused.py:\d+, in fails_when"
    )
    with pytest.raises(RuntimeError, match=words):
        make()


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
