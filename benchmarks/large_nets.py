"""The two networks that steps in the metric are timed on where there is a GPU: GPT-2 small and ResNet-50."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.nets import Case
from benchmarks.transformer_nets import GPT

VOCABULARY, CONTEXT = 50257, 1024
SIDE, CLASSES = 224, 1000


class Bottleneck(nn.Module):
    """Convolutions of 1, 3 and 1 beside a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        self.reduce, self.norm_1 = nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv, self.norm_2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.widen, self.norm_3 = nn.Conv2d(width, after, 1, bias=False), nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm_1(self.reduce(x)))
        inner = F.relu(self.norm_2(self.conv(inner)))
        return F.relu(self.norm_3(self.widen(inner)) + self.shortcut(x))


def resnet50() -> nn.Module:
    """ResNet-50 for images of 224 x 224; strides stand in the convolutions of 3."""
    blocks, before = [], 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(count):
            blocks.append(Bottleneck(before, width, 2 if i == 0 and width > 64 else 1))
            before = 4 * width
    stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, CLASSES))


def gpt2_small() -> nn.Module:
    return GPT(768, 12, 12, VOCABULARY, CONTEXT, tied=True)


def text(vocabulary: int, context: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Random tokens, and others to predict."""
    return lambda batch: (torch.randint(vocabulary, (batch, context)), torch.randint(vocabulary, (batch * context,)))


def images(side: int, classes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda batch: (torch.randn(batch, 3, side, side), torch.randint(classes, (batch,)))


LARGE = {
    "gpt2_small": Case("GPT-2 small", gpt2_small, text(VOCABULARY, CONTEXT), 8),
    "resnet50": Case("ResNet-50", resnet50, images(SIDE, CLASSES), 64),
}
