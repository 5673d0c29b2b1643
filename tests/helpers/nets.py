"""Small nets in float64, each with an input, for tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width)).mean(1)


class Tied(nn.Module):
    """An embedding that is also the output layer, as in language models."""

    def __init__(self, words: int = 5, width: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.hidden = nn.Linear(width, width)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.hidden(self.embedding(tokens))) @ self.embedding.weight.T


def conv_bn() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4),
        nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    return net, torch.randn(6, 1, 8, 8)


def attention() -> tuple[nn.Module, Tensor]:
    return Attention(), torch.randn(5, 4, 8)


def dropout() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Linear(6, 8),
        nn.GELU(),
        nn.Dropout(0.4),
        nn.Linear(8, 8),
        nn.Tanh(),
        nn.Dropout(0.2),
        nn.Linear(8, 3),
    )
    return net, torch.randn(7, 6)


def tied() -> tuple[nn.Module, Tensor]:
    return Tied(), torch.randint(0, 5, (6,))


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "convolution + batch norm": conv_bn,
    "attention": attention,
    "dropout": dropout,
    "tied weights": tied,
}


def make(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """The net and its input in float64, in train mode."""
    torch.manual_seed(seed)
    net, x = NETS[name]()
    net = net.double()
    return net, x.double() if x.is_floating_point() else x
