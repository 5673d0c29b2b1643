"""The compiled step: its products are those of the uncompiled one, whatever path the model takes; clear refusals."""

from __future__ import annotations

import copy
import functools
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from curveball_fused import CurveBall
from curveball_fused.curvature import compiled
from tests.helpers import nets, traceable_models
from tests.helpers.tiers import slow
from tests.helpers.traceable_models import X
from tests.optimizer import test_oracle

pytestmark = pytest.mark.filterwarnings("ignore:curveball_fused. compiling")
TRACES: list[fx.GraphModule] = []


def as_traced(graph: fx.GraphModule, examples: Sequence[Any]) -> Callable[[list[Any]], Sequence[Any]]:
    """Runs a graph as it is: most of these tests are about the graphs, not about Inductor."""
    TRACES.append(graph)
    run = lambda values: graph(*values)  # noqa: E731
    run._boxed_call = True
    return run


@pytest.fixture(autouse=True)
def graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    TRACES.clear()
    if "inductor" not in request.node.name:
        monkeypatch.setattr(compiled, "backend", compiled.Backend(as_traced))


# torch.compile does not follow the first; in the second, compiled code draws numbers that nobody reads.
REFUSED = ("recurrent layer", "dropout of everything", "in place", "arrangements", "complex numbers")


def square(out: Tensor) -> Tensor:
    return (out - 0.3).square().mean()


@pytest.mark.parametrize("name", [name if name == "attention" else slow(name) for name in nets.NETS])
def test_twenty_steps_equal_dense_matrices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_oracle, "CurveBall", functools.partial(CurveBall, compile=True))
    test_oracle.run(name, "auto", "auto", test_oracle.cross_entropy)
    assert len(TRACES) == 3, "traced more than once"


FAST = ("batch norm in eval mode", "dropout", "padded embedding", "activations", "a view of the outputs")
FOLLOWED = {
    **{name: case for name, case in traceable_models.FOLLOWED.items() if name not in REFUSED},
    "a view of the outputs": (lambda: nn.Linear(6, 2), lambda net: net(X).T[1:].unsqueeze(0)),
    "an autograd function": (lambda: nn.Linear(6, 2), lambda net: traceable_models.Double.apply(net(X)).tanh()),
    "writing in place": (lambda: nn.Linear(6, 2), lambda net: net(X).mul_(2).tanh_()),
    "vmap": (lambda: nn.Linear(6, 2), lambda net: torch.func.vmap(net)(X)),
}


@pytest.mark.parametrize("name", [name if name in FAST else slow(name) for name in FOLLOWED])
def test_equals_dual_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, expected_state = traceable_models.steps(*FOLLOWED[name], "auto")
    monkeypatch.setattr(traceable_models, "CurveBall", functools.partial(CurveBall, compile=True))
    ours, state = traceable_models.steps(*FOLLOWED[name], "auto")
    assert TRACES
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, equal_nan=True)
    for key, value in expected_state.items():
        torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")


class Counting(nn.Module):
    """Writes to buffers in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("table", torch.zeros(2, 4))
        self.calls: Tensor
        self.table: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.linear(x)) * (1 + self.table.clone()[0])
        y += self.table[0]
        with torch.no_grad():
            self.calls += 1
            self.table[0] += y.mean(0)
            self.table[0] *= 0.5
        return F.dropout(y, 0.3) * self.table[0]


@pytest.mark.parametrize("interval", [1, 1000])
def test_a_step_leaves_what_one_run_leaves(interval: int) -> None:
    net = Counting().double()
    optimizer = CurveBall(net.parameters(), compile=True, lambda_interval=interval, lr=0.7)
    for step in range(3):
        once = copy.deepcopy(net)
        torch.manual_seed(step)
        with torch.no_grad():
            expected = once(X)
        drawn = torch.rand(())
        torch.manual_seed(step)
        _, outputs = optimizer.step(lambda: net(X), square)
        torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
        assert torch.rand(()) == drawn
        for (name, ours), theirs in zip(net.named_buffers(), once.buffers()):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_buffers_that_move_after_they_were_read() -> None:
    """Both products read the values of before."""
    ours = Counting().double()
    theirs = copy.deepcopy(ours)
    for net, compile in ((ours, True), (theirs, False)):
        torch.manual_seed(0)
        optimizer = CurveBall(net.parameters(), compile=compile, lambda_interval=1)
        for _ in range(4):
            optimizer.step(lambda: net(X), square)
    for (key, value), expected in zip(ours.state_dict().items(), theirs.state_dict().values()):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")


def test_ratio_compares_the_same_function() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    optimizer = CurveBall(net.parameters(), compile=True, lr=1e-7, lambda_interval=1)
    for _ in range(3):
        optimizer.step(lambda: net(X), square)
        assert optimizer.stats()["ratio"].item() == pytest.approx(1, abs=1e-5)


def test_a_failed_step_leaves_buffers_and_generator() -> None:
    net = Counting().double()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    optimizer = CurveBall(net.parameters(), compile=True)
    with pytest.raises(TypeError, match="loss_fn must return"):
        optimizer.step(lambda: net(X), lambda out: 3.0)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_another_path_is_traced_anew() -> None:
    """Batches of other sizes, eval mode, a changed module, a frozen parameter, a branch on a Python value."""
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.4), nn.Linear(5, 2)).double()
    other, flags = copy.deepcopy(net), {"double": False}

    def model(net: nn.Module, x: Tensor) -> Tensor:
        return net(x) * 2 if flags["double"] else net(x)

    ours = CurveBall(net.parameters(), compile=True, lambda_interval=2)
    theirs = CurveBall(other.parameters(), lambda_interval=2)
    changes: list[tuple[Callable[[nn.Module], Any], Tensor]] = [
        (lambda net: None, X),
        (lambda net: None, X[:3]),
        (lambda net: net.eval(), X),
        (lambda net: net.train(), X[:3]),
        (lambda net: setattr(net[2], "p", 0.1), X),
        (lambda net: net[0].bias.requires_grad_(False), X),
        (lambda net: net.__setitem__(2, nn.Tanh()), X),
        (lambda net: flags.update(double=True), X),
    ]
    for step, (change, x) in enumerate(changes):
        change(net)
        change(other)
        torch.manual_seed(step)
        loss, outputs = ours.step(lambda: model(net, x), square)
        torch.manual_seed(step)
        expected_loss, expected = theirs.step(lambda: model(other, x), square)
        torch.testing.assert_close((loss, outputs), (expected_loss, expected), rtol=1e-9, atol=1e-10)
    for (key, value), expected in zip(net.state_dict().items(), other.state_dict().values()):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")


def test_two_models_share_one_trace_but_not_their_parameters() -> None:
    nets_ = [nn.Linear(6, 2).double() for _ in range(2)]
    expected = copy.deepcopy(nets_)
    for net, same in zip(nets_, expected):
        for one, compile in ((net, True), (same, False)):
            CurveBall(one.parameters(), compile=compile).step(lambda: one(X), square)
        torch.testing.assert_close(list(net.parameters()), list(same.parameters()), rtol=1e-10, atol=1e-12)
    assert len(TRACES) == 3


def test_parameters_of_another_optimizer_are_constant() -> None:
    results = []
    for compile in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        optimizer = CurveBall(net[2].parameters(), compile=compile)
        for _ in range(3):
            optimizer.step(lambda: net(X), square)
        results.append([p.detach() for p in net.parameters()])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_shapes_without_end_are_refused() -> None:
    net = nn.Linear(6, 2).double()
    optimizer = CurveBall(net.parameters(), compile=True)
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(RuntimeError, match="pad batches to few shapes"):
        for x in (X, X[:3]):
            optimizer.step(lambda: net(x), square)


def test_a_view_made_outside_is_refused() -> None:
    net = nn.Linear(6, 2).double()
    view = net.weight.view(2, 6)
    with pytest.raises(RuntimeError, match="computed from parameters outside of model_fn"):
        CurveBall(net.parameters(), compile=True).step(lambda: F.linear(X, view, net.bias), square)


class Clamped(torch.autograd.Function):
    """A gradient that is not linear in the cotangent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-0.1, 0.1)


def assigns(net: Any) -> Tensor:
    net.seen = net(X).mean(0)
    return net(X)


def branches_on_a_value(net: Any) -> Tensor:
    out = net(X)
    return out if out.sum() > 0 else -out


@pytest.mark.parametrize(
    ("run", "words"),
    [
        slow(branches_on_a_value, "."),
        (lambda net: checkpoint(lambda x: F.dropout(net(x)).sin(), X, use_reentrant=False), "checkpointed"),
        (assigns, "keeps one beyond its run"),
        (lambda net: Clamped.apply(net(X)), "not linear"),
        slow(lambda net: net(X) + torch.rand(2, generator=torch.Generator().manual_seed(0)), "."),
        slow(lambda net: torch.autograd.grad(net(X).square().sum(), net.weight, create_graph=True)[0], "."),
    ],
)
def test_what_it_cannot_follow_is_refused_and_nothing_changes(run: Any, words: str) -> None:
    net = nn.Linear(6, 2).double()
    before = copy.deepcopy(net.state_dict())
    optimizer = CurveBall(net.parameters(), compile=True)
    with pytest.raises(
        RuntimeError, match=rf"compile=True cannot follow this model: .*{words}.*leave compile=True off"
    ):
        optimizer.step(lambda: run(net), square)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    optimizer.step(lambda: net(X), square)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="Inductor needs a C++ compiler")
def test_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with generated code: masks of dropout, statistics, buffers that move after they were read."""
    expected, expected_state = traceable_models.steps(Counting, lambda net: net(X), "auto")
    monkeypatch.setattr(traceable_models, "CurveBall", functools.partial(CurveBall, compile=True))
    ours, state = traceable_models.steps(Counting, lambda net: net(X), "auto")
    assert not TRACES
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10, equal_nan=True)
    torch.testing.assert_close(state, expected_state, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("settings", "error"),
    [(dict(compile="yes"), TypeError), (dict(compile=True, curvature="double_backward"), ValueError)],
)
def test_settings(settings: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="compile"):
        CurveBall(nn.Linear(2, 2).parameters(), **settings)
