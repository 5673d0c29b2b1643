"""CurveBall in a metric, with dense matrices in float64: J, H, P and A as in docs/method.md. For tiny nets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev

DECAY, EPSILON, EARLY, EARLY_SOLVES = 0.9, 1e-8, 10, (0, 1, 2, 4, 8)


@dataclass
class DenseBlock:
    """One parameter's block of P; factors only for sides of 2 to `largest`, in equal pieces of up to `longest`."""

    shape: torch.Size
    kronecker: bool
    largest: int
    longest: int
    steps: int = 0
    sides: list[Tensor] = field(default_factory=list)
    factors: list[Tensor] = field(default_factory=list)
    square: Tensor = field(default_factory=lambda: torch.zeros(()))

    def __post_init__(self) -> None:
        self.matrix = (self.shape[0], math.prod(self.shape[1:])) if len(self.shape) > 1 else (1, math.prod(self.shape))
        self.sides = [torch.eye(n, dtype=torch.float64) for n in self.matrix]
        self.factors = [torch.zeros(n, n, dtype=torch.float64) for n in self.matrix]
        self.square = torch.zeros(self.matrix, dtype=torch.float64)

    def dense(self, r: Tensor) -> Tensor:
        """See r and return this block of P, of all elements by all elements."""
        m = r.reshape(self.matrix)
        self.steps += 1
        if self.steps <= EARLY or self.steps % 2 == 1:
            for factor, gram in zip(self.factors, (m @ m.T, m.T @ m), strict=True):
                piece = self._pieces(len(gram))[0]
                gram = gram * (piece[:, None] == piece)
                factor.mul_(DECAY).add_(gram, alpha=1 - DECAY)
        turned = self.sides[0].T @ m @ self.sides[1]
        self.square = DECAY * self.square + (1 - DECAY) * turned**2
        p = (self.square / (1 - DECAY**self.steps)).sqrt() + EPSILON
        basis = torch.kron(self.sides[0], self.sides[1])
        return basis @ torch.diag(p.flatten()) @ basis.T

    def refresh(self, due: Callable[[int], bool]) -> None:
        for i, n in enumerate(self.matrix):
            if self.kronecker and len(self.shape) > 1 and 1 < n <= self.largest and due(n):
                piece, length = self._pieces(n)
                traces = torch.zeros(n, dtype=torch.float64).index_add(0, piece, self.factors[i].diag())
                shifted = self.factors[i] + torch.diag(1e-4 * traces[piece] / length)
                self.sides[i] = torch.linalg.qr(shifted @ self.sides[i])[0].contiguous()

    def _pieces(self, n: int) -> tuple[Tensor, int]:
        """Return the piece of each element of a side, and how long a piece is."""
        length = math.ceil(n / max(1, math.ceil(n / self.longest)))
        return torch.arange(n) // length, length


@dataclass
class DensePreconditioned:
    """The optimizer; with `preconditioner=None` P is the identity. λ stays as it is."""

    net: nn.Module
    loss_fn: Callable[[Tensor], Tensor]
    preconditioner: str | None
    theta: float
    average: float
    solve_interval: int
    lambd: float
    lr: float
    weight_decay: float
    largest: int = 1024
    longest: int = 128
    beta: float = 0.0
    rho: float = 0.0
    used: tuple[float, float] = (0.0, 0.0)  # β and ρ of the step
    solves: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        self.named = {n: p.detach().clone() for n, p in self.net.named_parameters()}
        self.w = torch.cat([p.flatten() for p in self.named.values()])
        self.z = torch.zeros_like(self.w)
        kronecker = self.preconditioner == "kronecker"
        self.blocks = [DenseBlock(p.shape, kronecker, self.largest, self.longest) for p in self.named.values()]

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        parts = w.split([p.numel() for p in self.named.values()])
        values = {n: v.view(p.shape) for (n, p), v in zip(self.named.items(), parts, strict=True)}
        out: Tensor = functional_call(self.net, values, (x,))
        return out

    def step(self, x: Tensor, part: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Take a step; `part` of the batch has the curvature. Return the loss and P."""
        outputs = self.forward(x, self.w)
        gradient = self._jacobian(x).T @ self._gradient(outputs)
        seen = x if part is None else part
        jacobian, out = self._jacobian(seen), self.forward(seen, self.w)
        curved = hessian(lambda o: self.loss_fn(o.view(out.shape)))(out.flatten())
        curvature = jacobian.T @ curved @ jacobian
        r = gradient + self.theta * curvature @ self.z
        p = torch.eye(len(self.w), dtype=self.w.dtype)
        if self.preconditioner is not None:
            r_parts = r.split([p.numel() for p in self.named.values()])
            p = torch.block_diag(*(block.dense(part) for block, part in zip(self.blocks, r_parts, strict=True)))
        u = torch.linalg.solve(p, r)
        delta = u + self.theta * self.lambd * self.z
        if self.steps in EARLY_SOLVES or self.steps % self.solve_interval == 0:
            basis = torch.stack((delta, self.z), dim=1)
            self._solve(basis.T @ (curvature + self.lambd * p) @ basis, basis.T @ gradient, part is not None)
        else:  # the loss has its lower bound at zero
            self.used = min(self.beta, float(self.loss_fn(outputs) / (r @ u))), self.rho
        self.z = self.used[1] * self.z - self.used[0] * delta
        self.w = (1 - self.lr * self.weight_decay) * self.w + self.lr * self.z
        self.steps += 1
        return self.loss_fn(outputs), p

    def refresh(self, due: Callable[[int, int], bool]) -> None:
        """Refresh the bases of the sides whose turn `due(block, side's length)` says it is."""
        for i, block in enumerate(self.blocks):
            block.refresh(lambda n, i=i: due(i, n))

    def _solve(self, a: Tensor, b: Tensor, partial: bool) -> None:
        bounded = partial or self.average > 0 or self.solve_interval > 1
        if a[1, 1] == 0:
            beta, rho = float(b[0] / a[0, 0]), 0.0
        else:
            beta, rho = (torch.linalg.solve(a, b) * torch.tensor([1.0, -1.0], dtype=a.dtype)).tolist()
            if bounded and not 0 <= rho <= 1:
                rho = min(max(rho, 0.0), 1.0)
                beta = float((b[0] + rho * a[0, 1]) / a[0, 0])
        kept = min(self.average, 1 - 1 / (self.solves + 1))
        self.beta, self.rho = kept * self.beta + (1 - kept) * beta, kept * self.rho + (1 - kept) * rho
        self.solves += 1
        x = torch.tensor([self.beta, -self.rho], dtype=a.dtype)
        falls, curves = float(x @ b), float(x @ a @ x)
        factor = max(falls, 0.0) / curves if kept > 0 and curves > 2 * falls else 1.0
        self.used = factor * self.beta, factor * self.rho

    def _jacobian(self, x: Tensor) -> Tensor:
        jacobian: Tensor = jacrev(lambda w: self.forward(x, w).flatten())(self.w)
        return jacobian

    def _gradient(self, outputs: Tensor) -> Tensor:
        gradient: Tensor = grad(lambda o: self.loss_fn(o.view(outputs.shape)))(outputs.flatten())
        return gradient
