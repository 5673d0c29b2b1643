"""CurveBall: Newton's method at the memory of momentum SGD (Henriques et al., arXiv 1805.08095)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from curveball_fused import advice, backends, checks, data_parallel, state
from curveball_fused.settings import Settings, defaults_of, with_former_options
from curveball_fused.step import StepInputs, take_step
from curveball_fused.step_arguments import Closure, Functions, GivenPart, given_parts


class CurveBall(Optimizer):
    r"""Implement CurveBall, a second-order optimizer that sets its own learning rate β, momentum ρ and damping λ.

    Let f(w) be the model's outputs, J = ∂f/∂w, g and H gradient and Hessian of the loss with respect to the outputs.
    Each step improves z, an estimate of the Newton step -Ĥ⁻¹Jᵀg with the damped Gauss-Newton matrix Ĥ = JᵀHJ + λI, by
    one gradient step on that linear system, and adds it to the weights::

        Δ = Jᵀ(H Jz + g) + λz
        [β, -ρ] = A⁺ b,  A = [[Δ·ĤΔ, z·ĤΔ], [z·ĤΔ, z·Ĥz]],  b = [g·JΔ, g·Jz]
        z ← ρz - βΔ
        w ← (1 - lr·weight_decay) w + lr z

    β and ρ minimize the quadratic model of the loss in span{Δ, z}: equation (7) of docs/method.md. Every
    `lambda_interval` steps the loss at the new weights is compared with what that model predicted: λ falls where γ, the
    ratio of actual to predicted change, is above `lambda_high`, and grows where it is below `lambda_low`.

    Args:
        params: parameters, or groups of them, each with its own `lr` and `weight_decay` if given; real, dense, of
            float16, bfloat16, float32 or float64, on one device.
        lr: factor on the step, at least 0; number or 0-dim tensor; per group (default: 1.0).
        beta: step size β on the linear system, at least 0; None solves for it (default: None).
        rho: momentum ρ, from 0 to 1; None solves for it (default: None).
        preconditioner: the metric P in which a step measures lengths. None: the Euclidean metric, as published, in the
            memory of momentum SGD. "kronecker": for each matrix M of weights the eigenbasis of averages of MMᵀ and MᵀM
            over the gradients, and the root of their mean square in it (SOAP's): no option has to be tuned, at the
            memory of six copies of a square matrix of weights, and of more for other shapes (default: None).
        direction: "residual": Δ = P⁻¹Jᵀ(g + HJz) + λz, as published, or "gradient": Δ = P⁻¹Jᵀg, which needs no
            curvature between solves (default: "residual"; "gradient" with a preconditioner).
        lambd: damping λ, or its first value, at least 0, and within its bounds if it adapts; in the Euclidean metric 10
            suits nets without batch norm (default: 1.0; 30 with a preconditioner).
        auto_lambda: whether λ adapts (default: True).
        lambda_factor: factor per solve by which λ falls, or, inverted, grows; above 0, at most 1 (default: 0.999; 0.99
            with a preconditioner).
        lambda_low: λ grows where γ is below this (default: 0.5).
        lambda_high: λ falls where γ is above this; at least `lambda_low` (default: 1.5).
        lambda_interval: solves from one adaptation of λ to the next, each of which costs one more forward pass; at
            least 1 (default: 5).
        lambda_min: lower bound of an adapting λ, above 0 (default: 1e-6).
        lambda_max: upper bound of an adapting λ (default: 1e6).
        average: how much of β and ρ is kept from solve to solve (exponential average, without bias at the start), from
            0 to below 1 (default: 0.0; 0.5 with a preconditioner).
        solve_interval: steps from one solve to the next; those between take the last β and ρ and cost a step of SGD.
            At least 1; above 1 only with the direction "gradient" (default: 1; 20 with a preconditioner, where 5
            reaches lower training losses if every step has the same batch).
        weight_decay: decoupled: w shrinks by lr·weight_decay per step; at least 0; per group. As lr is 1, AdamW's 0.1
            at a rate of 0.001 is 1e-4 here (default: 0.0).
        maximize: whether to climb (default: False).
        curvature: how Jacobian products are computed: "linearize" (the model runs once), "linearize_operators"
            (likewise, for models that differentiate inside), "forward" (dual numbers; slower, and the memory of SGD),
            "double_backward" (any model that autograd can differentiate twice), or "auto": the first of these that
            can follow the model (default: "auto").
        compile: whether torch.compile runs the model and its Jacobian products: fastest on nets with batch norm, after
            a first step that compiles for up to minutes. For models that torch.compile can follow as one graph; an
            error otherwise (default: False).
        backend: whose kernels do the arithmetic on parameters and outputs: "cuda" (CUDA C++), "triton", "cpu" (C++),
            "torch" (no compiler needed), or "auto": the first of these that can run where the parameters are. One that
            is named is an error where it cannot run. Tangents inside the model are computed by Triton on a GPU and in
            C++ on a CPU, where they have a kernel for the dtype, unless `backend` is "torch" (default: "auto").
        debug: whether each step that solves checks its products, and each torch call of the model, against finite
            differences and adjoint identities, and P, before it changes anything. Slow (tens of steps' time), and reads
            values back to the host; for a few steps on a new model. The steps are the same, bit for bit (default:
            False).
        process_group: of torch.distributed: the processes that train the same model, each on its part of a batch; one
            gradient is summed over them in each step. Not needed of a model in DistributedDataParallel, whose own it is
            (default: None).

    Raises:
        TypeError: a parameter or hyper-parameter is of a type that cannot be used; the message says what to do.
        ValueError: a parameter or hyper-parameter cannot be used; the message says what to do.
        RuntimeError: a backend was named that cannot run here, or the parameters' device lacks float64.

    Example::

        optimizer = CurveBall(model.parameters(), preconditioner="kronecker")
        for x, y in loader:
            loss, outputs = optimizer.step(lambda: model(x), lambda out: F.cross_entropy(out, y))

    References:
        Henriques, Ehrhardt, Albanie and Vedaldi, "Small steps and giant leaps: Minimal Newton solvers for deep
        learning", ICCV 2019, arXiv 1805.08095: the method. Schraudolph, "Fast curvature matrix-vector products for
        second-order gradient descent", 2002: the Gauss-Newton products. Martens, "Deep learning via Hessian-free
        optimization", 2010: the damping. Martens and Grosse, "Optimizing neural networks with Kronecker-factored
        approximate curvature", 2015, section 7: the solve for rate and momentum.
    """

    _step_supports_amp_scaling = True  # by which GradScaler.step gets as far as to the error that says what to do
    _shared: dict[str, Any] | None = None  # the numbers of all parameters as they were last in use, see `state`
    _checked: tuple[int, bool] | None = None  # as what the parameters and processes were last checked before a step
    _process_group: torch.distributed.ProcessGroup | None = None
    _processes: data_parallel.Processes | None = None  # that train the parameters together, as far as known
    _may_share: bool = True  # whether to look for them

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1.0,
        *,
        beta: float | None = None,
        rho: float | None = None,
        preconditioner: str | None = None,
        direction: str | None = None,
        lambd: float | None = None,
        auto_lambda: bool = True,
        lambda_factor: float | None = None,
        lambda_low: float = 0.5,
        lambda_high: float = 1.5,
        lambda_interval: int = 5,
        lambda_min: float = 1e-6,
        lambda_max: float = 1e6,
        average: float | None = None,
        solve_interval: int | None = None,
        weight_decay: float = 0.0,
        maximize: bool = False,
        curvature: str = "auto",
        compile: bool = False,
        backend: str = "auto",
        debug: bool = False,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "beta": beta,
            "rho": rho,
            "preconditioner": preconditioner,
            "direction": direction,
            "lambd": lambd,
            "auto_lambda": auto_lambda,
            "lambda_factor": lambda_factor,
            "lambda_low": lambda_low,
            "lambda_high": lambda_high,
            "lambda_interval": lambda_interval,
            "lambda_min": lambda_min,
            "lambda_max": lambda_max,
            "average": average,
            "solve_interval": solve_interval,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "curvature": curvature,
            "compile": compile,
            "backend": backend,
            "debug": debug,
        }
        checks.preconditioner(preconditioner)
        chosen = defaults_of(preconditioner, direction)
        defaults = {name: chosen.get(name) if value is None else value for name, value in defaults.items()}
        checks.hyper_parameters(defaults)
        checks.process_group(process_group)
        self._process_group = process_group
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with their own `lr` and `weight_decay` if given; all other settings are the optimizer's.

        Args:
            param_group: `{"params": ...}`, and perhaps "lr" and "weight_decay".

        Raises:
            TypeError: the group, or a parameter in it, is of a type that cannot be used.
            ValueError: it sets an option that belongs to the whole optimizer, a value is out of range, or two
                parameters share memory.
            RuntimeError: the backend cannot run where the parameters are, or that device lacks float64.

        Example::

            optimizer.add_param_group({"params": head.parameters(), "lr": 0.5})
        """
        checks.group_settings(param_group, self.defaults)
        super().add_param_group(param_group)
        try:
            checks.parameters(self._parameters)
            if self._parameters:
                checks.float64_on(self._device)
                checks.separate_memory(self._parameters)
                backends.choose(self.defaults["backend"], self._device)
        except Exception:
            self.param_groups.pop()
            raise
        self._make_state()

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        model_fn: Callable[[], Any] | Sequence[Functions | Closure] | None = None,
        loss_fn: Callable[[Any], Tensor] | None = None,
        *,
        weights: Sequence[float | Tensor] | None = None,
        curvature_batch: Functions | None = None,
        scaler: torch.amp.GradScaler | None = None,
        closure: Closure | Sequence[Functions | Closure] | None = None,
    ) -> tuple[Tensor, Any]:
        """Take one step, of two functions, of one closure that stands for both, or of a batch in parts.

        Args:
            model_fn: called without arguments, returns the predictions: a floating-point tensor of any shape, or nested
                tuples, lists, mappings and dataclasses of them and of other things. It is called one to four times,
                with random numbers and buffers (batch-norm statistics) replayed, so that they advance once. Without
                `loss_fn` it is the closure, or a list of the batch's parts, each `(model_fn, loss_fn)` or a closure:
                loss, gradient and curvature are those of the whole, in the memory of one part.
            loss_fn: called with the predictions, in float32 if they are float16 or bfloat16; returns the scalar loss.
                Tensors that depend on no parameter, and what is no tensor, it is given as they are.
            weights: of the parts: the loss is Σ wᵢLᵢ / Σ wᵢ, over those of all processes, too. Numbers or 0-dim
                tensors, at least 0; those of losses that are means, as most are, are the numbers of samples. As
                nothing waits for a tensor's value, a negative one is no error: the step is skipped, as by a loss that
                is no number (default: the length of each part's outputs, their first dimension).
            curvature_batch: model_fn and loss_fn for a part of the batch, from which the curvature is taken; loss,
                gradient and the adaptation of λ stay those of the whole. Its run leaves no trace in buffers or
                generators (default: None, the curvature of the whole batch).
            scaler: whose loss scale a model that computes in float16 gets, and which is told of overflows; call its
                `update()` after the step (default: None, a scale of this optimizer's own, which needs no care).
            closure: called as `model_fn` is, returns predictions and `loss_fn`; or a list of parts. It must not call
                backward(); what torch calls a closure, one that does and returns the loss, gets an error that tells
                what to write.

        Returns:
            The loss (0-dim, of the dtype that `loss_fn` returns), of all parts and processes, and the predictions, in
            their structure, at the weights before the step, both detached. Of a list of parts a list of predictions.

        Raises:
            TypeError: an argument, or what `model_fn` or `loss_fn` returns, is of a type that cannot be used.
            ValueError: two parameters have come to share memory.
            RuntimeError: the model or the loss cannot be used, another process has failed or has other weights, this
                one was forked from one that stepped on threads, or, with `debug`, a product is wrong; nothing has been
                changed then. (An error between solves leaves buffers as the model has left them; one of the model at
                the new weights, where λ adapts, a step that is complete but for that.)

        Example::

            loss, outputs = optimizer.step(lambda: model(x), lambda out: F.mse_loss(out, y))
            optimizer.step(lambda: (model(x), lambda out: F.mse_loss(out, y)))  # the same step

            parts = [(partial(model, x), partial(F.mse_loss, target=y)) for x, y in parts_of_a_batch]
            loss, outputs = optimizer.step(parts)
        """
        checks.threads_there()
        checks.scaler(self, scaler)
        given, is_list = given_parts(model_fn, loss_fn, closure, weights)
        curvature_parts = None
        if curvature_batch is not None:
            checks.curvature_batch(curvature_batch, [p for p in self._parameters if p.requires_grad])
            curvature_parts = [GivenPart(curvature_batch).part()]
        inputs = StepInputs([each.part() for each in given], curvature_parts, scaler)
        loss, outputs = take_step(self, inputs, Settings.of(self))
        restored = [each.of(out) for each, out in zip(given, outputs, strict=True)]
        return loss, restored if is_list else restored[0]

    def check_replicas(self) -> None:
        """Check that all processes which train the same model hold the same numbers, bit for bit.

        Weights and the optimizer's state are compared, by checksums, which waits for the device. The first step does
        it, and with `debug` each one; every process must call it. Where there is one process it does nothing.

        Raises:
            RuntimeError: they differ.

        Example::

            if step % 1000 == 0:
                optimizer.check_replicas()
        """
        processes = self._processes or data_parallel.processes_of(self._parameters, self._process_group)
        if processes is not None:
            # By which method a model is linearized is each process's own affair.
            own = [sorted(self.state.get(p, {}).items()) for p in self._parameters]
            processes.check_equal([*self._parameters, *(t for each in own for name, t in each if name != "method")])

    def stats(self) -> dict[str, Tensor]:
        """Return the last step's figures; reading one of them is what synchronizes.

        Returns:
            0-dim float64 tensors on the device: "loss" (before the step), "beta", "rho" (0 in a skipped step), "lambd",
            "predicted_change" (of the last solve), "ratio" (γ where λ was last adapted, NaN before), "skipped_steps"
            (not finite, or refused by the guard), "safe_steps" (loss not convex in the outputs), "mismatched_steps" (of
            those that were skipped, the ones whose Jacobian products were not each other's transpose) and
            "adjoint_error" (by how much they last missed that, relative; about one step in 100 looks). Where several
            processes train the model, "sent_bytes", on the CPU: what this one has given to collectives in the step.

        Example::

            print(float(optimizer.stats()["lambd"]))
        """
        shared = self._current()
        mismatched, error = shared["guard"].clone().unbind()
        found = {"mismatched_steps": mismatched, "adjoint_error": error}
        if self._processes is not None:
            found["sent_bytes"] = torch.tensor(float(self._processes.sent_bytes), dtype=torch.float64)
        return state.stats_of(shared["scalars"], Settings.of(self).sign) | found

    def history(self, n: int = state.HISTORY) -> dict[str, Tensor]:
        """Return the figures of `stats` of the last `n` steps, oldest first, and warn where these say what to change.

        Of each kind there is one `TrainingWarning` (docs/monitoring.md has them), for which all steps that are kept
        are looked at, whatever `n` is.

        Args:
            n: how many, from 1 to 1024 (default: 1024).

        Returns:
            "step", the numbers of the steps, from 1, and for each figure of `stats`, but "mismatched_steps",
            "adjoint_error" and "sent_bytes", a float64 vector; on the CPU, of `n` elements or as many as there were
            steps. By one copy from the device, the only thing that waits for it.

        Raises:
            ValueError: `n` is not a whole number between 1 and 1024.

        Example::

            history = optimizer.history(100)
            plt.plot(history["step"], history["loss"])
        """
        checks.history_length(n)
        shared, settings = self._current(), Settings.of(self)
        rows, last = state.history_rows(shared), shared["step"]
        advice.warn(self, advice.advise(rows, shared, settings))
        rows = rows[-n:]
        numbers = torch.arange(last - len(rows), last, device="cpu") + 1
        return {"step": numbers} | state.stats_of(rows, settings.sign)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all parameters and the groups with their options, as any optimizer of torch does.

        Returns:
            A dictionary of "state", where all values are tensors, and "param_groups"; of references, as in torch.

        Example::

            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "checkpoint.pt")
        """
        self._make_state()  # for a parameter that requires a gradient since a moment ago
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a `state_dict()` of an optimizer over parameters of the same shapes; training resumes bit for bit.

        Args:
            state_dict: of this version or an earlier one.

        Raises:
            ValueError: the checkpoint belongs to other parameters; nothing has been changed then.

        Example::

            optimizer.load_state_dict(torch.load("checkpoint.pt")["optimizer"])
        """
        checks.is_state_dict(state_dict)
        saved: dict[Any, Any] = {}
        params: dict[Any, Tensor] = {}

        def take(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            """Keep the state from torch, which would cast z to the parameters' dtypes."""
            given = state.upgraded(given)
            given = given | {"param_groups": with_former_options(given["param_groups"])}
            checks.checkpoint(given, self.param_groups)
            saved.update(given["state"])
            params.update(zip(_params_of(given["param_groups"]), self._parameters, strict=True))
            return given | {"state": {}}

        def restore(_: Optimizer) -> None:
            state.restore(self.state, saved, params)
            self._make_state()

        # After the user's own hooks that change a state_dict, and before those that look at what was loaded.
        hooks = (
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        own = super().__getstate__()
        group = self._process_group
        return own if group is None else own | {"_process_group": data_parallel.CopiedGroup(group)}

    def __setstate__(self, state_of_pickle: dict[str, Any]) -> None:
        super().__setstate__(state.upgraded(state_of_pickle))
        if isinstance(self._process_group, data_parallel.CopiedGroup):
            self._process_group = self._process_group.group
        self.param_groups = with_former_options(self.param_groups)
        self._make_state()

    def _make_state(self) -> None:
        if self._parameters:
            options = self.param_groups[0]
            self._shared = state.make(
                self.state, self._parameters, self._shared, options["lambd"], options["preconditioner"]
            )

    def _current(self) -> dict[str, Any]:
        """Return the numbers of all parameters."""
        if not state.is_current(self.state, self._parameters, self._shared):
            self._make_state()
        return self._shared or state.fresh(self.param_groups[0]["lambd"], self._device)

    @property
    def _parameters(self) -> list[Tensor]:
        return _params_of(self.param_groups)

    @property
    def _device(self) -> torch.device:
        return self._parameters[0].device if self._parameters else torch.get_default_device()


def _params_of(groups: Sequence[dict[str, Any]]) -> list[Any]:
    return [p for group in groups for p in group["params"]]
