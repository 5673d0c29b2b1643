"""CurveBall with dense matrices: the Jacobian row by row, H and A as they stand in the paper. For tiny nets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class DenseCurveBall:
    """`lr` holds one value per group of parameters; `groups` are lists of parameter names."""

    model: nn.Module
    groups: list[list[str]]
    lr: list[float]
    weight_decay: list[float]
    lambd: float
    low: float
    high: float
    factor: float
    interval: int
    beta: float | None = None
    rho: float | None = None
    maximize: bool = False
    z: Tensor | None = None
    steps: int = 0
    log: list[dict[str, float]] = field(default_factory=list)

    def step(
        self, forward: Callable[[nn.Module], Tensor], loss_fn: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        sign = -1.0 if self.maximize else 1.0
        before, random = copy.deepcopy(self.model), torch.get_rng_state()
        named = dict(self.model.named_parameters())
        params = [named[name] for group in self.groups for name in group]
        outputs = forward(self.model)
        out = outputs.detach().flatten()

        def objective(flat: Tensor) -> Tensor:
            return sign * loss_fn(flat.view(outputs.shape))

        after_random = torch.get_rng_state()
        g = torch.autograd.functional.jacobian(objective, out)
        hessian = torch.autograd.functional.hessian(objective, out)
        rows = []
        for value in outputs.flatten():
            row = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
            rows.append(torch.cat([(torch.zeros_like(p) if r is None else r).flatten() for p, r in zip(params, row)]))
        jacobian = torch.stack(rows)
        z = torch.zeros(jacobian.shape[1], dtype=jacobian.dtype) if self.z is None else self.z

        curvature = jacobian.T @ hessian @ jacobian + self.lambd * torch.eye(len(z), dtype=z.dtype)
        delta = curvature @ z + jacobian.T @ g
        basis = torch.stack((delta, z), dim=1)
        a, b = basis.T @ curvature @ basis, (jacobian @ basis).T @ g
        x = self._solve(a, b)
        z = basis @ x * -1.0
        lr, decay = self._per_element(self.lr, named), self._per_element(self.weight_decay, named)
        mean_lr = self.lr[0] if len(set(self.lr)) == 1 else float(z @ (lr * z) / (z @ z))
        change = float(-mean_lr * (x @ b) + 0.5 * mean_lr**2 * (x @ a @ x))
        with torch.no_grad():
            flat = torch.cat([p.flatten() for p in params]) * (1 - lr * decay) + lr * z
            for p, value in zip(params, flat.split([p.numel() for p in params])):
                p.copy_(value.view(p.shape))
        loss = loss_fn(outputs.detach())
        if self.steps % self.interval == 0:
            with torch.no_grad():
                for p, q in zip(before.parameters(), self.model.parameters()):
                    p.copy_(q)
                torch.set_rng_state(random)
                ratio = sign * float(loss_fn(forward(before)) - loss) / change
            if ratio < self.low:
                self.lambd /= self.factor**self.interval
            elif ratio > self.high:
                self.lambd *= self.factor**self.interval
        torch.set_rng_state(after_random)
        self.z, self.steps = z, self.steps + 1
        self.log.append({"beta": float(x[0]), "rho": float(-x[1]), "lambd": self.lambd, "predicted_change": change})
        return loss, outputs.detach()

    def _per_element(self, values: list[float], named: dict[str, Tensor]) -> Tensor:
        parts = [named[n].new_full((named[n].numel(),), v) for v, names in zip(values, self.groups) for n in names]
        return torch.cat(parts).detach()

    def _solve(self, a: Tensor, b: Tensor) -> Tensor:
        if self.beta is None and self.rho is None:
            # Scaled to unit diagonal, so that the cut-off of small singular values does not cut a small z.
            scale = torch.where(a.diagonal() > 0, a.diagonal().rsqrt(), torch.zeros_like(b))
            return scale * (torch.linalg.pinv(scale[:, None] * a * scale, rcond=1e-12) @ (scale * b))
        if self.beta is None:
            return torch.stack(((b[0] + a[0, 1] * self.rho) / a[0, 0], torch.tensor(-self.rho, dtype=b.dtype)))
        if self.rho is None:
            second = (b[1] - a[1, 0] * self.beta) / a[1, 1] if a[1, 1] > 0 else torch.zeros_like(b[1])
            return torch.stack((torch.tensor(self.beta, dtype=b.dtype), second))
        return torch.tensor((self.beta, -self.rho), dtype=b.dtype)
