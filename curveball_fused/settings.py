"""The options of an optimizer, read once per step, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from curveball_fused.curvature import AUTO

PER_GROUP = ("lr", "weight_decay")
DIRECTIONS = ("residual", "gradient")
# What the defaults depend on: in the metric P of a preconditioner a gradient has no scale of its own, so that one λ
# suits all models, and the direction is good enough to be solved for now and then.
_DEFAULTS: dict[str | None, dict[str, Any]] = {
    None: dict(lambd=1.0, lambda_factor=0.999, direction="residual", average=0.0, solve_interval=1),
    "kronecker": dict(lambd=30.0, lambda_factor=0.99, direction="gradient", average=0.5, solve_interval=20),
}
PRECONDITIONERS = tuple(_DEFAULTS)
# How the arithmetic is done belongs to this process, and is the constructor's; the rest is in the parameter groups, as
# in any optimizer of torch, whence checkpoints and whoever changes options in training have it.
PER_PROCESS = ("curvature", "compile", "backend", "debug")


@dataclass(frozen=True)
class Settings:
    """All options of `CurveBall`, whose docstring says what they mean; `lr` and `weight_decay` for each group."""

    lr: tuple[float | Tensor, ...]
    weight_decay: tuple[float, ...]
    beta: float | None
    rho: float | None
    lambd: float
    auto_lambda: bool
    lambda_factor: float
    lambda_low: float
    lambda_high: float
    lambda_interval: int
    lambda_min: float
    lambda_max: float
    preconditioner: str | None
    direction: str
    average: float
    solve_interval: int
    maximize: bool
    curvature: str
    compile: bool
    backend: str
    debug: bool

    @classmethod
    def of(cls, optimizer: Optimizer) -> Settings:
        """Return the options as they are now."""
        groups, defaults = optimizer.param_groups, optimizer.defaults
        values: dict[str, Any] = {name: groups[0][name] for name in _SHARED}
        values |= {name: defaults[name] for name in PER_PROCESS}
        values |= {name: tuple([group[name] for group in groups]) for name in PER_GROUP}
        return cls(**values)

    @property
    def sign(self) -> float:
        """The factor of the loss that makes it one to be minimized."""
        return -1.0 if self.maximize else 1.0

    @property
    def theta(self) -> float:
        """θ: the part that the curvature along z has in the direction, Δ = P⁻¹Jᵀ(g + θ HJz) + θλz."""
        return 1.0 if self.direction == "residual" else 0.0

    @property
    def tangent_backend(self) -> str:
        """The backend of the tangent operators: plain torch if it is named, else the best that has them."""
        return "torch" if self.backend == "torch" else "auto"

    def methods(self, last: str | None) -> tuple[str, ...]:
        """Return the methods to linearize the model by, in order, without those before the one that worked last."""
        curvature = "compiled" if self.compile else self.curvature
        methods = AUTO if curvature == "auto" else (curvature,)
        return methods[methods.index(last) :] if last in methods else methods


def defaults_of(preconditioner: str | None, direction: str | None) -> dict[str, Any]:
    """Return the defaults of the options whose default depends on the metric; a residual is solved for in each step."""
    defaults = _DEFAULTS[preconditioner]
    return defaults | {"solve_interval": 1} if direction == "residual" else defaults


def with_former_options(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return parameter groups, those of earlier versions with what is now in the place of their options."""
    former = {"preconditioner": None, "direction": "residual", "solve_interval": 1}
    return [group if "direction" in group else {**group, **former} for group in groups]


_SHARED = [field.name for field in fields(Settings) if field.name not in (*PER_GROUP, *PER_PROCESS)]
