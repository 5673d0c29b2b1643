"""CurveBall: Newton's method at the memory of momentum SGD (Henriques et al., arXiv 1805.08095)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import backends, checks, economy, ops, reference
from .checks import SHARED
from .curvature import WAYS, ModelFn, run_plain
from .losses import LossFn, checked_loss
from .modes import uncompiled
from .reference import LAMBD, LOSS, SCALARS, Z_DOT_Z
from .replay import Replay
from .system import Problem


class CurveBall(Optimizer):
    """Second-order optimizer that sets its own learning rate β, momentum ρ and damping λ.

    Each step improves z, an estimate of the Newton step -(JᵀH_oJ + λI)⁻¹ Jᵀg_o, by one gradient step on its linear
    system, and adds it to the weights: z ← ρ z - β Δ, w ← w + lr z. β and ρ minimise the quadratic model of the loss in
    span{Δ, z}; λ follows how well that model predicts.

    Args:
        params: parameters or parameter groups; `lr` and `weight_decay` may differ between groups.
        lr: factor on the step, 1 unless a scheduler says otherwise; number or 0-dim tensor.
        beta: step size on the linear system; None to solve for it.
        rho: momentum; None to solve for it.
        lambd: damping λ, or its first value.
        auto_lambda: whether λ adapts.
        lambda_factor: factor per step by which λ falls, or, inverted, grows.
        lambda_low: λ grows where the ratio γ of actual to predicted change is below this.
        lambda_high: λ falls where γ is above this.
        lambda_interval: steps between two looks at γ, each of which costs one more forward pass.
        lambda_min, lambda_max: bounds of an adapting λ.
        average: how much of A and b is kept from step to step (exponential average); 0.8 to 0.9 suits large batches.
        solve_interval: complete solves every so many steps; those between need no second product, see `economy`.
        weight_decay: decoupled: w shrinks by lr·weight_decay per step.
        maximize: whether to climb.
        curvature: "linearize" (the model runs once), "forward" (dual numbers; slower, and the memory of SGD),
            "double_backward" (any model that autograd can differentiate twice), or "auto": the first of these that
            can follow the model.
        compile: whether torch.compile runs the model and its Jacobian products: fastest, after a first step that
            compiles for up to minutes. For models that torch.compile can follow as one graph; an error otherwise.
        backend: "cpu" (native kernels), "torch" (no compiler needed), or "auto".
        debug: whether each step checks its products, and each torch call of the model, against finite differences and
            adjoint identities, before it changes anything. Slow (tens of steps' time), and reads values back to the
            host; for a few steps on a new model. The steps are the same, bit for bit.

    Raises:
        TypeError, ValueError: a parameter or hyper-parameter cannot be used; the message says what to do.
        RuntimeError: a backend was named that cannot run here.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1.0,
        *,
        beta: float | None = None,
        rho: float | None = None,
        lambd: float = 1.0,
        auto_lambda: bool = True,
        lambda_factor: float = 0.999,
        lambda_low: float = 0.5,
        lambda_high: float = 1.5,
        lambda_interval: int = 5,
        lambda_min: float = 1e-6,
        lambda_max: float = 1e6,
        average: float = 0.0,
        solve_interval: int = 1,
        weight_decay: float = 0.0,
        maximize: bool = False,
        curvature: str = "auto",
        compile: bool = False,
        backend: str = "auto",
        debug: bool = False,
    ) -> None:
        defaults = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        checks.hyper_parameters(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, with their own `lr` and `weight_decay` if given; all other settings are the optimizer's."""
        checks.group_settings(param_group, self.defaults)
        super().add_param_group(param_group)
        try:
            checks.parameters([p for group in self.param_groups for p in group["params"]])
            backends.choose(self.defaults["backend"], self.param_groups[0]["params"][0].device)
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        model_fn: Callable[[], Tensor] | None = None,
        loss_fn: Callable[[Tensor], Tensor] | None = None,
        *,
        curvature_batch: tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]] | None = None,
        closure: None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            model_fn: called without arguments, returns the predictions, one floating-point tensor of any shape. It is
                called two to four times, with random numbers and buffers (batch-norm statistics) replayed, so that
                they advance once.
            loss_fn: called with the predictions, returns the scalar loss.
            curvature_batch: model_fn and loss_fn for a part of the batch, from which the curvature is taken; loss,
                gradient and the look at λ stay those of the whole. Its run leaves no trace in buffers or generators.
            closure: torch's old way, which gets an error that tells the new one.

        Returns:
            The loss and the predictions at the weights before the step, both detached.

        Raises:
            TypeError, RuntimeError: the model or the loss cannot be used, or, with `debug`, a product is wrong; nothing
                has been changed then. (An error of the model at the new weights, in a look at λ, leaves a complete step
                without that look.)
        """
        if model_fn is None or loss_fn is None or closure is not None:
            checks.explain_call()
        groups = [[p for p in group["params"] if p.requires_grad] for group in self.param_groups]
        params = [p for group in groups for p in group]
        if not params:
            raise RuntimeError("no parameter of this optimizer requires a gradient: nothing to train.")
        shared = self._prepare(params)
        replay = Replay(params, params[0].device)
        with uncompiled():
            try:
                loss, outputs = self._advance(model_fn, loss_fn, curvature_batch, groups, shared, replay)
            except BaseException:
                replay.rewind()
                raise
            try:
                settings = self.param_groups[0]
                if settings["auto_lambda"] and (shared["step"] - 1) % settings["lambda_interval"] == 0:
                    shared["scalars"] = self._adapt(model_fn, loss_fn, shared["scalars"], replay)
            finally:
                replay.finish()
        return loss, outputs

    def stats(self) -> dict[str, Tensor]:
        """The last step's figures as 0-dim float64 tensors on the device; reading one of them is what synchronises.

        "loss" (before the step), "beta", "rho" (0 in a skipped step), "lambd", "predicted_change", "ratio" (γ at the
        last look, NaN before the first), "skipped_steps" (not finite), "safe_steps" (loss not convex in the outputs).
        """
        shared = self._states.get(SHARED)
        values = shared["scalars"] if shared else self._initial_scalars()
        figures = {name: values[i].clone() for i, name in enumerate(SCALARS)}
        figures["loss"] *= self._sign
        for name in ("beta", "rho"):
            figures[name] = figures[name].nan_to_num(nan=0.0)
        for name in ("z_dot_z", "slope", "bend"):
            del figures[name]
        return figures

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a `state_dict()` of an optimizer over parameters of the same shapes.

        Raises:
            ValueError: the checkpoint belongs to other parameters; nothing has been changed then.
        """
        checks.checkpoint(state_dict, self.param_groups)
        super().load_state_dict(state_dict)
        # torch has cast z to the parameters' dtypes, and shares the rest with the caller's dictionary.
        saved = state_dict["state"]
        order = (i for group in state_dict["param_groups"] for i in group["params"])
        for i, p in zip(order, (p for group in self.param_groups for p in group["params"]), strict=True):
            if i in saved:
                self.state[p]["z"] = _zeros_like(p).copy_(saved[i]["z"])
        if SHARED in saved:
            device = self.param_groups[0]["params"][0].device
            own = {name: saved[SHARED][name].to(device, copy=True) for name in ("scalars", "system")}
            self._states[SHARED] = saved[SHARED] | own

    def _advance(
        self,
        model_fn: Callable[[], Tensor],
        loss_fn: Callable[[Tensor], Tensor],
        curvature_batch: tuple[ModelFn, LossFn] | None,
        groups: Sequence[list[Tensor]],
        shared: dict[str, Any],
        replay: Replay,
    ) -> tuple[Tensor, Tensor]:
        """Products, solve, update; returns loss and outputs."""
        settings, backend = self.param_groups[0], self.defaults["backend"]
        params = [p for group in groups for p in group]
        z = [self.state[p]["z"] for p in params]
        problem = Problem(params, z, self._ways(shared["way"]), self._sign, backend, self.defaults["debug"])
        lagging = None if shared["step"] % settings["solve_interval"] == 0 else shared["system"]
        if curvature_batch is None:
            measured = problem.measure(model_fn, loss_fn, replay, lagging, None)
        else:
            measured = problem.measure_with_part(model_fn, loss_fn, curvature_batch, replay, lagging)
        loss, outputs, r, products, dots = measured

        solve = partial(ops.solve, shared["scalars"], self._sign * loss, beta=settings["beta"], lr=settings["lr"])
        if settings["average"] == 0 and settings["solve_interval"] == 1 and curvature_batch is None:
            scalars = solve(products, dots, rho=settings["rho"], backend=backend)
        else:
            shared["system"], scalars = economy.averaged_solve(
                solve, shared, loss, products, dots, settings["average"], settings["rho"], backend
            )
        shared["scalars"] = ops.update_groups_(
            params,
            z,
            r,
            scalars,
            group_sizes=[len(group) for group in groups],
            lr=[group["lr"] for group in self.param_groups],
            weight_decay=[group["weight_decay"] for group in self.param_groups],
            backend=backend,
        )
        shared["step"] += 1
        shared["way"] = problem.ways[0]
        return loss, outputs

    def _ways(self, last: str | None) -> list[str]:
        """The ways to linearise the model, without those that came before the one that could follow it last."""
        curvature = "compiled" if self.defaults["compile"] else self.defaults["curvature"]
        ways = list(WAYS) if curvature == "auto" else [curvature]
        return ways[ways.index(last) :] if last and last in ways else ways

    def _adapt(
        self,
        model_fn: Callable[[], Tensor],
        loss_fn: Callable[[Tensor], Tensor],
        scalars: Tensor,
        replay: Replay,
    ) -> Tensor:
        """A look at the loss at the new weights, on the same batch; returns scalars with the λ that follows from it."""
        settings = self.param_groups[0]
        run = run_plain
        if self.defaults["compile"]:
            from .compiled import run_compiled as run
        new_loss = checked_loss(replay.again(lambda: loss_fn(run(model_fn)))).detach()
        return ops.adapt_damping(
            scalars,
            self._sign * new_loss,
            low=settings["lambda_low"],
            high=settings["lambda_high"],
            factor=settings["lambda_factor"] ** settings["lambda_interval"],
            minimum=settings["lambda_min"],
            maximum=settings["lambda_max"],
            backend=self.defaults["backend"],
        )

    def _prepare(self, params: Sequence[Tensor]) -> dict[str, Any]:
        """State on first use; z·z anew where other parameters than in the last step require gradients."""
        for p in params:
            z = self.state[p].get("z")
            if z is None or z.dtype != _state_dtype(p) or z.device != p.device:  # the model may have been converted
                self.state[p]["z"] = _zeros_like(p) if z is None else _zeros_like(p).copy_(z)
        if SHARED not in self._states:
            fresh = dict(scalars=self._initial_scalars(), step=0, active=[], way=None)
            self._states[SHARED] = fresh | dict(system=economy.unknown(params[0].device))
        shared: dict[str, Any] = self._states[SHARED]
        for name in ("scalars", "system"):
            shared[name] = shared[name].to(params[0].device)
        everything = [p for group in self.param_groups for p in group["params"]]
        active = [i for i, p in enumerate(everything) if p.requires_grad]
        if active != shared["active"]:
            z = [self.state[p]["z"] for p in params]
            scalars = shared["scalars"].clone()
            scalars[Z_DOT_Z] = ops.dots(z, z, backend=self.defaults["backend"])[0]
            shared |= {"scalars": scalars, "active": active}
        return shared

    def _initial_scalars(self) -> Tensor:
        scalars = torch.zeros(len(SCALARS), dtype=torch.float64, device=self.param_groups[0]["params"][0].device)
        scalars[LAMBD] = self.param_groups[0]["lambd"]
        scalars[reference.RATIO] = scalars[LOSS] = torch.nan
        return scalars

    @property
    def _states(self) -> dict[Any, Any]:
        """`state` with its string key, which torch saves and loads like any other but does not name in its type."""
        return self.state

    @property
    def _sign(self) -> float:
        return -1.0 if self.param_groups[0]["maximize"] else 1.0


def _zeros_like(p: Tensor) -> Tensor:
    """State for `p`: its layout, and at least float32."""
    return torch.zeros_like(p, dtype=_state_dtype(p), requires_grad=False)


def _state_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32
