"""The contestants: each has one setting for all workloads, that of its package or paper. None was tuned.

A contestant knows how many steps it will have, as AlgoPerf's do: where its recipe has a schedule, it spans them.
"""

from __future__ import annotations

import importlib.util
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.evidence.contest.trials import WARM_UP, warm_up_and_cosine
from benchmarks.evidence.contest.workloads import Workload
from benchmarks.optimizers import muon_and_adamw
from benchmarks.study.nets import cross_entropy
from curveball_fused import CurveBall

BATCHES_FOR_NORMS = 20  # from which batch norm's statistics are computed anew where the weights are averages
Params = Iterable[nn.Parameter]


class Training(ABC):
    """A net in training.

    Args:
        workload: whose net it is.
        net: with its initial weights.
        steps: it will have.
    """

    def __init__(self, workload: Workload, net: nn.Module, steps: int) -> None:
        self.workload, self.net, self.steps = workload, net, steps

    @abstractmethod
    def step(self, x: Tensor, y: Tensor) -> int:
        """Take a step; return how many steps it counts for."""

    def validation_loss(self) -> float:
        return self.workload.validation_loss(self.net)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.workload.task.loss_fn(self.net(x), y)


class FirstOrder(Training):
    """An optimizer that reads gradients, with warm-up and a cosine."""

    def __init__(self, workload: Workload, net: nn.Module, steps: int, make: Callable[[nn.Module], Any]) -> None:
        super().__init__(workload, net, steps)
        self.optimizer = make(net)
        self.scheduler = self.schedule()

    def schedule(self) -> torch.optim.lr_scheduler.LRScheduler:
        return warm_up_and_cosine(self.optimizer, self.steps)

    def step(self, x: Tensor, y: Tensor) -> int:
        self.optimizer.zero_grad()
        self.loss(x, y).backward()
        self.optimizer.step()
        self.scheduler.step()
        return 1


class Prodigy(FirstOrder):
    """With a cosine, and no warm-up, as it finds its rate by itself."""

    def schedule(self) -> torch.optim.lr_scheduler.LRScheduler:
        return CosineAnnealingLR(self.optimizer, self.steps)


class ScheduleFree(Training):
    """It has other weights in training than those that are evaluated."""

    def __init__(self, workload: Workload, net: nn.Module, steps: int) -> None:
        super().__init__(workload, net, steps)
        make = import_module("schedulefree").AdamWScheduleFree
        self.optimizer = make(net.parameters(), warmup_steps=round(WARM_UP * steps))
        self.optimizer.train()

    def step(self, x: Tensor, y: Tensor) -> int:
        self.optimizer.zero_grad()
        self.loss(x, y).backward()
        self.optimizer.step()
        return 1

    def validation_loss(self) -> float:
        self.optimizer.eval()
        if any(isinstance(module, nn.BatchNorm2d) for module in self.net.modules()):
            with torch.no_grad():
                for x, _ in self.workload.batches(0, BATCHES_FOR_NORMS):
                    self.net(x)
        loss = super().validation_loss()
        self.optimizer.train()
        return loss


class HessianDiagonal(FirstOrder):
    """AdaHessian and SophiaH, which differentiate the gradients in one of so many steps."""

    def __init__(self, workload: Workload, net: nn.Module, steps: int, make: Callable[[nn.Module], Any]) -> None:
        super().__init__(workload, net, steps, make)
        self.taken = 0

    def step(self, x: Tensor, y: Tensor) -> int:
        self.optimizer.zero_grad()
        with twice_differentiable(self.net):
            self.loss(x, y).backward(create_graph=self.taken % self.optimizer.update_period == 0)
            self.optimizer.step()
        self.scheduler.step()
        self.taken += 1
        return 1


@contextmanager
def twice_differentiable(net: nn.Module) -> Iterator[None]:
    """Take the kernels that have second derivatives: oneDNN's of recurrent nets, and fused attention, have none."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in net.modules())
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.filterwarnings("ignore", message="Using backward|TF32 acceleration")  # zero_grad ends cycles
        with torch.backends.mkldnn.flags(enabled=not recurrent):  # type: ignore[no-untyped-call]
            yield


class KFAC(FirstOrder):
    """SGD with gradients of ASDL's K-FAC, as in its manual. Layers that it does not know keep their gradients."""

    def __init__(self, workload: Workload, net: nn.Module, steps: int) -> None:
        super().__init__(workload, net, steps, lambda net: torch.optim.SGD(net.parameters(), lr=0.1))
        asdl = import_module("asdl.precondition")
        _, y = next(workload.batches(0, 1))
        self.classifies = workload.task.loss_fn is cross_entropy
        rows = y.numel() if self.classifies else len(y)
        loss_type = "cross_entropy" if self.classifies else "mse"
        # Of embeddings it wants a matrix that it has not computed.
        config = asdl.PreconditioningConfig(data_size=rows, damping=0.01, ignore_modules=[nn.Embedding])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This model contains")
            self.maker = asdl.KfacGradientMaker(net, config, loss_type=loss_type)

    def step(self, x: Tensor, y: Tensor) -> int:
        self.optimizer.zero_grad()
        outputs = self.maker.setup_model_call(self.net, x)
        if self.classifies:
            self.maker.setup_loss_call(F.cross_entropy, outputs, y.flatten())
        else:
            self.maker.setup_loss_call(F.mse_loss, outputs, y)
        self.maker.forward_and_backward()
        self.optimizer.step()
        self.scheduler.step()
        return 1


class LBFGS(Training):
    """torch's, with a line search. What counts as a step is an evaluation of loss and gradient."""

    def __init__(self, workload: Workload, net: nn.Module, steps: int) -> None:
        super().__init__(workload, net, steps)
        self.optimizer = torch.optim.LBFGS(net.parameters(), line_search_fn="strong_wolfe")

    def step(self, x: Tensor, y: Tensor) -> int:
        evaluations = 0

        def closure() -> Tensor:
            nonlocal evaluations
            evaluations += 1
            self.optimizer.zero_grad()
            loss = self.loss(x, y)
            loss.backward()
            return loss

        self.optimizer.step(closure)  # type: ignore[no-untyped-call]
        return evaluations


class LevenbergMarquardt(Training):
    """Damped Gauss-Newton steps with dense matrices; one that does not lower the loss is not kept."""

    def __init__(self, workload: Workload, net: nn.Module, steps: int) -> None:
        super().__init__(workload, net, steps)
        self.damping = 0.1

    def step(self, x: Tensor, y: Tensor) -> int:
        def residual(params: dict[str, Tensor], x_row: Tensor, y_row: Tensor) -> Tensor:
            return functional_call(self.net, params, (x_row,)) - y_row

        params = {name: p.detach() for name, p in self.net.named_parameters()}
        by_param = vmap(jacrev(residual), (None, 0, 0))(params, x, y)
        jacobian = torch.cat([j.flatten(2) for j in by_param.values()], 2).flatten(0, 1).double()
        with torch.no_grad():
            residuals = (self.net(x) - y).flatten().double()
            curvature = jacobian.T @ jacobian
            curvature.diagonal().add_(self.damping)
            step = torch.cholesky_solve((jacobian.T @ residuals)[:, None], torch.linalg.cholesky(curvature))
            before = nn.utils.parameters_to_vector(self.net.parameters())
            nn.utils.vector_to_parameters(before - step[:, 0].float(), self.net.parameters())
            if (self.net(x) - y).square().sum() < residuals.square().sum():
                self.damping /= 3
            else:
                nn.utils.vector_to_parameters(before, self.net.parameters())
                self.damping *= 2
        return 1


class SecondOrder(Training):
    """CurveBall with its defaults, at a constant rate or with a cosine on `lr`."""

    def __init__(
        self, workload: Workload, net: nn.Module, steps: int, preconditioner: str | None, cosine: bool = False
    ) -> None:
        super().__init__(workload, net, steps)
        self.optimizer = CurveBall(net.parameters(), preconditioner=preconditioner)
        self.scheduler = CosineAnnealingLR(self.optimizer, steps) if cosine else None

    def step(self, x: Tensor, y: Tensor) -> int:
        self.optimizer.step(lambda: self.net(x), lambda outputs: self.workload.task.loss_fn(outputs, y))
        if self.scheduler:
            self.scheduler.step()
        return 1


Start = Callable[[Workload, nn.Module, int], Training]


@dataclass(frozen=True)
class Contestant:
    """How one trains.

    Attributes:
        setting: for the documentation.
        start: makes the training.
        package: whose module it needs beside torch.
        enters: whether it can train a workload.
    """

    setting: str
    start: Start
    package: str | None = None
    enters: Callable[[Workload], bool] = lambda workload: True

    @property
    def installed(self) -> bool:
        return self.package is None or importlib.util.find_spec(self.package) is not None


def _first_order(make: Callable[[nn.Module], Any], kind: type[FirstOrder] = FirstOrder) -> Start:
    return lambda workload, net, steps: kind(workload, net, steps, make)


def _of(package: str, name: str, **options: Any) -> Callable[[nn.Module], Any]:
    return lambda net: getattr(import_module(package), name)(net.parameters(), **options)


def _dense(workload: Workload) -> bool:
    """Whether residuals have a dense Jacobian here: of all rows, and without derivatives inside the net."""
    return workload.deterministic and not workload.task.differentiates


PYTORCH_OPTIMIZER = "pytorch_optimizer"
ADAMW, PUBLISHED = "AdamW", "CurveBall, as published"
KRONECKER, KRONECKER_COSINE = "CurveBall, Kronecker metric", "CurveBall, Kronecker metric, cosine"
CONTESTANTS: dict[str, Contestant] = {
    ADAMW: Contestant(
        "lr 0.001, weight decay 0.01, warm-up and cosine", _first_order(_of("torch.optim", "AdamW", fused=True))
    ),
    "Schedule-Free AdamW": Contestant("lr 0.0025, warm-up", ScheduleFree, "schedulefree"),
    "Prodigy": Contestant("lr 1, cosine", _first_order(_of("prodigyopt", "Prodigy"), Prodigy), "prodigyopt"),
    "Muon + AdamW": Contestant(
        "lr 0.02, AdamW's 0.0003, warm-up and cosine", _first_order(muon_and_adamw), PYTORCH_OPTIMIZER
    ),
    "SOAP": Contestant(
        "lr 0.003, weight decay 0.01, warm-up and cosine",
        _first_order(_of(PYTORCH_OPTIMIZER, "SOAP")),
        PYTORCH_OPTIMIZER,
    ),
    "K-FAC": Contestant(
        "lr 0.1, damping 0.01, warm-up and cosine",
        KFAC,
        "asdl",
        lambda workload: not workload.task.differentiates,
    ),
    "AdaHessian": Contestant(
        "lr 0.1, warm-up and cosine",
        _first_order(_of(PYTORCH_OPTIMIZER, "AdaHessian"), HessianDiagonal),
        PYTORCH_OPTIMIZER,
    ),
    "SophiaH": Contestant(
        "lr 0.06, Hessian in every tenth step, warm-up and cosine",
        _first_order(_of(PYTORCH_OPTIMIZER, "SophiaH"), HessianDiagonal),
        PYTORCH_OPTIMIZER,
    ),
    "L-BFGS": Contestant("strong Wolfe conditions", LBFGS, enters=lambda workload: workload.deterministic),
    "Levenberg-Marquardt": Contestant("damping from 0.1 on", LevenbergMarquardt, enters=_dense),
    PUBLISHED: Contestant("defaults", lambda *given: SecondOrder(*given, None)),
    KRONECKER: Contestant("defaults", lambda *given: SecondOrder(*given, "kronecker")),
    KRONECKER_COSINE: Contestant("defaults, cosine", lambda *given: SecondOrder(*given, "kronecker", cosine=True)),
}
