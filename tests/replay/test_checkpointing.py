"""What gradient checkpoints compute again is by the kernels, and with the numbers, of the first run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from curveball_fused import CurveBall
from tests.helpers.against_oracle import METHODS, targets

X = torch.randn(5, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
Run = Callable[..., Tensor]


class Attention(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.qkv, self.dropout = nn.Linear(8, 24), dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
        return y.transpose(1, 2).reshape(x.shape)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], dropout: float) -> None:
        super().__init__()
        self.layer = kind(8, 8, 2, batch_first=True, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)[0]
        return y


class TwiceNormed(nn.Module):
    """Call one layer twice, at either of which spectral norm moves its vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = parametrizations.spectral_norm(nn.Linear(8, 8), n_power_iterations=1)
        nn.init.normal_(self.layer.parametrizations.weight[0]._u)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(torch.tanh(self.layer(x))))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: Attention(0.0),
    "attention with dropout": lambda: Attention(0.3),
    "lstm": lambda: Recurrent(nn.LSTM, 0.0),
    "gru with dropout": lambda: Recurrent(nn.GRU, 0.4),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Tanh()),
    "spectral norm, twice": lambda: TwiceNormed(),
    "batch norm": lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(4), nn.Dropout(0.4), nn.GELU()),
}


def plain(function: Run, *args: Any) -> Tensor:
    return function(*args)


again: Run = partial(checkpoint, use_reentrant=False)


def nested(function: Run, x: Tensor) -> Tensor:
    return again(lambda h: again(function, h), x)


def offloaded(function: Run, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return function(x)


def sequential(function: Run, x: Tensor) -> Tensor:
    outputs: Tensor = checkpoint_sequential([function, nn.Identity()], 2, x, use_reentrant=False)
    return outputs


def steps(make: Callable[[], nn.Module], run: Run, method: str) -> list[Tensor]:
    """Take three steps; return all that they leave."""
    torch.manual_seed(5)
    block, out = make().double(), nn.Linear(8, 3).double()
    params = [*block.parameters(), *out.parameters()]
    optimizer = CurveBall(params, curvature=method, lr=0.9, lambd=0.7, lambda_interval=1)
    for _ in range(3):
        optimizer.step(lambda: out(run(block, X)).mean(1), targets(5, 3))
    return [*params, *block.buffers(), *optimizer.stats().values(), torch.rand(2)]


@pytest.mark.parametrize("method", ["auto", "forward", "double_backward"])
@pytest.mark.parametrize(
    "run", [again, nested, offloaded, sequential], ids=["once", "nested", "offloaded", "sequential"]
)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_checkpointed_model_steps_as_the_plain_one(name: str, run: Run, method: str) -> None:
    for ours, theirs in zip(steps(BLOCKS[name], run, method), steps(BLOCKS[name], plain, method), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("inside", ["parameters", "data"])
def test_checkpoints_of_the_older_kind_are_refused_in_one_sentence(inside: str, method: str) -> None:
    first, last = nn.Linear(8, 4).double(), nn.Linear(4, 3).double()
    params = [*first.parameters(), *last.parameters()]
    before = [p.detach().clone() for p in params]

    def model() -> Tensor:
        function = (lambda h: last(torch.tanh(h))) if inside == "parameters" else torch.tanh
        y: Tensor = checkpoint(function, first(X[:, 0]), use_reentrant=True)
        return y if inside == "parameters" else last(y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if method == "forward" else "error")
        with pytest.raises(RuntimeError, match=r"^model_fn uses reentrant.* with use_reentrant=False\.$"):
            CurveBall(params, curvature=method).step(model, targets(5, 3))
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert all(p.grad is None for p in params)
