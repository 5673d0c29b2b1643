"""Checks of what users give to the optimizer: refusals that say what to do, before anything is changed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from curveball_fused._torch_private import has_gradient_hooks
from curveball_fused.backends import BACKENDS
from curveball_fused.curvature import AUTO
from curveball_fused.loss_scale import awaits_update
from curveball_fused.settings import PER_GROUP
from curveball_fused.state import HISTORY, ON_HOST, SHAPES, SHARED

CURVATURES = ("auto", *AUTO)


def hyper_parameters(given: dict[str, Any]) -> None:
    """Raise ValueError or TypeError for an option that is out of range, NaN or of the wrong type."""
    group_values(given)
    for name, low, high in (("beta", 0.0, math.inf), ("rho", 0.0, 1.0)):
        if given[name] is not None:
            _number(name, given[name], low, high, ", or None to solve for it")
    _number("lambd", given["lambd"], 0.0, math.inf)
    _number("lambda_factor", given["lambda_factor"], 0.0, 1.0, low_open=True)
    _number("lambda_low", given["lambda_low"], -math.inf, math.inf)
    _number("lambda_high", given["lambda_high"], given["lambda_low"], math.inf)
    _number("lambda_min", given["lambda_min"], 0.0, math.inf, low_open=True)
    _number("lambda_max", given["lambda_max"], given["lambda_min"], math.inf)
    if given["auto_lambda"]:
        hint = ", between lambda_min and lambda_max, since auto_lambda is on"
        _number("lambd", given["lambd"], given["lambda_min"], given["lambda_max"], hint)
    for name in ("lambda_interval", "solve_interval"):
        if not isinstance(given[name], int) or isinstance(given[name], bool) or given[name] < 1:
            raise ValueError(f"{name} must be a whole number of steps, at least 1; got {given[name]!r}.")
    _number("average", given["average"], 0.0, 1.0 - 1e-6, ", the part of the old value that is kept")
    for name, allowed in (("curvature", CURVATURES), ("backend", BACKENDS)):
        if given[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {given[name]!r}.")
    for name in ("auto_lambda", "maximize", "compile", "debug"):
        if not isinstance(given[name], bool):
            raise TypeError(f"{name} must be True or False; got {given[name]!r}.")
    if given["compile"]:
        _compilable(given["curvature"])


def _compilable(curvature: str) -> None:
    if curvature not in ("auto", "linearize"):
        raise ValueError(
            f'compile=True linearizes the model by a method of its own: leave out curvature="{curvature}".'
        )
    try:
        from .curvature import compiled  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"compile=True needs torch's compiler, which this torch ({torch.__version__}) lacks or keeps elsewhere: "
            f"{error}. Leave compile=True off."
        ) from error


def group_settings(group: Any, defaults: dict[str, Any]) -> None:
    """Raise for a group that sets what is not its own: one solve serves all groups, so the rest is the optimizer's."""
    if not isinstance(group, dict):
        raise TypeError(f"a parameter group must be a dict; got {type(group).__name__}.")
    group_values({name: group.get(name, defaults[name]) for name in PER_GROUP})
    for name, value in defaults.items():
        if name not in PER_GROUP and name in group and group[name] != value:
            raise ValueError(
                f"{name} belongs to the whole optimizer, as one joint solve serves all groups: give it to the "
                f"constructor. A group may have its own {' and '.join(PER_GROUP)}."
            )


def group_values(values: dict[str, Any]) -> None:
    """Raise for an `lr` or `weight_decay` that cannot be used."""
    lr = values["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            raise ValueError(f"a tensor lr must be floating-point, with one element; got {lr.dtype}{list(lr.shape)}.")
        lr = lr.item()
    _number("lr", lr, 0.0, math.inf)
    _number("weight_decay", values["weight_decay"], 0.0, math.inf)


def raise_wrong_step_call() -> NoReturn:
    """Raise TypeError for a call of `step` in torch's old way."""
    raise TypeError(
        "CurveBall.step needs two functions, step(model_fn, loss_fn), as it differentiates the model itself. Instead "
        "of a closure that calls backward(), write:\n"
        "    loss, outputs = optimizer.step(lambda: model(x), lambda outputs: F.cross_entropy(outputs, y))"
    )


def curvature_batch(given: Any, params: Sequence[Tensor]) -> None:
    """Raise for a `curvature_batch` that is not two functions, or whose gradient would not add up."""
    if not isinstance(given, tuple) or len(given) != 2 or not all(callable(f) for f in given):
        raise TypeError("curvature_batch must be two functions, (model_fn, loss_fn), of a part of the batch.")
    if any(has_gradient_hooks(p) for p in params):
        raise RuntimeError("curvature_batch cannot be used with hooks that alter gradients: remove one of the two.")


def scaler(optimizer: Any, given: Any) -> None:
    """Raise for something else than a scaler, and for a step that a scaler calls."""
    if "grad_scale" in vars(optimizer):
        del optimizer.grad_scale, optimizer.found_inf
        raise RuntimeError(
            "GradScaler.step cannot unscale what CurveBall differentiates itself: instead of scaler.step(optimizer, "
            "...) write optimizer.step(model_fn, loss_fn, scaler=scaler), and scaler.update() as before."
        )
    if given is not None and not isinstance(given, torch.amp.GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler; got {type(given).__name__}.")
    if given is not None and awaits_update(given, optimizer):
        raise RuntimeError("the scaler has not been updated since this optimizer's last step: call scaler.update().")


def history_length(n: Any) -> None:
    """Raise for a number of steps that the history cannot hold."""
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= HISTORY:
        raise ValueError(f"n must be a whole number of steps, from 1 to {HISTORY}; got {n!r}.")


def parameters(params: Sequence[Any]) -> None:
    """Raise for parameters that the kernels cannot serve."""
    for i, p in enumerate(params):
        if p.layout != torch.strided:
            raise ValueError(f"parameter {i} is sparse ({p.layout}): CurveBall needs dense parameters.")
        if p.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            hint = "use torch.view_as_real" if p.is_complex() else "convert it to a floating-point dtype"
            raise TypeError(
                f"parameter {i} has dtype {p.dtype}: CurveBall needs float16, bfloat16, float32 or float64; {hint}."
            )
    devices = sorted({str(p.device) for p in params})
    if len(devices) > 1:
        raise ValueError(f"the parameters lie on several devices ({', '.join(devices)}): move the model to one.")


def checkpoint(state_dict: Any, param_groups: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError for a state dictionary that does not fit the parameters."""
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("not an optimizer's state_dict: it lacks 'state' and 'param_groups'.")
    saved = state_dict["param_groups"]
    sizes, own = [len(g["params"]) for g in saved], [len(g["params"]) for g in param_groups]
    if sizes != own:
        raise ValueError(f"the checkpoint has groups of {sizes} parameters, this optimizer of {own}.")
    shared = state_dict["state"].get(SHARED)
    known = isinstance(shared, dict) and shared.keys() >= {*SHAPES, *ON_HOST}
    if shared is not None and not (
        known and all(getattr(shared[name], "shape", None) == size for name, size in SHAPES.items())
    ):
        raise ValueError("the checkpoint's CurveBall scalars are missing or of another version of this package.")
    order = [i for group in saved for i in group["params"]]
    params = [p for group in param_groups for p in group["params"]]
    for position, (i, p) in enumerate(zip(order, params, strict=True)):
        z = state_dict["state"].get(i, {}).get("z") if i in state_dict["state"] else None
        if i in state_dict["state"] and not isinstance(z, Tensor):
            raise ValueError(f"the checkpoint has no CurveBall state for parameter {position}: another optimizer's?")
        if z is not None and z.shape != p.shape:
            raise ValueError(
                f"the checkpoint's state for parameter {position} has shape {tuple(z.shape)}, the parameter "
                f"{tuple(p.shape)}: it belongs to another model."
            )


def _number(name: str, value: Any, low: float, high: float, hint: str = "", low_open: bool = False) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number{hint}; got {value!r}.")
    value = float(value)
    if math.isnan(value) or math.isinf(value) or not low <= value <= high or (low_open and value == low):
        bounds = f"{'above' if low_open else 'at least'} {low}" if high == math.inf else f"between {low} and {high}"
        raise ValueError(f"{name} must be finite and {bounds}{hint}; got {value!r}.")
