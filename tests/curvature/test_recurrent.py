"""Recurrent layers: their own rules against the matrix, for every kind, shape and use."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curveball_fused import CurveBall
from curveball_fused.curvature.linearized import Linearized
from curveball_fused.explanation.trace_report import trace
from tests.helpers.jacobians import assert_products, linearized

KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
}
WIDTH, ROWS, STEPS, INPUTS = 4, 3, 5, 2
Use = Callable[[Tensor, Any], Tensor]


def make(kind: str, **options: Any) -> nn.RNNBase:
    torch.manual_seed(0)
    return KINDS[kind](INPUTS, WIDTH, **options).double()


def inputs(batch_first: bool = False) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(*((ROWS, STEPS) if batch_first else (STEPS, ROWS)), INPUTS, dtype=torch.float64)


def states(net: nn.RNNBase) -> list[Tensor]:
    torch.manual_seed(3)
    shape = (net.num_layers * (2 if net.bidirectional else 1), ROWS, WIDTH)
    several = 2 if isinstance(net, nn.LSTM) else 1
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(several)]


def given(net: nn.RNNBase, hx: list[Tensor]) -> Any:
    return (hx[0], hx[1]) if isinstance(net, nn.LSTM) else hx[0]


def everything(outputs: Tensor, last: Any) -> Tensor:
    return torch.cat([t.flatten() for t in (outputs, *(last if isinstance(last, tuple) else (last,)))])


def handled(model_fn: Callable[[], Tensor], params: list[Tensor]) -> set[str]:
    """By what the recurrent call is followed."""
    _, functions = trace(model_fn, params)
    return {f.handled_by for f in functions if f.name.rpartition(".")[2] in ("lstm", "gru", "rnn_tanh", "rnn_relu")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_matrix(kind: str, layers: int, bidirectional: bool, batch_first: bool, bias: bool) -> None:
    net = make(kind, num_layers=layers, bidirectional=bidirectional, batch_first=batch_first, bias=bias)
    x, hx = inputs(batch_first), states(net)
    params = [*net.parameters(), *hx]
    run = lambda _: everything(*net(x.sin(), given(net, hx)))  # noqa: E731
    assert_products(Linearized, run, params)
    assert handled(lambda: run(None), params) == {"own rule"}


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_depend_on_parameters(kind: str) -> None:
    net, x = make(kind, num_layers=2), inputs().requires_grad_()
    assert_products(Linearized, lambda _: net((x * x).cos())[0], [x, *net.parameters()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "weight_hh_l1"])
def test_one_tensor_is_trained(kind: str, trained: str) -> None:
    net, x = make(kind, num_layers=2), inputs()
    for name, p in net.named_parameters():
        p.requires_grad_(name == trained)
    assert_products(Linearized, lambda _: everything(*net(x)), [net.get_parameter(trained)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 2])
def test_fused_kernels_of_single_precision(kind: str, layers: int) -> None:
    net, x, found = make(kind, num_layers=layers, batch_first=True), inputs(batch_first=True), []
    torch.manual_seed(1)
    v = [torch.randn_like(p) for p in net.parameters()]
    for dtype in (torch.float64, torch.float32):
        net, x = net.to(dtype), x.to(dtype)
        linear = linearized(Linearized, lambda: everything(*net(x)), list(net.parameters()))
        found.append(linear.jvp([t.to(dtype) for t in v])[1].double())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


USES: dict[str, Use] = {
    "outputs": lambda outputs, last: outputs,
    "last states": lambda outputs, last: (last[0] if isinstance(last, tuple) else last).sin(),
    "last cells": lambda outputs, last: last[-1] * 2,
    "last outputs": lambda outputs, last: outputs[-1],
    "both": lambda outputs, last: outputs.mean(0) + (last[0] if isinstance(last, tuple) else last)[-1],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use", USES)
def test_what_is_used(kind: str, use: str) -> None:
    net, x = make(kind, num_layers=2), inputs()
    assert_products(Linearized, lambda _: USES[use](*net(x)), list(net.parameters()))


@pytest.mark.parametrize("by", ["no_grad", "data"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_that_are_written_to(kind: str, by: str) -> None:
    """Products need the outputs as they were; autograd lets a write pass where its backward pass does not read them."""
    net, x = make(kind, num_layers=2), inputs()
    params = list(net.parameters())

    def run() -> Tensor:
        outputs, last = net(x)
        copy = outputs * 1
        with torch.no_grad():
            (outputs.data if by == "data" else outputs).add_(1.0)
        return everything(copy, last)

    torch.manual_seed(1)
    v = [torch.randn_like(p) for p in params]
    _, found = linearized(Linearized, run, params).jvp(v)
    _, expected = linearized(Linearized, lambda: everything(*net(x)), params).jvp(v)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_several_products_of_one_run(kind: str) -> None:
    """Of which none uses what another has left, and nothing but the runs is held."""
    net, x = make(kind, num_layers=2), inputs()
    params = list(net.parameters())
    torch.manual_seed(1)
    directions = [[torch.randn_like(p) for p in params] for _ in range(3)]
    linear = linearized(Linearized, lambda: net(x)[0].sin(), params)
    found = [linear.jvp(v)[1] for v in directions]
    for v, product in zip(directions, found, strict=True):
        _, alone = linearized(Linearized, lambda: net(x)[0].sin(), params).jvp(v)
        torch.testing.assert_close(product, alone, rtol=0, atol=0)
    last = weakref.ref(found.pop())
    del product
    assert last() is None


@pytest.mark.parametrize("kind", KINDS)
def test_one_sequence(kind: str) -> None:
    net = make(kind)
    assert_products(Linearized, lambda _: net(inputs()[:, 0])[0], list(net.parameters()))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_few_steps(kind: str, steps: int) -> None:
    net = make(kind, bidirectional=True, num_layers=2)
    assert_products(Linearized, lambda _: everything(*net(inputs()[:steps])), list(net.parameters()))


def packed(net: nn.RNNBase) -> Tensor:
    x = nn.utils.rnn.pack_sequence([inputs()[:, 0], inputs()[:3, 1]])
    result: Tensor = net(x)[0].data
    return result


OTHERS: dict[str, tuple[nn.RNNBase, Callable[[nn.RNNBase], Tensor]]] = {
    "packed": (make("lstm"), packed),
    "packed gru": (make("gru", bidirectional=True), packed),
    "projections": (make("lstm", proj_size=2), lambda net: net(inputs())[0]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_rules_leave_to_dual_numbers(name: str) -> None:
    net, run = OTHERS[name]
    assert_products(Linearized, lambda _: run(net), list(net.parameters()))
    assert handled(lambda: run(net), list(net.parameters())) == {"dual numbers"}


def test_dropout_in_evaluation_mode() -> None:
    net = make("gru", num_layers=2, dropout=0.5).eval()
    assert_products(Linearized, lambda _: net(inputs())[0], list(net.parameters()))


@pytest.mark.parametrize("kind", ["lstm", "gru", "tanh"])
def test_a_step_equals_one_by_double_backward(kind: str) -> None:
    weights = []
    for curvature in ("linearize", "double_backward"):
        net, x = make(kind, num_layers=2, batch_first=True), inputs(batch_first=True)
        optimizer = CurveBall(net.parameters(), curvature=curvature, lambd=0.3, lr=0.7)
        for _ in range(3):
            optimizer.step(lambda net=net, x=x: net(x)[0], lambda out: F.mse_loss(out, torch.ones_like(out)))
        weights.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-9, atol=1e-11)
