"""Small problems whose 2x2 system dense matrices give, and the cases of `solve` in which every backend is compared."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from curveball_fused.backends.scalars import SCALARS


class Problem:
    """A random small problem: Jacobian, curvature of the loss, gradient and z, and all that follows from them.

    `metric`: whether the damping is of another metric than the Euclidean one. `theta`: see `ops.solve`.
    """

    def __init__(
        self,
        seed: int,
        lambd: float,
        scale: float = 1.0,
        convex: bool = True,
        zero_z: bool = False,
        theta: float = 1.0,
        metric: bool = False,
    ) -> None:
        rng = np.random.default_rng(seed)
        j, root, g = rng.normal(size=(4, 9)), rng.normal(size=(4, 4)), rng.normal(size=4)
        h = root @ root.T if convex else -root @ root.T
        z = np.zeros(9) if zero_z else scale * rng.normal(size=9)
        r = j.T @ (theta * h @ j @ z + g)
        p_root = rng.normal(size=(9, 9))
        p = p_root @ p_root.T + 0.1 * np.eye(9) if metric else np.eye(9)
        u = np.linalg.solve(p, r)
        jz, ju = j @ z, j @ u
        self.lambd, self.theta, self.z, self.u, self.g = lambd, theta, z, u, g
        self.products = torch.tensor([g @ jz, jz @ h @ jz, g @ ju, jz @ h @ ju, ju @ h @ ju])
        self.dots = torch.tensor([z @ p @ z, z @ p @ u, u @ p @ u])
        self.gradient, self.curvature = j.T @ g, j.T @ h @ j + lambd * p
        self.delta = u + theta * lambd * z
        basis = np.stack((self.delta, z), axis=1)
        self.a, self.b = basis.T @ self.curvature @ basis, basis.T @ self.gradient

    def model(self, beta: float, rho: float) -> float:
        """½ xᵀAx - x·b, which the coefficients minimize."""
        x = np.array([beta, -rho])
        return float(x @ self.a @ x / 2 - x @ self.b)

    def change(self, step: Any) -> float:
        """What the quadratic model of the damped loss says of a step of the weights."""
        return float(self.gradient @ step + step @ self.curvature @ step / 2)


class Case(NamedTuple):
    """One call of `solve`."""

    scalars: Tensor
    loss: Tensor
    products: Tensor
    dots: Tensor | None
    fixed: dict[str, float]
    lr: float
    options: dict[str, Any]

    def arguments(self) -> tuple[Any, ...]:
        """Those of a backend's `solve`."""
        beta, rho = self.fixed.get("beta"), self.fixed.get("rho")
        theta, average, bounded = (self.options[name] for name in ("theta", "average", "bounded"))
        return self.scalars, self.loss, self.products, self.dots, beta, rho, self.lr, None, theta, average, bounded


KINDS = ("convex", "convex", "concave", "no z", "parallel", "infinite")
FIXED: tuple[dict[str, float], ...] = ({}, dict(beta=0.3), dict(rho=1.2), dict(beta=0.3, rho=0.8))


def cases(metrics: tuple[bool, ...] = (False, True)) -> Iterator[Case]:
    """Every combination of what is fixed and of options, on systems of every kind, early and late in a training."""
    options = itertools.product(FIXED, (1.0, 0.0, 0.4), (0.0, 0.9), (False, True), metrics, KINDS)
    for seed, (fixed, theta, average, bounded, metric, kind) in enumerate(options):
        convex, zero_z = kind != "concave", kind == "no z"
        lambd = 10.0 ** (seed % 5 - 3)
        problem = Problem(seed, lambd, convex=convex, zero_z=zero_z, theta=theta, metric=metric)
        products, dots = problem.products, problem.dots
        if kind == "parallel":
            t = (-2.0, 0.0, 2.0)[seed % 3]  # u = t z
            products = products[[0, 1, 0, 1, 1]] * torch.tensor([1.0, 1.0, t, t, t * t]).double()
            dots = dots[0] * torch.tensor([1.0, t, t * t]).double()
        if kind == "infinite":
            products = products.clone()
            products[seed % 5] = (torch.inf, torch.nan)[seed % 2]
        direct = metric or kind == "parallel" or seed % 4 < 2
        known = dict(lambd=lambd, z_dot_z=-1.0 if direct else float(dots[0]), direction_damping=7.0, loss=3.0)
        known |= dict(average_beta=0.05, average_rho=0.6, solves=float((0, 3, 50)[seed % 3]), gathered=5.0)
        previous = torch.tensor([known.get(name, 2.0) for name in SCALARS], dtype=torch.float64)
        wanted = dict(theta=theta, average=average, bounded=bounded)
        yield Case(previous, torch.tensor(1.25), products, dots if direct else None, fixed, 0.7, wanted)
