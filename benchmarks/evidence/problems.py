"""The problems of the method's own table: the Rosenbrock function with and without noise, and a linear network.

Each is a sum of squared residuals, in float64. Seeds lie along the first dimension, so that a batch of runs is one
computation. A run has converged in the first iteration whose loss, taken before its step, is below `TOLERANCE`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

TOLERANCE = 1e-4
_CHUNK = 1000  # draws that are made at once, as single ones are slow


class Problem(Protocol):
    """What a system is given.

    Attributes:
        name: as in the raw data.
        title: as in tables and figures.
        limit: iterations after which a run has not converged.
        curveball: options of CurveBall, which are not tuned.
    """

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def limit(self) -> int: ...

    @property
    def curveball(self) -> dict[str, float]: ...

    def start(self, seeds: Sequence[int]) -> Tensor:
        """Return the first weights, (seeds, weights)."""

    def draws(self, seeds: Sequence[int]) -> Iterator[Tensor]:
        """Give without end what one evaluation after the other sees, (seeds, ...)."""

    def residuals(self, w: Tensor, draw: Tensor) -> Tensor:
        """Return (..., residuals) at weights (..., weights)."""


@dataclass(frozen=True)
class Rosenbrock:
    """ε² 100 (v - u²)² + (1 - u)², where ε is 1, or drawn from U[0, noise] for each evaluation."""

    name: str
    title: str
    noise: float | None
    limit: int = 5000

    @property
    def curveball(self) -> dict[str, float]:
        return {"lr": 0.5, "lambd": 0.1}

    def start(self, seeds: Sequence[int]) -> Tensor:
        moved = [torch.rand((), generator=_generator(seed), dtype=torch.float64) - 0.5 for seed in seeds]
        return (-0.25 + 0.5 * torch.stack(moved))[:, None].expand(-1, 2).clone()

    def draws(self, seeds: Sequence[int]) -> Iterator[Tensor]:
        generators = [_generator(seed + 1_000_000) for seed in seeds]  # other numbers than those of the start
        while True:
            drawn = [torch.rand(_CHUNK, generator=generator, dtype=torch.float64) for generator in generators]
            epsilon = torch.stack(drawn, dim=1)
            yield from torch.ones_like(epsilon) if self.noise is None else self.noise * epsilon

    def residuals(self, w: Tensor, draw: Tensor) -> Tensor:
        u, v = w.unbind(-1)
        return torch.stack((10 * draw * (v - u**2), 1 - u), dim=-1)


@dataclass(frozen=True)
class LinearNetwork:
    """x -> W₂W₁x, which learns y = Ax, where A's condition number is about 10⁵, from 1000 samples in one batch.

    The loss is the mean over the samples of |W₂W₁x - y|². As y is linear in x, it is also |(W₂W₁ - A) R|² where
    R Rᵀ = mean of xxᵀ. These 60 residuals, instead of 10,000, have the same loss, gradient and curvature.
    """

    name: str = "linear"
    title: str = "Linear network"
    limit: int = 1000

    @property
    def curveball(self) -> dict[str, float]:
        return {"lr": 1.0, "lambd": 1.0}

    def sample(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the inputs (1000, 6), A (10, 6) and the first weights (160), W₁ before W₂."""
        generator = _generator(seed)
        x = torch.randn(1000, 6, generator=generator, dtype=torch.float64)
        uniform = torch.rand(10, 6, generator=generator, dtype=torch.float64)
        w1 = 2 / 16 * torch.randn(60, generator=generator, dtype=torch.float64)
        w2 = 1 / 10 * torch.randn(100, generator=generator, dtype=torch.float64)
        return x, torch.linspace(1, 1e-5, 10, dtype=torch.float64)[:, None] * uniform, torch.cat((w1, w2))

    def start(self, seeds: Sequence[int]) -> Tensor:
        return torch.stack([self.sample(seed)[2] for seed in seeds])

    def draws(self, seeds: Sequence[int]) -> Iterator[Tensor]:
        both = []
        for seed in seeds:
            x, a, _ = self.sample(seed)
            both.append(torch.cat((torch.linalg.cholesky(x.T @ x / len(x)), a)))
        while True:
            yield torch.stack(both)

    def residuals(self, w: Tensor, draw: Tensor) -> Tensor:
        w1 = w[..., :60].unflatten(-1, (10, 6))
        w2 = w[..., 60:].unflatten(-1, (10, 10))
        root, a = draw[..., :6, :], draw[..., 6:, :]
        return ((w2 @ w1 - a) @ root).flatten(-2)


PROBLEMS: tuple[Problem, ...] = (
    Rosenbrock("deterministic", "Rosenbrock", None),
    Rosenbrock("noise_1", "Rosenbrock, U[0, 1]", 1.0),
    Rosenbrock("noise_3", "Rosenbrock, U[0, 3]", 3.0),
    LinearNetwork(),
)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
