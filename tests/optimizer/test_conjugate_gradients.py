"""On a quadratic, with the gradient as direction and no damping, the steps are those of conjugate gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from curveball_fused import CurveBall


def conjugate_gradients(a: Tensor, b: Tensor, steps: int) -> list[Tensor]:
    """The iterates of Hestenes and Stiefel for A w = b, from zero."""
    w, r = torch.zeros_like(b), b.clone()
    d, iterates = r.clone(), []
    for _ in range(steps):
        ad = a @ d
        alpha = (r @ r) / (d @ ad)
        w = w + alpha * d
        new = r - alpha * ad
        d, r = new + (new @ new) / (r @ r) * d, new
        iterates.append(w)
    return iterates


def test_thirty_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64, generator=generator))
    root = q * torch.logspace(0, -0.75, 60, dtype=torch.float64)  # A = rootᵀ root has a condition of 32
    target = torch.randn(60, dtype=torch.float64, generator=generator)
    w = nn.Parameter(torch.zeros(60, dtype=torch.float64))
    optimizer = CurveBall([w], direction="gradient", lambd=0.0, auto_lambda=False)
    for expected in conjugate_gradients(root.T @ root, root.T @ target, 30):
        optimizer.step(lambda: root @ w, lambda out: 0.5 * (out - target).square().sum())
        torch.testing.assert_close(w.detach(), expected, rtol=1e-8, atol=1e-8)
