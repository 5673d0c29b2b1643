"""The networks of the method's experiments, narrow enough for one core: Basic, ResNet-18, a small VGG-f, the MLP."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from benchmarks.nets import Residual
from benchmarks.study.nets import perceptron

WIDTH = 16  # of Basic's first layers, where the method's has 32, and of VGG-f's, where it has 64
RESIDUAL_WIDTH = 8  # of ResNet-18's first blocks, where the method's has 64
HIDDEN = 256  # of VGG-f's linear layers, where it has 4096


def mlp() -> nn.Module:
    return perceptron(784, 128, 64, 32, 10, activation=nn.Tanh)


def basic(norms: bool, dropout: float = 0.0) -> nn.Module:
    """Four convolutions and a linear layer for 28x28 images, with or without batch norm after each convolution."""

    def layer(before: int, after: int, kernel: int, padding: int) -> list[nn.Module]:
        norm = [nn.BatchNorm2d(after, eps=1e-4)] if norms else []
        return [nn.Conv2d(before, after, kernel, padding=padding), *norm, nn.ReLU()]

    return nn.Sequential(
        *layer(1, WIDTH, 5, 2),
        nn.MaxPool2d(3, 2, 1),
        *layer(WIDTH, WIDTH, 5, 2),
        nn.AvgPool2d(3, 2, 1),
        *layer(WIDTH, 2 * WIDTH, 5, 2),
        nn.AvgPool2d(3, 2, 1),
        *layer(2 * WIDTH, 2 * WIDTH, 4, 0),
        nn.Flatten(),
        *_dropout(dropout),
        nn.Linear(2 * WIDTH, 10),
    )


def resnet18(dropout: float = 0.0) -> nn.Module:
    """ResNet-18 for 28x28 images: a 3x3 stem of stride 2 without pooling, and four stages of two residual blocks."""
    widths = [RESIDUAL_WIDTH * factor for factor in (1, 1, 1, 2, 2, 4, 4, 8, 8)]
    blocks = [Residual(before, after, 1 if before == after else 2) for before, after in pairwise(widths)]
    stem = nn.Conv2d(1, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), *_dropout(dropout), nn.Linear(widths[-1], 10)
    return nn.Sequential(*stem, *blocks, *head)


def vgg_f(classes: int) -> nn.Module:
    """VGG-f's five convolutions and three linear layers, with batch norm after all but the last, for 64x64 images."""

    def layer(before: int, after: int, kernel: int, stride: int, padding: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, kernel, stride, padding), nn.BatchNorm2d(after), nn.ReLU()]

    def linear(before: int) -> list[nn.Module]:
        return [nn.Linear(before, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU()]

    wide = 4 * WIDTH
    return nn.Sequential(
        *layer(3, WIDTH, 11, 4, 2),
        nn.MaxPool2d(3, 2),
        *layer(WIDTH, wide, 5, 1, 2),
        nn.MaxPool2d(3, 2),
        *layer(wide, wide, 3, 1, 1),
        *layer(wide, wide, 3, 1, 1),
        *layer(wide, wide, 3, 1, 1),
        nn.MaxPool2d(3, 2),
        nn.Flatten(),
        *linear(wide),
        *linear(HIDDEN),
        nn.Linear(HIDDEN, classes),
    )


def _dropout(share: float) -> list[nn.Module]:
    return [nn.Dropout(share)] if share else []
