"""CurveBall: Newton's method at the memory of momentum SGD (Henriques et al., arXiv 1805.08095)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import backends, checks, state
from .state import SHARED
from .step import Task, sign_of, take_step


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

    _step_supports_amp_scaling = True  # by which GradScaler.step gets as far as to the error that says what to do

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
            checks.parameters(self._parameters)
            if self._parameters:
                backends.choose(self.defaults["backend"], self._device)
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
        scaler: torch.amp.GradScaler | None = None,
        closure: None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            model_fn: called without arguments, returns the predictions, one floating-point tensor of any shape. It is
                called two to four times, with random numbers and buffers (batch-norm statistics) replayed, so that
                they advance once.
            loss_fn: called with the predictions, in float32 if they are float16 or bfloat16; returns the scalar loss.
            curvature_batch: model_fn and loss_fn for a part of the batch, from which the curvature is taken; loss,
                gradient and the look at λ stay those of the whole. Its run leaves no trace in buffers or generators.
            scaler: whose loss scale a model that computes in float16 gets, and which is told of overflows; call its
                `update()` after the step. None: a scale of this optimizer's own, which needs no care.
            closure: torch's old way, which gets an error that tells the new one.

        Returns:
            The loss and the predictions at the weights before the step, both detached.

        Raises:
            TypeError, RuntimeError: the model or the loss cannot be used, or, with `debug`, a product is wrong; nothing
                has been changed then. (An error of the model at the new weights, in a look at λ, leaves a complete step
                without that look.)
        """
        checks.scaler(self, scaler)
        if model_fn is None or loss_fn is None or closure is not None:
            checks.explain_call()
        return take_step(self, Task(model_fn, loss_fn, curvature_batch, scaler))

    def stats(self) -> dict[str, Tensor]:
        """The last step's figures as 0-dim float64 tensors on the device; reading one of them is what synchronises.

        "loss" (before the step), "beta", "rho" (0 in a skipped step), "lambd", "predicted_change", "ratio" (γ at the
        last look, NaN before the first), "skipped_steps" (not finite), "safe_steps" (loss not convex in the outputs).
        """
        shared = self._states.get(SHARED) or self._fresh()
        return state.figures(shared["scalars"], sign_of(self))

    def history(self, n: int = state.HISTORY) -> dict[str, Tensor]:
        """The figures of `stats` of the last `n` steps, at most 1024, oldest first.

        Returns:
            float64 vectors on the CPU, of `n` elements or as many as there were steps; by one copy from the device,
            the only thing that waits for it.

        Raises:
            ValueError: `n` is not a whole number between 1 and 1024.
        """
        checks.history_length(n)
        return state.figures(state.rows(self._states.get(SHARED) or self._fresh(), n), sign_of(self))

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
                self.state[p]["z"] = state.zeros_like(p).copy_(saved[i]["z"])
        if SHARED in saved:
            own = {name: saved[SHARED][name].to(self._device, copy=True) for name in state.SHAPES}
            self._states[SHARED] = saved[SHARED] | own

    def _fresh(self) -> dict[str, Any]:
        return state.fresh(self.param_groups[0]["lambd"], self._device)

    @property
    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def _device(self) -> torch.device:
        return self._parameters[0].device if self._parameters else torch.get_default_device()

    @property
    def _states(self) -> dict[Any, Any]:
        """`state` with its string key, which torch saves and loads like any other but does not name in its type."""
        return self.state
