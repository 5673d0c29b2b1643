"""The five networks of the benchmarks, with random data of the right shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.transformer_nets import CONTEXT, GPT, VOCABULARY, ViT


@dataclass(frozen=True)
class Case:
    """A network and the task that it is timed on.

    Attributes:
        name: for tables.
        build: makes the network.
        data: maps a batch size to inputs and targets.
        batch: batch size for times.
    """

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[int], tuple[Tensor, Tensor]]
    batch: int

    def make(self, batch: int | None = None) -> tuple[nn.Module, Tensor, Tensor]:
        """The same network and data at every call."""
        torch.manual_seed(0)
        return self.build(), *self.data(batch or self.batch)


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv_2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm_1, self.norm_2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm_1(self.conv_1(x)))
        return F.relu(self.norm_2(self.conv_2(inner)) + self.shortcut(x))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def basic_bn() -> nn.Module:
    """The method's small CIFAR network, with batch norm after every layer but the last."""

    def layer(before: int, after: int, kernel: int, padding: int) -> list[nn.Module]:
        norm = nn.BatchNorm2d(after, eps=1e-4)
        return [nn.Conv2d(before, after, kernel, padding=padding), norm, nn.ReLU()]

    return nn.Sequential(
        *layer(3, 32, 5, 2),
        nn.MaxPool2d(3, 2, 1),
        *layer(32, 32, 5, 2),
        nn.AvgPool2d(3, 2, 1),
        *layer(32, 64, 5, 2),
        nn.AvgPool2d(3, 2, 1),
        *layer(64, 64, 4, 0),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def resnet18() -> nn.Module:
    """ResNet-18 as usual for 32x32 images: a 3x3 stem without pooling."""
    widths = (64, 64, 64, 128, 128, 256, 256, 512, 512)
    blocks = [Residual(before, after, 1 if before == after else 2) for before, after in pairwise(widths)]
    stem = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def _text(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randint(VOCABULARY, (batch, CONTEXT)), torch.randint(VOCABULARY, (batch * CONTEXT,))


def _images(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))


def _digits(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 784), torch.randint(10, (batch,))


CASES = {
    "mlp": Case("MNIST MLP", mlp, _digits, 128),
    "gpt": Case("small GPT", GPT, _text, 32),
    "vit": Case("small ViT", ViT, _images, 16),
    "basic_bn": Case("Basic+BN", basic_bn, _images, 128),
    "resnet18": Case("ResNet-18", resnet18, _images, 32),
}
