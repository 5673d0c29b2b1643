"""The problems of the evidence of high accuracy: least squares on fixed points, all of them in every step, in float64.

A seed draws the first weights; points and targets are always the same. The loss is the mean of the squared residuals.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_image
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap

Model = Callable[[Tensor], Tensor]  # rows of inputs to rows of outputs
JACOBIAN_BYTES = 500e6  # that a method with a dense Jacobian may take for it

OMEGA = 30.0  # of the sine layers
INTERIOR, BOUNDARY, TEST_POINTS = 30**2, 120, 4000  # of Poisson's equation
KAPPA = 0.1  # of the heat equation
IMAGE = 80, 120  # pixels: more than the net has weights, so that it cannot fit them all


@dataclass(frozen=True)
class Problem:
    """A net, and what is left of the equations that it is to fulfill.

    Attributes:
        net: with its first weights.
        residuals: of a model such as the net; of any shape.
        error: of a model: what is reported.
        jacobian: that of the residuals with respect to the net's weights, (residuals, weights), or None where it is
            larger than `JACOBIAN_BYTES`.
    """

    net: nn.Module
    residuals: Callable[[Model], Tensor]
    error: Callable[[Model], float]
    jacobian: Callable[[nn.Module], Tensor] | None = None


@dataclass(frozen=True)
class Task:
    """A problem for every seed.

    Attributes:
        title: for tables and figures.
        error: what `Problem.error` is.
        seconds: of processor time that each method has.
        make: the problem with the first weights of a seed.
    """

    title: str
    error: str
    seconds: float
    make: Callable[[int], Problem]


def loss(residuals: Tensor) -> Tensor:
    return residuals.square().mean()


def poisson(seed: int) -> Problem:
    """A net u with Δu = -f on the unit square and u = 0 on its boundary, for f whose solution is sin πx sin πy."""
    net = perceptron(seed, nn.Tanh, 2, 64, 64, 48, 48, 1)
    side = torch.linspace(0, 1, 32, dtype=torch.float64)[1:-1]
    inside = torch.cartesian_prod(side, side).requires_grad_()
    edge = _boundary(BOUNDARY // 4)
    source = 2 * math.pi**2 * solution(inside.detach())
    # With these the mean of the squares is that of the interior plus that of the boundary.
    total = INTERIOR + BOUNDARY
    by_interior, by_boundary = (total / INTERIOR) ** 0.5, (total / BOUNDARY) ** 0.5
    points = torch.rand(TEST_POINTS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def residuals(u: Model) -> Tensor:
        (slope,) = torch.autograd.grad(u(inside).sum(), inside, create_graph=True)
        second = [torch.autograd.grad(slope[:, i].sum(), inside, create_graph=True)[0][:, i] for i in range(2)]
        return torch.cat([by_interior * (second[0] + second[1] + source), by_boundary * u(edge)[:, 0]])

    @torch.no_grad()
    def error(u: Model) -> float:
        return float((u(points)[:, 0] - solution(points)).square().mean().sqrt())

    def jacobian(net: nn.Module) -> Tensor:
        interior = by_interior * _rows(net, lambda u, x: hessian(lambda x: u(x)[0])(x).trace(), inside.detach())
        return torch.cat([interior, by_boundary * _rows(net, lambda u, x: u(x)[0], edge)])

    return Problem(net, residuals, error, jacobian)


def solution(x: Tensor) -> Tensor:
    return (math.pi * x).sin().prod(1)


def heat(seed: int) -> Problem:
    """A net u(x, t) with u_t = κ u_xx on the unit square, zero at both ends, for a start of two sines."""
    net = perceptron(seed, nn.Tanh, 2, 32, 32, 32, 1)
    side = torch.linspace(0, 1, 32, dtype=torch.float64)[1:-1]
    inside = torch.cartesian_prod(side, side).requires_grad_()
    edge = _boundary(BOUNDARY // 4)
    edge = edge[edge[:, 1] < 1]  # but for the last moment
    values = temperature(edge)
    total = len(inside) + len(edge)
    by_interior, by_edge = (total / len(inside)) ** 0.5, (total / len(edge)) ** 0.5
    points = torch.rand(TEST_POINTS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def residuals(u: Model) -> Tensor:
        (slope,) = torch.autograd.grad(u(inside).sum(), inside, create_graph=True)
        (second,) = torch.autograd.grad(slope[:, 0].sum(), inside, create_graph=True)
        return torch.cat([by_interior * (slope[:, 1] - KAPPA * second[:, 0]), by_edge * (u(edge)[:, 0] - values)])

    @torch.no_grad()
    def error(u: Model) -> float:
        return float((u(points)[:, 0] - temperature(points)).square().mean().sqrt())

    def jacobian(net: nn.Module) -> Tensor:
        def of_point(u: Model, x: Tensor) -> Tensor:
            return jacrev(lambda x: u(x)[0])(x)[1] - KAPPA * hessian(lambda x: u(x)[0])(x)[0, 0]

        interior = by_interior * _rows(net, of_point, inside.detach())
        return torch.cat([interior, by_edge * _rows(net, lambda u, x: u(x)[0], edge)])

    return Problem(net, residuals, error, jacobian)


def temperature(x: Tensor) -> Tensor:
    """The solution of the heat equation for rows of x and t."""
    modes = ((1, 1.0), (3, 0.5))
    return sum(  # type: ignore[return-value]
        size * (-KAPPA * (n * math.pi) ** 2 * x[:, 1]).exp() * (n * math.pi * x[:, 0]).sin() for n, size in modes
    )


def franke(seed: int) -> Problem:
    """Regression of Franke's function, two hills and a hollow, on 30 x 30 points of the unit square."""
    side = torch.linspace(0, 1, 30, dtype=torch.float64)
    x = torch.cartesian_prod(side, side)
    return _regression(perceptron(seed, nn.Tanh, 2, 40, 40, 1), x, franke_of(x)[:, None])


def franke_of(x: Tensor) -> Tensor:
    a, b = 9 * x[:, 0], 9 * x[:, 1]
    hills = 0.75 * (-((a - 2) ** 2 + (b - 2) ** 2) / 4).exp() + 0.75 * (-((a + 1) ** 2) / 49 - (b + 1) / 10).exp()
    hills = hills + 0.5 * (-((a - 7) ** 2 + (b - 3) ** 2) / 4).exp()
    return hills - 0.2 * (-((a - 4) ** 2) - (b - 7) ** 2).exp()


def sinc(seed: int) -> Problem:
    """Regression of sin(10 x) / 10 x on 200 points of [-1, 1]."""
    x = torch.linspace(-1, 1, 200, dtype=torch.float64)[:, None]
    return _regression(perceptron(seed, nn.Tanh, 1, 20, 1), x, torch.sinc(10 * x / math.pi))


def autoencoder(seed: int) -> Problem:
    """The first 1000 of scikit-learn's digits through eight numbers."""
    digits = torch.tensor(load_digits().data[:1000] / 16, dtype=torch.float64)
    return _regression(perceptron(seed, nn.Tanh, 64, 48, 24, 8, 24, 48, 64), digits, digits)


def siren(seed: int) -> Problem:
    """The gray values of scikit-learn's image of a temple, from -1 to 1, as a function of the place in [-1, 1]²."""
    image = torch.tensor(load_sample_image("china.jpg"), dtype=torch.float64).mean(2) / 127.5 - 1
    pixels = F.adaptive_avg_pool2d(image[None], IMAGE).reshape(-1, 1)
    places = torch.cartesian_prod(*(torch.linspace(-1, 1, n, dtype=torch.float64) for n in IMAGE))
    net = perceptron(seed, Sine, 2, 64, 64, 64, 1)
    for number, layer in enumerate(layer for layer in net if isinstance(layer, nn.Linear)):
        bound = math.sqrt(6 / layer.in_features) / OMEGA if number else 1 / layer.in_features
        nn.init.uniform_(layer.weight, -bound, bound)
    return _regression(net, places, pixels)


TASKS = {
    "poisson": Task("Poisson's equation", "L2 error", 25.0, poisson),
    "sinc": Task("Regression of sinc", "mean squared error", 5.0, sinc),
    "autoencoder": Task("Autoencoder", "mean squared error", 10.0, autoencoder),
    "siren": Task("Image as a SIREN", "mean squared error", 15.0, siren),
    # On these nothing was chosen.
    "heat": Task("Heat equation", "L2 error", 12.0, heat),
    "franke": Task("Franke's function", "mean squared error", 6.0, franke),
}


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(OMEGA * x)


def perceptron(seed: int, activation: type[nn.Module], *widths: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [module for a, b in pairwise(widths) for module in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1]).double()


def _regression(net: nn.Module, x: Tensor, y: Tensor) -> Problem:
    def residuals(model: Model) -> Tensor:
        return model(x) - y

    @torch.no_grad()
    def error(model: Model) -> float:
        return float(loss(residuals(model)))

    weights = sum(p.numel() for p in net.parameters())
    fits = y.numel() * weights * y.element_size() <= JACOBIAN_BYTES
    return Problem(net, residuals, error, (lambda net: _rows(net, lambda u, x: u(x)[0], x)) if fits else None)


def _boundary(points: int) -> Tensor:
    """So many points on each side of the unit square."""
    t = torch.linspace(0, 1, points + 1, dtype=torch.float64)[:-1]
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    sides = (t, zero), (one, t), (1 - t, one), (zero, 1 - t)
    return torch.cat([torch.stack(side, 1) for side in sides])


def _rows(net: nn.Module, residual: Callable[[Model, Tensor], Tensor], points: Tensor) -> Tensor:
    """The derivatives by the weights of a residual that depends on one point, for every point."""

    def of_point(weights: dict[str, Tensor], point: Tensor) -> Tensor:
        return residual(lambda x: functional_call(net, weights, (x,)), point)

    weights = {name: p.detach() for name, p in net.named_parameters()}
    blocks = vmap(jacrev(of_point), in_dims=(None, 0))(weights, points)
    return torch.cat([block.flatten(1) for block in blocks.values()], 1)
