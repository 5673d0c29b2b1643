"""Tensors that have no memory of their own are nothing to a replay; those that wrap others are what they wrap."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

from curveball_fused import CurveBall
from tests.helpers.against_oracle import METHODS, assert_like_oracle, targets

X = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def shapes_by_fake_tensors(net: nn.Module, x: Tensor) -> Tensor:
    with FakeTensorMode() as mode:
        shape = torch.empty(4, 5).add_(1).mm(torch.ones(5, 3)).shape
    outside = mode.from_tensor(torch.ones(2))
    outside.mul_(2)
    return net(x).view(shape)


def shapes_on_meta(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).view((torch.empty(4, 5, device="meta").add_(1) @ torch.ones(5, 3, device="meta")).shape)


def traced(mode: str) -> Callable[[nn.Module, Tensor], Tensor]:
    def function(net: nn.Module, x: Tensor) -> Tensor:
        return net(make_fx(lambda a: (a * 2).add_(1), tracing_mode=mode)(x)(x))

    return function


def exported(net: nn.Module, x: Tensor) -> Tensor:
    class Doubled(nn.Module):
        def forward(self, a: Tensor) -> Tensor:
            return (a * 2).add_(1)

    return net(torch.export.export(Doubled(), (x,)).module()(x))


def functionalized(net: nn.Module, x: Tensor) -> Tensor:
    return net(torch.func.functionalize(lambda a: (a * 2).add_(1))(x))


def sparse(net: nn.Module, x: Tensor) -> Tensor:
    eye = torch.eye(4, dtype=x.dtype)
    return net(eye.to_sparse().mul_(2) @ x + eye.to_sparse_csr() @ x)


def nested(net: nn.Module, x: Tensor) -> Tensor:
    jagged = torch.nested.nested_tensor([x[:1], x[1:]], layout=torch.jagged).mul_(2)
    return net(torch.cat(jagged.unbind()))


def quantized(net: nn.Module, x: Tensor) -> Tensor:
    q = torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)
    q.copy_(torch.quantize_per_tensor(x.float() * 2, 0.1, 0, torch.qint8))
    return net(q.dequantize().to(x.dtype))


def mkldnn(net: nn.Module, x: Tensor) -> Tensor:
    return net(x.float().to_mkldnn().add_(x.float().to_mkldnn()).to_dense().to(x.dtype))


def transformed(net: nn.Module, x: Tensor) -> Tensor:
    return net(torch.func.vmap(lambda a: (a * 2).add_(1))(x))


FUNCTIONS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "fake": shapes_by_fake_tensors,
    "meta": shapes_on_meta,
    "make_fx fake": traced("fake"),
    "make_fx real": traced("real"),
    "make_fx symbolic": traced("symbolic"),
    "export": exported,
    "functionalize": functionalized,
    "sparse": sparse,
    "nested": nested,
    "quantized": quantized,
    "mkldnn": mkldnn,
    "vmap": transformed,
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_model_that_makes_such_tensors(name: str, method: str) -> None:
    assert_like_oracle(lambda: nn.Linear(5, 3), lambda net: FUNCTIONS[name](net, X), targets(4, 3), method, steps=2)


def test_linearize_inside_of_a_model_is_right_or_refused_by_name() -> None:
    def model(net: nn.Module) -> Tensor:
        return net(torch.func.linearize(torch.sin, X)[1](torch.ones_like(X)))

    assert_like_oracle(lambda: nn.Linear(5, 3), model, targets(4, 3), "auto", steps=2)


class Wrapped(nn.Linear):
    """Moves a statistic that is a tensor of two others."""

    def __init__(self) -> None:
        super().__init__(5, 3)
        self.statistic = TwoTensor(torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        with torch.no_grad():
            self.statistic.add_(1)
        return y * (1 + self.statistic.a.clone())


@pytest.mark.parametrize("method", ["auto", "forward", "double_backward"])
def test_what_a_wrapper_wraps_is_put_back(method: str) -> None:
    net = Wrapped().double()
    plain = copy.deepcopy(net)
    optimizer = CurveBall(net.parameters(), curvature=method, lambda_interval=1)
    for step in range(3):
        with torch.no_grad():
            for p, q in zip(plain.parameters(), net.parameters(), strict=True):
                p.copy_(q)
        expected = F.linear(X, plain.weight, plain.bias) * (2 + step)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, outputs = optimizer.step(lambda: net(X), targets(4, 3))
        torch.testing.assert_close(outputs, expected.detach())
        assert (net.statistic.a == step + 1).all() and (net.statistic.b == step + 1).all()
