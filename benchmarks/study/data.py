"""Data of the study's tasks, all of it at hand without a network: digits, Fashion-MNIST, text, functions, equations.

Fashion-MNIST is read from the directory that the environment variable FASHION_MNIST names, by default where Debian's
package puts it.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.economy import source_text

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import demo_data

VISCOSITY = 0.01 / math.pi
BOUNDARY_WEIGHT = 10.0  # of boundary values among a PINN's residuals; its square in the loss


@dataclass(frozen=True)
class Data:
    """Inputs and targets, one row a sample, to train on and to validate with."""

    x: Tensor
    y: Tensor
    validation_x: Tensor
    validation_y: Tensor


@functools.cache
def digits() -> Data:
    """1437 images of 8x8, and 360."""
    data = demo_data.digits()
    return Data(data.train_images, data.train_classes, data.test_images, data.test_classes)


@functools.cache
def fashion(number: int, flat: bool = False) -> Data:
    """The first `number` images of Fashion-MNIST, and 2000 of its test set; flat: as vectors of 784."""
    data = _fashion()
    images, test = data.train_images[:number], data.test_images[:2000]
    if flat:
        images, test = images.flatten(1), test.flatten(1)
    return Data(images, data.train_classes[:number], test, data.test_classes[:2000])


@functools.cache
def _fashion() -> demo_data.Data:
    return demo_data.fashion_mnist(Path(os.environ.get("FASHION_MNIST", demo_data.FASHION_DIR)))


@functools.cache
def text() -> Data:
    """1792 pieces of 64 characters of Python's standard library with the character after each, and 256."""
    x, y = source_text(Path())
    return Data(x[:-256], y[:-256], x[-256:], y[-256:])


def reconstruction(data: Data) -> Data:
    """The task of an autoencoder: the inputs are the targets."""
    x, validation_x = data.x.flatten(1), data.validation_x.flatten(1)
    return Data(x, x, validation_x, validation_x)


@functools.cache
def regression() -> Data:
    """A function of 8 inputs with products, oscillation and a jump, at 5000 points, and at 1000."""
    x = torch.rand(6000, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    smooth = torch.sin(3 * x[:, 0] * x[:, 1]) + torch.exp(x[:, 2]) * x[:, 3] + torch.sin(5 * x[:, 4])
    y = smooth + 0.5 * (x[:, 5] * x[:, 6] > 0)
    y = ((y - y.mean()) / y.std())[:, None]
    return Data(x[:5000], y[:5000], x[5000:], y[5000:])


@functools.cache
def teacher() -> Data:
    """Outputs of a random net for inputs whose scales differ a hundredfold, at 6000 points, and at 1000."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(7000, 32, generator=g)
    inner, outer = torch.randn(32, 48, generator=g) / 32**0.5, torch.randn(48, 4, generator=g) / 48**0.5
    y = torch.relu(2 * x @ inner) @ outer
    y = (y - y.mean(0)) / y.std(0) + 0.05 * torch.randn(7000, 4, generator=g)
    x = x * torch.logspace(-1, 1, 32)
    return Data(x[:6000], y[:6000], x[6000:], y[6000:])


@functools.cache
def poisson() -> Data:
    """Points of the unit square for -Δu = 2π² sin πx sin πy with u = 0 on the boundary.

    A row has a point inside and one on the boundary; its targets are what Δu and the weighted u should be there.
    """

    def rows(number: int, seed: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        inside, boundary = torch.rand(2, number, 2, generator=g)
        row = torch.arange(number)
        boundary[row, row % 2] = (row // 2 % 2).float()
        laplacian = -2 * math.pi**2 * poisson_solution(inside)
        return torch.cat([inside, boundary], 1), torch.stack([laplacian, torch.zeros(number)], 1)

    return Data(*rows(4096, 0), *rows(1024, 1))


def poisson_solution(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x).prod(1)


@functools.cache
def burgers() -> Data:
    """Points for Burgers' equation u_t + u u_x = ν u_xx on [-1, 1] x [0, 1], -sin πx at first, 0 at the ends.

    A row has a point (x, t) inside and one on the boundary; its targets are the residual, 0, and the weighted u.
    """

    def rows(number: int, seed: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        inside, boundary = torch.rand(2, number, 2, generator=g)
        inside[:, 0] = 2 * inside[:, 0] - 1
        boundary[:, 0] = 2 * boundary[:, 0] - 1
        boundary[: number // 2, 1] = 0
        boundary[number // 2 :, 0] = boundary[number // 2 :, 0].sign()
        u = torch.where(boundary[:, 1] == 0, -torch.sin(math.pi * boundary[:, 0]), 0)
        return torch.cat([inside, boundary], 1), torch.stack([torch.zeros(number), BOUNDARY_WEIGHT * u], 1)

    return Data(*rows(1024, 0), *rows(1024, 1))


def burgers_solution(x: Tensor) -> Tensor:
    """Burgers' solution by the transform of Cole and Hopf; its integrals over the heat kernel by Gauss and Hermite."""
    nodes, weights = np.polynomial.hermite.hermgauss(120)
    s, w = torch.tensor(nodes), torch.tensor(weights)
    position, time = x.double().split(1, 1)
    shifted = position - 2 * (VISCOSITY * time).sqrt() * s
    f = torch.exp(-torch.cos(math.pi * shifted) / (2 * math.pi * VISCOSITY)) * w
    return (-(torch.sin(math.pi * shifted) * f).sum(1) / f.sum(1)).float()
