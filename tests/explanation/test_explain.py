"""What `explain` says is so, and nothing changes by asking."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from curveball_fused import CurveBall, explain, user_warnings
from curveball_fused.curvature import AUTO
from curveball_fused.preconditioners import Preconditioner, shapes
from tests.helpers import nets
from tests.helpers.traceable_models import Double

CPU = torch.device("cpu")
X = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))


def squares(outputs: Tensor) -> Tensor:
    return (outputs.float() - 0.3).square().mean()


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round of times is enough where they do not matter."""

    def once(functions: Any, prepare: Callable[[], None], device: torch.device) -> list[float]:
        for function in functions:
            prepare()
            function()
        return [1e-3 * (i + 1) for i in range(len(functions))]

    monkeypatch.setattr("curveball_fused.explanation.procedure.median_seconds", once)


@pytest.mark.parametrize("name", list(nets.NETS))
def test_nets(name: str) -> None:
    net, x = nets.make(name)
    found = explain(lambda: net(x), squares, net.parameters())
    assert found.method == "linearize"
    assert {f.handled_by for f in found.functions} == {"own rule"}
    assert not any(f.lacks for f in found.functions)
    assert [method.name for method in found.methods if method.cost] == list(AUTO)
    linears = sum(isinstance(m, nn.Linear) for m in net.modules())
    assert [f.calls for f in found.functions if f.name == "torch.nn.functional.linear"] == [linears]
    text = str(found)
    assert 'curvature="auto" takes "linearize"' in text
    assert "Loss: none of those that are recognized; its curvature by autograd, twice." in text


def test_multiply_adds_of_an_mlp() -> None:
    """A layer of B x n x m costs once that forwards, for each gradient (not that of the data), and for each of the two
    terms of a tangent (not that of the data)."""
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)), X
    first, rest = 7 * 6 * 8, 7 * (8 * 5 + 5 * 3)
    target = torch.randint(0, 3, (7,))
    found = explain(lambda: net(x), lambda out: F.cross_entropy(out, target), net.parameters())
    linearized, _, forward, double = (method.cost for method in found.methods)
    assert found.backward and linearized and forward and double
    assert found.forward.multiply_adds == first + rest
    assert found.backward.multiply_adds == 2 * first + 3 * rest
    assert linearized.multiply_adds == 4 * first + 7 * rest
    assert forward.multiply_adds == 6 * first + 9 * rest
    assert double.multiply_adds > linearized.multiply_adds
    equivalents = found.forward_equivalents(linearized)
    assert equivalents == pytest.approx((4 * first + 7 * rest) / (first + rest))
    assert f"{equivalents:.2f}" in str(found)
    assert (found.loss, found.loss_products) == ("F.cross_entropy", "fused kernels")
    assert found.parameters == sum(p.numel() for p in net.parameters())
    assert found.parameter_bytes == found.state_bytes == 4 * found.parameters


def test_what_the_metric_costs() -> None:
    """As torch counts the products of a direction, and as the state holds it."""
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    found = explain(lambda: net(X), squares, net.parameters())
    optimizer = CurveBall(net.parameters(), preconditioner="kronecker")
    states = [optimizer.state[p] for p in net.parameters()]
    with FlopCounterMode(display=False) as counter:
        Preconditioner(states, optimizer._shared["scalars"], "torch", gather=False).direction(list(net.parameters()))
    assert found.metric_multiply_adds == counter.get_total_flops() / 2 == 2 * 48 * (6 + 8) + 2 * 24 * (8 + 3)
    assert found.metric_bytes == sum(
        state[name].nbytes for p, state in zip(net.parameters(), states) for name in shapes(p)
    )
    assert f"{found.metric_multiply_adds / 1e3:.3g} k multiply-adds" in str(found)


def test_multiply_adds_of_convolution_and_attention() -> None:
    conv = nn.Conv2d(2, 4, 3, bias=False)
    images = torch.randn(3, 2, 8, 8)
    found = explain(lambda: conv(images).flatten(1), squares, conv.parameters())
    assert found.forward.multiply_adds == 3 * 4 * 6 * 6 * 2 * 9
    # Of seven, less the gradient of the data and the tangents' terms for it.
    assert found.methods[0].cost and found.forward_equivalents(found.methods[0].cost) == 4
    q = nn.Parameter(torch.randn(2, 3, 5, 4))
    found = explain(lambda: F.scaled_dot_product_attention(q, q, q), squares, [q])
    assert found.forward.multiply_adds == 2 * 2 * 3 * 5 * 5 * 4


def test_memory_of_the_methods() -> None:
    """The tape keeps what autograd's graph keeps, double backward a second graph, dual numbers a few tensors."""
    torch.manual_seed(0)
    net = nn.Sequential(*[layer for _ in range(20) for layer in (nn.Linear(16, 16), nn.Tanh())])
    x = torch.randn(500, 16)
    found = explain(lambda: net(x), squares, net.parameters())
    linearized, _, forward, double = (method.cost for method in found.methods)
    assert found.backward and linearized and forward and double
    assert found.forward.peak_bytes <= found.backward.peak_bytes <= linearized.peak_bytes < double.peak_bytes
    assert forward.peak_bytes < 1.3 * found.backward.peak_bytes


class Hidden(Double):
    """Whose backward pass cannot be differentiated, either."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def in_autocast(net: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.relu(net(X))


def written_to(net: nn.Module) -> Tensor:
    return (net(X).mul_(net(X)) + 1).exp_()


@pytest.mark.parametrize(
    ("run", "function", "reason", "method"),
    [
        (lambda net: Double.apply(Double.apply(net(X)).tanh()), "DoubleBackward", "cannot see into", "double_backward"),
        (lambda net: checkpoint(net, X, use_reentrant=False).tanh(), "torch.nn.functional.linear", "checkp", "forward"),
        (written_to, "torch.Tensor.mul_", "writes to its argument", "linearize_operators"),
        (written_to, "torch.Tensor.exp_", "writes to its argument", "linearize_operators"),
        (lambda net: F.rrelu(net(X), training=True), "torch.rrelu", "random", "forward"),
    ],
)
def test_refusals(run: Callable[[Any], Tensor], function: str, reason: str, method: str) -> None:
    """All are reported, not just the first, and "auto" does as is said."""
    net = nn.Linear(6, 6)
    user_warnings.announced.clear()
    found = explain(lambda: run(net), squares, net.parameters())
    refused = {f.name: f.reason for f in found.functions if f.handled_by == "refused"}
    assert reason in refused[function]
    assert found.method == method
    assert reason in found.methods[0].refusal and found.methods[0].cost is None
    assert f'"linearize" cannot be had: {found.methods[0].refusal}' in str(found)
    optimizer = CurveBall(net.parameters())
    with pytest.warns(UserWarning, match="curveball_fused"):  # which explain has left to the training
        optimizer.step(lambda: run(net), squares)
    assert optimizer._shared["method"] == method


def test_autocast() -> None:
    """Followed, as everything that the tape has rules for."""
    net = nn.Linear(6, 6)
    found = explain(lambda: in_autocast(net), squares, net.parameters())
    assert {f.name.rpartition(".")[2] for f in found.functions} >= {"linear", "relu"}
    assert {f.handled_by for f in found.functions} == {"own rule"}
    assert found.method == "linearize" and found.methods[0].cost is not None
    optimizer = CurveBall(net.parameters())
    optimizer.step(lambda: in_autocast(net), squares)
    assert optimizer._shared["method"] == found.method


def test_custom_functions_are_counted() -> None:
    net = nn.Linear(6, 6)
    found = explain(lambda: Double.apply(Double.apply(net(X)).tanh()), squares, net.parameters())
    assert {f.name: f.calls for f in found.functions if f.handled_by == "refused"} == {"DoubleBackward": 2}


def test_lstm() -> None:
    net, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    found = explain(lambda: net(x)[0], squares, net.parameters())
    assert [(f.name, f.handled_by, f.calls) for f in found.functions] == [("torch.lstm", "own rule", 1)]
    assert found.method == "linearize"
    assert found.forward.multiply_adds == 5 * 2 * 4 * 4 * (3 + 4)  # the fused layer's, which torch does not count


def test_without_forward_mode() -> None:
    net, y = nn.Linear(6, 3), torch.zeros(len(X), dtype=torch.long)
    found = explain(lambda: F.multi_margin_loss(net(X), y, reduction="none"), squares, net.parameters())
    assert {f.name.rpartition(".")[2] for f in found.functions if f.lacks} == {"multi_margin_loss"}
    assert found.method is None and not any(method.cost for method in found.methods)  # nor a second derivative
    assert re.search(r"No forward mode for \S*multi_margin_loss: ", str(found))


def test_a_model_that_no_method_can_follow() -> None:
    net = nn.Linear(6, 3)
    found = explain(lambda: Hidden.apply(net(X)), squares, net.parameters())
    assert found.method is None and not any(method.cost for method in found.methods) and found.backward is not None
    assert "CurveBall cannot train this model" in str(found) and "HiddenBackward" in str(found)
    with pytest.raises(RuntimeError):
        CurveBall(net.parameters()).step(lambda: Hidden.apply(net(X)), squares)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model() -> None:
    net = torch.jit.script(nn.Sequential(nn.Linear(6, 3), nn.Tanh()))
    found = explain(lambda: net(X), squares, net.parameters())
    assert found.method == "double_backward" and found.methods[-1].cost is not None
    assert "Checked in a step" in str(found)


@pytest.mark.parametrize(
    ("loss_fn", "name", "by"),
    [
        (lambda out: F.mse_loss(out, torch.zeros(7, 3)), "F.mse_loss", "fused kernels"),
        (lambda out: F.cross_entropy(out[1:], torch.ones(6).long()), "F.cross_entropy", "fused kernels"),
        (lambda out: F.mse_loss(out, torch.zeros(3)), "F.mse_loss", "autograd"),  # a broadcast target
        (lambda out: F.huber_loss(out, torch.zeros(7, 3)), "", "autograd"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_losses(loss_fn: Callable[[Tensor], Tensor], name: str, by: str) -> None:
    net = nn.Linear(6, 3)
    found = explain(lambda: net(X), loss_fn, net.parameters())
    assert (found.loss, found.loss_products) == (name, by)


def test_nothing_changes() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
    with torch.no_grad():
        net[0].bias.fill_(-0.0)
    own = torch.Generator().manual_seed(5)
    net[3].weight.grad = torch.ones(3, 8)
    before = copy.deepcopy(net.state_dict())
    states = torch.get_rng_state(), random.getstate(), own.get_state()
    found = explain(lambda: net(X + torch.rand(7, 6, generator=own)) * random.random(), squares, net.parameters())
    assert found.method == "linearize"
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]) and torch.equal(value.signbit(), before[key].signbit()), key
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert torch.equal(own.get_state(), states[2])
    assert torch.equal(net[3].weight.grad, torch.ones(3, 8)) and net[0].weight.grad is None


def fails(_: Any = None) -> Tensor:
    raise KeyError("of the user")


@pytest.mark.parametrize(
    ("model_fn", "loss_fn", "params"),
    [
        (lambda net: net(X), squares, lambda net: []),
        (lambda net: net(X), squares, lambda net: net.weight),
        (lambda net: net(X), squares, lambda net: [net.weight.detach()]),
        (lambda net: net(X), None, nn.Module.parameters),
        (lambda net: (net(X), 1), squares, nn.Module.parameters),
        (lambda net: net(X).long(), squares, nn.Module.parameters),
        (lambda net: net(X).detach(), squares, nn.Module.parameters),
        (lambda net: nn.DataParallel(net)(X), squares, nn.Module.parameters),
        (lambda net: fails(), squares, nn.Module.parameters),
        (lambda net: net(X), fails, nn.Module.parameters),
        (lambda net: net(X), lambda out: out, nn.Module.parameters),
        (lambda net: net(X), lambda out: torch.zeros(()), nn.Module.parameters),
        (lambda net: net(X), lambda out: out.relu_().sum(), nn.Module.parameters),
    ],
)
def test_bad_input_gets_the_errors_of_a_step(model_fn: Any, loss_fn: Any, params: Callable[[Any], Any]) -> None:
    net = nn.Linear(6, 3)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(Exception) as expected:
        CurveBall(params(net)).step(lambda: model_fn(net), loss_fn)
    with pytest.raises(expected.type) as got:
        explain(lambda: model_fn(net), loss_fn, params(net))
    assert str(got.value) == str(expected.value)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_functions_in_the_wrong_order_get_the_error_of_a_step() -> None:
    net = nn.Linear(6, 3)
    model_fn, loss_fn = lambda: net(X), lambda out: squares(out)
    with pytest.raises(TypeError, match="The model's function comes first") as expected:
        CurveBall(net.parameters()).step(loss_fn, model_fn)
    with pytest.raises(TypeError) as got:
        explain(loss_fn, model_fn, net.parameters())  # type: ignore[arg-type]
    assert str(got.value) == str(expected.value)
