"""A step runs the model several times as the same function, and leaves the world as one run would."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from curveball_fused import CurveBall


class Stateful(nn.Module):
    """Changes buffers in every way: batch norm, in place, through views, by assignment; draws from three generators."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("table", torch.zeros(2, 4))
        self.register_buffer("average", torch.zeros(4))
        self.generator = torch.Generator().manual_seed(7)
        self.calls: Tensor
        self.table: Tensor
        self.average: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.linear(x))
        y += self.table[0]  # in place on what the run computed itself
        with torch.no_grad():
            self.calls += 1
            self.table[0] += y.mean(0)  # twice, through two views of the same memory
            self.table[0] *= 0.5
            self.average = 0.9 * self.average + 0.1 * y.mean(0)
        noise = torch.rand(4, generator=self.generator, dtype=y.dtype)
        return F.dropout(y, 0.3) * (1 + random.random()) * self.table[0] * noise + self.average


@pytest.mark.parametrize("curvature", ["linearize", "forward", "double_backward"])
@pytest.mark.parametrize("interval", [1, 1000])
def test_a_step_leaves_what_one_run_leaves(curvature: str, interval: int) -> None:
    model, x = Stateful().double(), torch.randn(6, 3, dtype=torch.float64)
    optimizer = CurveBall(model.parameters(), curvature=curvature, lambda_interval=interval, lr=0.7)
    for step in range(3):
        once = copy.deepcopy(model)
        once.generator.set_state(model.generator.get_state())
        random.seed(step)
        torch.manual_seed(step)
        with torch.no_grad():
            expected = once(x)
        drawn = torch.rand(2), random.random()
        random.seed(step)
        torch.manual_seed(step)
        _, outputs = optimizer.step(lambda: model(x), lambda out: out.square().mean())
        torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(torch.rand(2), drawn[0]) and random.random() == drawn[1]
        for (name, ours), theirs in zip(model.named_buffers(), once.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
            assert not ours.requires_grad
        assert torch.equal(model.generator.get_state(), once.generator.get_state())


class Ticking(nn.Linear):
    """Reads a buffer, then writes to it twice, through two views of the same memory."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.register_buffer("table", torch.zeros(2, 4))
        self.table: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x) * (1 + self.table[0])
        self.table[0] += 1
        self.table[0] *= 0.5
        return y


@pytest.mark.parametrize(
    "make",
    [lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)), Ticking],
    ids=["dropout", "ticking"],
)
def test_ratio_compares_the_same_function(make: Callable[[], nn.Module]) -> None:
    """γ tends to 1 as the step tends to 0, but only if dropout and buffers are the same at both points."""
    model = make().double()
    x = torch.randn(6, 3, dtype=torch.float64)
    optimizer = CurveBall(model.parameters(), lr=1e-7, lambda_interval=1)
    for _ in range(3):
        optimizer.step(lambda: model(x), lambda out: out.square().mean())
        assert optimizer.stats()["ratio"].item() == pytest.approx(1, abs=1e-5)


def test_a_value_cached_in_the_first_run_survives() -> None:
    """A tensor that the run itself makes and fills in place must not be put back to what it was while half made."""
    layer, cache = nn.Linear(3, 3), {}

    def model() -> Tensor:
        if "mask" not in cache:
            cache["mask"] = torch.ones(3, 3).triu_()
        return layer(torch.eye(3)) * cache["mask"]

    CurveBall(layer.parameters()).step(model, lambda out: out.square().mean())
    assert torch.equal(cache["mask"], torch.ones(3, 3).triu())


def test_checkpointed_batch_norm_moves_its_statistics_once() -> None:
    for curvature in ("auto", "double_backward"):
        model, x = (
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).double(),
            torch.randn(6, 3).double(),
        )
        optimizer = CurveBall(model.parameters(), curvature=curvature)

        def run(model: nn.Module = model, x: Tensor = x) -> Tensor:
            outputs: Tensor = checkpoint(model, x, use_reentrant=False)
            return outputs

        for _ in range(2):
            optimizer.step(run, lambda out: out.square().mean())
        assert model[1].num_batches_tracked == 2


@pytest.mark.filterwarnings("ignore:curveball_fused")
@pytest.mark.parametrize("followed", [True, False], ids=["by the last method", "by none"])
def test_what_refused_methods_have_run_leaves_nothing(followed: bool) -> None:
    """Methods that end before the model writes to its state, and the look whose fault that is, which goes on."""

    class NoGraph(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad

    class Counted(nn.BatchNorm1d):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    first, norm = parametrizations.weight_norm(nn.Linear(3, 4)).double(), Counted(4).double()
    x, y = torch.randn(6, 3).double(), torch.randn(6, 4).double()

    def model() -> Tensor:  # no forward mode through weight norm, and no tape in checkpoints
        h = checkpoint(first, x, use_reentrant=False)
        return norm(h if followed else NoGraph.apply(h))

    before, after = copy.deepcopy(norm), copy.deepcopy(norm)
    after(first(x))
    optimizer = CurveBall([*first.parameters(), *norm.parameters()])
    if followed:
        optimizer.step(model, lambda out: F.mse_loss(out, y))
    else:
        with pytest.raises(RuntimeError, match="cannot follow this model"):
            optimizer.step(model, lambda out: F.mse_loss(out, y))
    expected = after if followed else before
    assert norm.calls == expected.calls
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(buffer, expected.get_buffer(name), rtol=1e-12, atol=0)
