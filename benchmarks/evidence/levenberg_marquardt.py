"""The method of Levenberg and Marquardt with a dense Jacobian, for nets and residuals that are small enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TRIALS = 10  # of one step: the damping grows by 2, 4, 8, ... until one of them lowers the sum of squares


class LevenbergMarquardt:
    """Minimize a sum of squared residuals.

    The damping follows the gain ratio, as in Madsen, Nielsen and Tingleff, "Methods for non-linear least squares
    problems", 2004, algorithm 3.16.

    Args:
        params: what is minimized over; the columns of the Jacobian are in their order.
        residuals: at the present weights, (residuals).
        jacobian: likewise, (residuals, weights).
        first_damping: over the largest element on the diagonal of JᵀJ.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        residuals: Callable[[], Tensor],
        jacobian: Callable[[], Tensor],
        first_damping: float = 1e-3,
    ) -> None:
        self.params, self.residuals, self.jacobian = params, residuals, jacobian
        self.first_damping = first_damping
        self.damping: Tensor | None = None

    def step(self) -> None:
        """Compute a Jacobian, and take the first step with it that lowers the sum; none if none of the trials does."""
        r, jacobian = self.residuals().detach(), self.jacobian()
        gradient = jacobian.mT @ r
        wide = len(jacobian) < jacobian.shape[1]
        gram = jacobian @ jacobian.mT if wide else jacobian.mT @ jacobian  # the smaller of the two
        if self.damping is None:
            self.damping = self.first_damping * jacobian.square().sum(0).max()
        before, growth = [p.detach().clone() for p in self.params], 2.0
        for _ in range(TRIALS):
            step = damped_step(jacobian, gram, r, gradient, self.damping)
            self._move(before, step)
            predicted = step @ (self.damping * step - gradient)
            gain = (r.square().sum() - self.residuals().detach().square().sum()) / predicted
            if gain > 0:
                self.damping = self.damping * (1 - (2 * gain - 1) ** 3).clamp(min=1 / 3)
                return
            self.damping, growth = self.damping * growth, 2 * growth
        self._move(before, torch.zeros_like(gradient))

    @torch.no_grad()
    def _move(self, before: Sequence[Tensor], step: Tensor) -> None:
        parts = step.split([p.numel() for p in self.params])
        for p, old, part in zip(self.params, before, parts, strict=True):
            p.copy_(old + part.view_as(p))


def damped_step(jacobian: Tensor, gram: Tensor, r: Tensor, gradient: Tensor, damping: Tensor) -> Tensor:
    """Solve (JᵀJ + μI) step = -Jᵀr, where `gram` is JᵀJ, or JJᵀ if that is smaller. NaN where rounding spoils it."""
    damped = gram.clone()
    damped.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return torch.full_like(gradient, torch.nan)
    if len(gram) == len(gradient):
        return -torch.cholesky_solve(gradient[:, None], factor)[:, 0]
    return -jacobian.mT @ torch.cholesky_solve(r[:, None], factor)[:, 0]
