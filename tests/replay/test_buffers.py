"""Buffers that a run gives another size or memory; buffers of quantization; those inside of scripted modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantize,
    HistogramObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)

from curveball_fused import CurveBall
from tests.helpers.against_oracle import METHODS, after_one_run

X = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def resize(buffer: Tensor, value: Tensor) -> None:
    buffer.resize_(value.shape).copy_(value)


def resize_as(buffer: Tensor, value: Tensor) -> None:
    buffer.resize_as_(value).copy_(value)


def set_(buffer: Tensor, value: Tensor) -> None:
    buffer.set_(value.clone())


def data(buffer: Tensor, value: Tensor) -> None:
    buffer.data = value.clone()


def storage(buffer: Tensor, value: Tensor) -> None:
    memory = buffer.untyped_storage()
    memory.resize_(value.numel() * value.element_size())
    buffer.set_(memory, 0, value.shape, value.stride())
    buffer.copy_(value)


def written_then_replaced(buffer: Tensor, value: Tensor) -> None:
    buffer.add_(1)
    buffer.data = value.clone()
    buffer.mul_(1.0)


class Resizing(nn.Module):
    """Keeps a mean of what comes in, of another size than before in the first run, or in every run."""

    def __init__(self, write: Callable[[Tensor, Tensor], None], empty: bool, grows: bool) -> None:
        super().__init__()
        self.linear, self.write, self.grows = nn.Linear(5, 4), write, grows
        self.register_buffer("mean", torch.empty(0) if empty else torch.zeros(2, 3))
        self.register_buffer("frozen", torch.ones(4))
        self.mean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        new = y.detach().mean(0)
        if self.grows:
            new = torch.cat((self.mean.flatten(), new))
        elif self.mean.shape == new.shape:
            new = 0.9 * self.mean + 0.1 * new
        self.write(self.mean, new)
        return y * (1 + self.mean.clone().sum())


@pytest.mark.parametrize("method", ["auto", "forward", "double_backward"])
@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("write", [resize, resize_as, set_, data, storage, written_then_replaced])
def test_a_buffer_changes_its_place_as_in_one_run(
    write: Callable[[Tensor, Tensor], None], empty: bool, grows: bool, method: str
) -> None:
    net = Resizing(write, empty, grows).double()
    optimizer = CurveBall(net.parameters(), curvature=method, lambda_interval=2, lr=0.7)
    for _ in range(4):
        once, kept = after_one_run(net, lambda net: net(X)), net.mean
        optimizer.step(lambda: net(X), lambda out: out.square().mean())
        assert net.mean is kept and net.mean.stride() == once.mean.stride()
        torch.testing.assert_close(net.mean, once.mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["auto", "forward", "double_backward"])
def test_a_model_that_fails_leaves_sizes_and_memory(method: str) -> None:
    for write in (resize, set_, data, storage):
        net = Resizing(write, empty=False, grows=True).double()
        before, place = net.mean.clone(), net.mean.data_ptr()

        def model(net: nn.Module = net) -> Tensor:
            net(X)
            raise ArithmeticError("no")

        with pytest.raises(ArithmeticError, match="no"):
            CurveBall(net.parameters(), curvature=method).step(model, lambda out: out.square().mean())
        assert torch.equal(net.mean, before)
        assert write in (resize, storage) or net.mean.data_ptr() == place  # those allocate the same memory anew


class Offloaded(nn.Module):
    """Frees the memory of a table after its use, and fills it again before the next, as sharded models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)
        self.register_buffer("table", torch.zeros(4, dtype=torch.float64))
        self.table.untyped_storage().resize_(0)

    def forward(self, x: Tensor) -> Tensor:
        self.table.untyped_storage().resize_(32)
        self.table.copy_(torch.arange(4) + 1.0)
        y = self.linear(x) * self.table.clone()
        self.table.untyped_storage().resize_(0)
        return y


@pytest.mark.parametrize("method", METHODS)
def test_memory_that_is_freed_between_the_runs(method: str) -> None:
    net = Offloaded()
    net.linear.double()
    optimizer = CurveBall(net.parameters(), curvature=method, lambda_interval=1)
    plain = nn.Linear(5, 4).double()
    plain.load_state_dict(net.linear.state_dict())
    other = CurveBall(plain.parameters(), curvature=method, lambda_interval=1)
    for _ in range(3):
        loss, _ = optimizer.step(lambda: net(X), lambda out: out.square().mean())
        expected, _ = other.step(lambda: plain(X) * (torch.arange(4) + 1.0), lambda out: out.square().mean())
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        assert net.table.untyped_storage().nbytes() == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "observer", [MovingAveragePerChannelMinMaxObserver, PerChannelMinMaxObserver, HistogramObserver]
)
@pytest.mark.parametrize("method", ["auto", "double_backward"])
def test_observers_move_as_in_one_run(observer: type, method: str) -> None:
    per_channel = observer is not HistogramObserver
    scheme = torch.per_channel_symmetric if per_channel else torch.per_tensor_affine
    options = {"ch_axis": 0} if per_channel else {}

    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
            self.quantize = FakeQuantize(
                observer, quant_min=-128, quant_max=127, dtype=torch.qint8, qscheme=scheme, **options
            )

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(F.linear(x, self.quantize(self.first.weight), self.first.bias))
            return self.last(hidden)

    torch.manual_seed(0)
    net, x = Quantized(), X.float()
    optimizer = CurveBall(net.parameters(), curvature=method, lambda_interval=2)
    losses = []
    for _ in range(4):
        once = after_one_run(net, lambda net: net(x))
        losses.append(optimizer.step(lambda: net(x), lambda out: (out - 1).square().mean())[0])
        for (name, ours), theirs in zip(net.named_buffers(), once.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("interval", [1, 1000])
def test_statistics_of_a_scripted_module_move_once(interval: int) -> None:
    net = torch.jit.script(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double())
    optimizer = CurveBall(net.parameters(), curvature="double_backward", lambda_interval=interval)
    for _ in range(3):
        once = torch.jit.script(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double())
        once.load_state_dict(net.state_dict())
        once(X)
        optimizer.step(lambda: net(X), lambda out: out.square().mean())
        for ours, theirs in zip(net.buffers(), once.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
