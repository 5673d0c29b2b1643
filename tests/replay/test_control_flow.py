"""Torch's control-flow operators are followed as the `if` and the loops that they stand for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.against_oracle import METHODS, assert_like_oracle, targets

X = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self, inner: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.inner = nn.Linear(5, 4), nn.Linear(4, 3), inner
        self.register_buffer("calls", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self, x))


def cond(net: nn.Module, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 99, torch.tanh, torch.sigmoid, (net.first(x),))


def cond_over_parameters(net: nn.Module, x: Tensor) -> Tensor:
    def branch(x: Tensor) -> Tensor:
        net.calls += 1  # a buffer, written inside
        return torch.sigmoid(net.first(x))

    return torch.cond(x.sum() > 99, torch.tanh, branch, (x,))


def cond_written(net: nn.Module, x: Tensor) -> Tensor:
    return torch.sigmoid(net.first(x))


def counted(net: nn.Module, x: Tensor) -> Tensor:
    net.calls += 1
    return cond_written(net, x)


def while_loop(net: nn.Module, x: Tensor) -> Tensor:
    from torch._higher_order_ops import while_loop

    def body(i: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, torch.tanh(h * net.first.bias)

    return while_loop(lambda i, h: i < 3, body, (torch.tensor(0), net.first(x)))[1]


def while_written(net: nn.Module, x: Tensor) -> Tensor:
    h = net.first(x)
    for _ in range(3):
        h = torch.tanh(h * net.first.bias)
    return h


def scan(net: nn.Module, x: Tensor) -> Tensor:
    from torch._higher_order_ops import scan

    def combine(carry: tuple[Tensor, Tensor], h: Tensor) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        a, b = carry
        return (torch.tanh(a + h), b * net.first.bias), {"sum": a * h, "b": b + h}

    h = net.first(x)
    (a, b), out = scan(combine, (h[0], h[1]), h, dim=0, reverse=True)
    return out["sum"] * a + out["b"] * b


def scan_written(net: nn.Module, x: Tensor) -> Tensor:
    h = net.first(x)
    a, b, sums, bs = h[0], h[1], [], []
    for row in h.flip(0):
        sums.append(a * row)
        bs.append(b + row)
        a, b = torch.tanh(a + row), b * net.first.bias
    return torch.stack(sums).flip(0) * a + torch.stack(bs).flip(0) * b


def mapped(net: nn.Module, x: Tensor) -> Tensor:
    from torch._higher_order_ops.map import map as map_rows

    out = map_rows(lambda h, w: {"y": torch.tanh(h * net.first.bias) @ w}, net.first(x), net.last.weight.T)
    return out["y"] @ net.last.weight


def mapped_written(net: nn.Module, x: Tensor) -> Tensor:
    return torch.tanh(net.first(x) * net.first.bias) @ net.last.weight.T @ net.last.weight


PAIRS = {
    "cond": (cond, cond_written),
    "cond over parameters": (cond_over_parameters, counted),
    "while_loop": (while_loop, while_written),
    "scan": (scan, scan_written),
    "map": (mapped, mapped_written),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PAIRS)
def test_control_flow_is_followed(name: str, method: str) -> None:
    operator, written = PAIRS[name]
    assert_like_oracle(
        lambda: Net(operator), lambda net: net(X), targets(4, 3), method, reference=lambda: Net(written), steps=3
    )
