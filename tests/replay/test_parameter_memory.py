"""What a model writes to its parameters is a part of each run, and the update is of the weights that it leaves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from curveball_fused import CurveBall
from tests.helpers.against_oracle import METHODS, after_one_run, assert_like_oracle, targets

X = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
MASK = torch.ones(4, 5, dtype=torch.float64).tril()
HOLES = MASK == 0
Write = Callable[[nn.Parameter], object]


def no_grad(write: Write) -> Write:
    def without(w: nn.Parameter) -> None:
        with torch.no_grad():
            write(w)

    return without


def item(of: Callable[[Tensor], Tensor], index: object, value: float = 0.0) -> Write:
    return lambda w: of(w).__setitem__(index, value)


def assign(value: Callable[[Tensor], Tensor]) -> Write:
    def write(w: nn.Parameter) -> None:
        w.data = value(w.data)

    return write


def through_numpy(w: nn.Parameter) -> None:
    w.detach().numpy()[:, 3:] = 0


def through_a_view_with_a_graph(w: nn.Parameter) -> None:
    view = w.view(-1)
    with torch.no_grad():
        view[3] = 0


# The last ones change the weights more when they are applied again.
WRITES: dict[str, Write] = {
    "data mul": lambda w: w.data.mul_(MASK),
    "data clamp": lambda w: w.data.clamp_(-0.2, 0.2),
    "data mask": item(lambda w: w.data, HOLES),
    "detach mul": lambda w: w.detach().mul_(MASK),
    "detach mask": item(lambda w: w.detach(), HOLES),
    "no_grad mul": no_grad(lambda w: w.mul_(MASK)),
    "no_grad copy": no_grad(lambda w: w.copy_(w * MASK)),
    "no_grad augmented": no_grad(lambda w: w.__imul__(MASK)),
    "no_grad view": no_grad(item(lambda w: w.view(-1), 3)),
    "view with a graph": through_a_view_with_a_graph,
    "data of a view": item(lambda w: w.data.T[1:], 2),
    "out": lambda w: torch.mul(w.data, MASK, out=w.data),
    "foreach": lambda w: torch._foreach_mul_([w.data], [MASK]),
    "renorm": assign(lambda w: torch.renorm(w, 2, 0, 0.5)),
    "new data": assign(lambda w: w * MASK),
    "numpy": through_numpy,
    "vector": lambda w: vector_to_parameters(parameters_to_vector([w]).detach() * MASK.flatten(), [w]),
    "operator": lambda w: torch.ops.aten.mul_.Tensor(w.data, MASK),
    "decay": lambda w: w.data.mul_(0.9),
    "no_grad decay": no_grad(lambda w: w.mul_(0.9)),
    "new decayed data": assign(lambda w: 0.9 * w),
    "noise": lambda w: w.data.add_(0.1 * torch.randn_like(w)),
}


class Writing(nn.Module):
    def __init__(self, write: Write) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.first.weight)
        return self.last(torch.tanh(self.first(x)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", WRITES)
def test_a_written_parameter_moves_as_it_must(name: str, method: str) -> None:
    assert_like_oracle(lambda: Writing(WRITES[name]), lambda net: net(X), targets(4, 3), method)


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_on_the_weight_is_a_mask_on_its_update_where_it_is_used_so(method: str) -> None:
    """Out of place the mask is a part of the function: the free weights move alike in the first step, from z = 0."""

    class Masked(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.layer, self.in_place = nn.Linear(5, 3), in_place
            self.layer.weight.data.mul_(MASK[:3])

        def forward(self, x: Tensor) -> Tensor:
            if self.in_place:
                self.layer.weight.data.mul_(MASK[:3])
            return F.linear(x, self.layer.weight, self.layer.bias)

    net = assert_like_oracle(lambda: Masked(True), lambda net: net(X), targets(4, 3), method, steps=1)
    assert (net.layer.weight != 0).all()  # the update is of all of it, and the next run masks it


@pytest.mark.parametrize("method", METHODS)
def test_a_write_that_nobody_sees_is_refused(method: str) -> None:
    net = Writing(no_grad(lambda w: w.set_(w * MASK))).double()
    with pytest.raises(RuntimeError, match=r"`parameter.set_`.*write to `parameter.data` instead"):
        CurveBall(net.parameters(), curvature=method).step(lambda: net(X), targets(4, 3))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["data mul", "decay", "no_grad decay", "new decayed data", "numpy"])
def test_a_model_that_fails_leaves_its_parameters_as_they_were(name: str, method: str) -> None:
    net = Writing(WRITES[name]).double()
    before = [p.detach().clone() for p in net.parameters()]

    def model() -> Tensor:
        net(X)
        raise ArithmeticError("no")

    with pytest.raises(ArithmeticError, match="no"):
        CurveBall(net.parameters(), curvature=method).step(model, targets(4, 3))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


class WritesLate(nn.Module):
    """Writes to a weight that autograd has saved; to one that it has not, and after its last use."""

    def __init__(self, write: Write, saved: bool) -> None:
        super().__init__()
        self.first, self.last, self.write, self.saved = nn.Linear(5, 4), nn.Linear(4, 3), write, saved

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(torch.tanh(self.first(x)))
        self.write((self.last if self.saved else self.first).weight)
        return y


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "write", [lambda w: w.data.clamp_(-0.1, 0.1), lambda w: w.detach().mul_(0.5)], ids=["data", "detach"]
)
def test_a_write_after_the_use_is_right_or_refused(write: Write, method: str) -> None:
    """The tangent of the hidden layer goes through the last weight, so a gradient through the new one is wrong."""
    if method != "linearize":  # which keeps the first weight too
        assert_like_oracle(lambda: WritesLate(write, saved=False), lambda net: net(X), targets(4, 3), method)
    net = WritesLate(write, saved=True).double()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match=r"written to after it was used|modified by an inplace operation"):
        CurveBall(net.parameters(), curvature=method).step(lambda: net(X), targets(4, 3))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_a_step_between_solves_sees_the_write_too() -> None:
    nets, losses = [Writing(WRITES["data mul"]).double() for _ in range(2)], []
    nets[1].load_state_dict(nets[0].state_dict())
    for net, method in zip(nets, ("auto", "double_backward"), strict=True):
        optimizer = CurveBall(net.parameters(), curvature=method, direction="gradient", solve_interval=3, lambd=0.5)
        losses.append([optimizer.step(lambda net=net: net(X), targets(4, 3))[0] for _ in range(15)])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-8, atol=0)


@pytest.mark.parametrize("method", ["linearize", "forward", "double_backward"])
def test_debug_mode_does_not_stop_a_model_that_writes_to_its_weights(method: str) -> None:
    net = Writing(WRITES["data mul"]).double()
    optimizer = CurveBall(net.parameters(), curvature=method, debug=True)
    for _ in range(2):
        optimizer.step(lambda: net(X), targets(4, 3))


class Shared(nn.Module):
    """Buffers over one memory: of a frozen parameter, of one another, and beside the optimized weight."""

    def __init__(self) -> None:
        super().__init__()
        memory = torch.linspace(-1, 1, 40, dtype=torch.float64)
        self.weight = nn.Parameter(memory[:20].view(4, 5))
        self.register_buffer("beside", memory[20:24])
        self.frozen = nn.Parameter(torch.ones(4, dtype=torch.float64), requires_grad=False)
        self.register_buffer("scale", self.frozen.data)
        self.register_buffer("table", torch.zeros(3, 4, dtype=torch.float64))
        self.register_buffer("row", self.table[1])
        self.register_buffer("overlapping", self.table.view(-1)[2:7])

    def double(self) -> Shared:  # which would take the memory apart
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight) * self.scale.clone() + self.beside + self.row
        with torch.no_grad():
            self.beside.add_(0.1)
            self.scale.mul_(0.9)
            self.row.add_(y.mean(0))
            self.table[0] += self.row
            self.overlapping.mul_(0.5)
            self.table.mul_(1.1)
        return y


@pytest.mark.parametrize("method", ["auto", "forward", "double_backward"])
@pytest.mark.parametrize("interval", [1, 1000])
def test_buffers_over_one_memory_move_as_in_one_run(method: str, interval: int) -> None:
    net = Shared()
    optimizer = CurveBall([net.weight], curvature=method, lambda_interval=interval, lr=0.7)
    for _ in range(3):
        twin = Shared()
        twin.load_state_dict(net.state_dict())
        once, weight = after_one_run(twin, lambda net: net(X)), net.weight.detach().clone()
        optimizer.step(lambda: net(X), lambda out: out.square().mean())
        assert not torch.equal(net.weight, weight)
        for (name, ours), theirs in zip(net.named_buffers(), once.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(net.frozen, net.scale, rtol=0, atol=0)
