"""The networks of the study, each small enough to be trained in some seconds on one core."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.nets import Residual
from benchmarks.study.data import BOUNDARY_WEIGHT, VISCOSITY
from benchmarks.transformer_nets import VOCABULARY, ViT


def perceptron(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation between any two."""
    layers = [module for a, b in pairwise(widths) for module in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


def digits_conv() -> nn.Module:
    """Two convolutions with batch norm for 8x8 images."""
    return nn.Sequential(*_normalized(1, 16), *_normalized(16, 32), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10))


def conv_bn() -> nn.Module:
    """Three convolutions with batch norm for 28x28 images."""
    return nn.Sequential(
        *_normalized(1, 16),
        nn.MaxPool2d(2),
        *_normalized(16, 32),
        nn.MaxPool2d(2),
        *_normalized(32, 32),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(288, 10),
    )


def _normalized(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]


def lenet() -> nn.Module:
    """Two convolutions and three linear layers for 28x28 images, without any normalization."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        *perceptron(400, 120, 84, 10),
    )


def resnet() -> nn.Module:
    """A residual network of nine layers for 28x28 images."""
    stem = nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    blocks = Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def vit() -> nn.Module:
    """A vision transformer for 28x28 images: patches of 7x7."""
    return ViT(64, 2, 4, channels=1, side=28, patch=7)


class CharacterLSTM(nn.Module):
    """An LSTM that predicts the next character; returns one row of logits per position."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, 32)
        self.recurrent = nn.LSTM(32, width, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.recurrent(self.token(tokens))
        logits: Tensor = self.head(states).flatten(0, 1)
        return logits


class RowGRU(nn.Module):
    """A GRU that reads a 28x28 image row by row and classifies it by its last state."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(28, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        states, _ = self.recurrent(images[:, 0])
        logits: Tensor = self.head(states[:, -1])
        return logits


class Pinn(nn.Module):
    """A function u of two variables; called with rows of `data.poisson` or `data.burgers`, returns their residuals.

    Args:
        widths: of the layers.
        equation: "poisson": Δu, or "burgers": u_t + u u_x - ν u_xx, at the points inside.
    """

    def __init__(self, widths: tuple[int, ...], equation: str) -> None:
        super().__init__()
        self.u, self.equation = perceptron(*widths, activation=nn.Tanh), equation

    def forward(self, rows: Tensor) -> Tensor:
        inside = rows[:, :2].detach().requires_grad_()
        boundary = BOUNDARY_WEIGHT * self.u(rows[:, 2:])[:, 0]
        u = self.u(inside)
        (first,) = torch.autograd.grad(u.sum(), inside, create_graph=True)
        second = [torch.autograd.grad(first[:, i].sum(), inside, create_graph=True)[0][:, i] for i in range(2)]
        if self.equation == "poisson":
            return torch.stack([second[0] + second[1], boundary], 1)
        return torch.stack([first[:, 1] + u[:, 0] * first[:, 0] - VISCOSITY * second[0], boundary], 1)


def cross_entropy(outputs: Tensor, classes: Tensor) -> Tensor:
    """One class for each row of outputs, given in any shape."""
    return F.cross_entropy(outputs, classes.flatten())
