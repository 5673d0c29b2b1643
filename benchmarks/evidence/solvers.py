"""The systems of the method's own table. All but CurveBall and BFGS run a batch of seeds at once."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from scipy.optimize import OptimizeResult, minimize  # comes with scikit-learn
from torch import Tensor, nn

from benchmarks.evidence.problems import TOLERANCE, Problem
from curveball_fused import CurveBall

Setting = dict[str, float]


@dataclass
class Run:
    """What came of one seed.

    Attributes:
        iterations: the first one whose loss, before its step, was below the tolerance; None if none was.
        loss: of that iteration, or of the last one; not finite if the run diverged.
        evaluations: of loss and gradient, where they are more than the iterations.
        path: the weights before each step.
        stuck: whether it has not converged and will not move any more.
    """

    iterations: int | None
    loss: float
    evaluations: int | None = None
    path: list[list[float]] = field(default_factory=list)
    stuck: bool = False


def loss_of(problem: Problem, w: Tensor, draw: Tensor) -> Tensor:
    return problem.residuals(w, draw).square().sum(-1)


def loss_and_gradient(problem: Problem, w: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
    w = w.detach().requires_grad_()
    loss = loss_of(problem, w, draw)
    return loss.detach(), torch.autograd.grad(loss.sum(), w)[0]


class Method(ABC):
    """A method with the weights of a batch of runs, (seeds, weights), in `w`."""

    def __init__(self, problem: Problem, w: Tensor) -> None:
        self.problem = problem
        self.w = w
        self.stuck = torch.zeros_like(w[:, 0], dtype=torch.bool)  # runs that will not move any more

    @abstractmethod
    def step(self, draws: Iterator[Tensor]) -> Tensor:
        """Take a step and return the losses before it, (seeds). An evaluation sees the next of the draws."""


class SGD(Method):
    """SGD with momentum, as torch.optim has it."""

    def __init__(self, problem: Problem, w: Tensor, lr: float, momentum: float) -> None:
        super().__init__(problem, w)
        self._lr, self._momentum = lr, momentum
        self._velocity = torch.zeros_like(w)

    def step(self, draws: Iterator[Tensor]) -> Tensor:
        loss, gradient = loss_and_gradient(self.problem, self.w, next(draws))
        self._velocity = self._momentum * self._velocity + gradient
        self.w = self.w - self._lr * self._velocity
        return loss


class Adam(Method):
    """Adam, as torch.optim has it."""

    def __init__(self, problem: Problem, w: Tensor, lr: float, beta1: float, beta2: float) -> None:
        super().__init__(problem, w)
        self._lr, self._beta1, self._beta2 = lr, beta1, beta2
        self._mean, self._square = torch.zeros_like(w), torch.zeros_like(w)
        self._steps = 0

    def step(self, draws: Iterator[Tensor]) -> Tensor:
        loss, gradient = loss_and_gradient(self.problem, self.w, next(draws))
        self._steps += 1
        self._mean = self._beta1 * self._mean + (1 - self._beta1) * gradient
        self._square = self._beta2 * self._square + (1 - self._beta2) * gradient**2
        mean = self._mean / (1 - self._beta1**self._steps)
        square = self._square / (1 - self._beta2**self._steps)
        self.w = self.w - self._lr * mean / (square.sqrt() + 1e-8)
        return loss


class LevenbergMarquardt(Method):
    """Damped Gauss-Newton steps. One is kept if it lowers the loss: the damping then falls to a third, or else doubles.

    The loss after the step is an evaluation of its own, and so sees a draw of its own.
    """

    def __init__(self, problem: Problem, w: Tensor) -> None:
        super().__init__(problem, w)
        self._damping = torch.full_like(w[:, 0], 0.1)
        self._jacobian = torch.func.vmap(torch.func.jacrev(problem.residuals))

    def step(self, draws: Iterator[Tensor]) -> Tensor:
        draw = next(draws)
        residuals, jacobian = self.problem.residuals(self.w, draw), self._jacobian(self.w, draw)
        loss = residuals.square().sum(-1)
        gradient = (jacobian.mT @ residuals[..., None])[..., 0]
        damping = self._damping[:, None, None] * torch.eye(self.w.shape[1], dtype=self.w.dtype)
        moved = self.w - torch.linalg.solve(jacobian.mT @ jacobian + damping, gradient)
        better = loss_of(self.problem, moved, next(draws)) < loss
        self.w = torch.where(better[:, None], moved, self.w)
        self._damping = torch.where(better, self._damping / 3, self._damping * 2)
        return loss


class Newton(Method):
    """Newton's method: whole steps with the exact Hessian, the shortest ones where it is singular.

    Nothing keeps it from saddle points, where it then stays.
    """

    def __init__(self, problem: Problem, w: Tensor) -> None:
        super().__init__(problem, w)
        self._hessian = torch.func.vmap(torch.func.hessian(partial(loss_of, problem)))

    def step(self, draws: Iterator[Tensor]) -> Tensor:
        draw = next(draws)
        loss, gradient = loss_and_gradient(self.problem, self.w, draw)
        inverse = torch.linalg.pinv(self._hessian(self.w, draw), rtol=1e-10, hermitian=True)
        step = (inverse @ gradient[..., None])[..., 0]
        self.stuck = step.norm(dim=1) <= 1e-10 * self.w.norm(dim=1)
        self.w = self.w - step
        return loss


class OurCurveBall(Method):
    """curveball_fused.CurveBall with a fixed λ, for one seed."""

    def __init__(self, problem: Problem, w: Tensor, lr: float, lambd: float) -> None:
        super().__init__(problem, w)
        self._parameter = nn.Parameter(w[0].clone())
        self._optimizer = CurveBall([self._parameter], lr=lr, lambd=lambd, auto_lambda=False)

    def step(self, draws: Iterator[Tensor]) -> Tensor:
        residuals = partial(self.problem.residuals, self._parameter, next(draws)[0])
        loss, _ = self._optimizer.step(residuals, lambda out: out.square().sum())
        self.w = self._parameter.detach().clone()[None]
        return loss[None]


def run(problem: Problem, seeds: Sequence[int], start: Callable[[Problem, Tensor], Method]) -> list[Run]:
    """Iterate until all seeds have converged, diverged or got stuck, at most up to the problem's limit."""
    method = start(problem, problem.start(seeds))
    draws = problem.draws(seeds)
    iterations = torch.zeros(len(seeds), dtype=torch.int64)  # 0: not converged
    last = torch.full((len(seeds),), math.inf, dtype=torch.float64)
    path = []
    for iteration in range(1, problem.limit + 1):
        path.append(method.w)
        loss = method.step(draws)
        last = torch.where(iterations == 0, loss, last)
        iterations[(iterations == 0) & (loss < TOLERANCE)] = iteration
        if not ((iterations == 0) & loss.isfinite() & ~method.stuck).any():
            break
    paths = torch.stack(path, dim=1)
    each = zip(iterations.tolist(), last.tolist(), paths, method.stuck.tolist(), strict=True)
    return [
        Run(count or None, final, path=weights[: count or None].tolist(), stuck=not count and stuck)
        for count, final, weights, stuck in each
    ]


def curveball(problem: Problem, seeds: Sequence[int], setting: Setting) -> list[Run]:
    return [run(problem, [seed], partial(OurCurveBall, **setting))[0] for seed in seeds]


def sgd(problem: Problem, seeds: Sequence[int], setting: Setting) -> list[Run]:
    return run(problem, seeds, partial(SGD, **setting))


def adam(problem: Problem, seeds: Sequence[int], setting: Setting) -> list[Run]:
    return run(problem, seeds, partial(Adam, **setting))


def levenberg_marquardt(problem: Problem, seeds: Sequence[int], setting: Setting) -> list[Run]:
    return run(problem, seeds, LevenbergMarquardt)


def newton(problem: Problem, seeds: Sequence[int], setting: Setting) -> list[Run]:
    return run(problem, seeds, Newton)


def bfgs(problem: Problem, seeds: Sequence[int], setting: Setting) -> list[Run]:
    return [_bfgs(problem, seed) for seed in seeds]


def _bfgs(problem: Problem, seed: int) -> Run:
    """SciPy's BFGS, which is started again from where it is whenever its line search gives up.

    What it does at a start counts as one iteration at least.
    """
    draws = problem.draws([seed])
    path, loss, evaluations = problem.start([seed]).tolist(), math.inf, 0

    def evaluate(w: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal evaluations
        evaluations += 1
        value, gradient = loss_and_gradient(problem, torch.from_numpy(w)[None], next(draws))
        return value.item(), gradient[0].numpy()

    def after_iteration(intermediate_result: OptimizeResult) -> None:
        nonlocal loss
        path.append(intermediate_result.x.tolist())
        loss = float(intermediate_result.fun)
        if loss < TOLERANCE or len(path) >= problem.limit:
            raise StopIteration

    while loss >= TOLERANCE and len(path) < problem.limit:
        before = len(path)
        minimize(evaluate, path[-1], jac=True, method="BFGS", callback=after_iteration, options={"gtol": 0.0})
        if len(path) == before:
            path.append(path[-1])
    return Run(len(path) if loss < TOLERANCE else None, loss, evaluations, path)


SYSTEMS: dict[str, Callable[[Problem, Sequence[int], Setting], list[Run]]] = {
    "CurveBall": curveball,
    "SGD + momentum": sgd,
    "Adam": adam,
    "Levenberg-Marquardt": levenberg_marquardt,
    "BFGS": bfgs,
    "Newton": newton,
}
