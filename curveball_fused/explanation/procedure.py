"""Find out, before training, what CurveBall would do with a model and a loss, and at what cost."""

from __future__ import annotations

import math
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from curveball_fused import backends, guard, user_warnings
from curveball_fused.backends.dtypes import compute_dtype
from curveball_fused.backends.reference.closed_form_losses import CLOSED_FORMS
from curveball_fused.curvature import AUTO, MethodUnsupported, ModelFn, checked_outputs, torch_modes
from curveball_fused.curvature.torch_modes import force_eager
from curveball_fused.losses import LossFn, checked_loss
from curveball_fused.losses.fused import fused
from curveball_fused.losses.recognition import Recognizer
from curveball_fused.optimizer import CurveBall
from curveball_fused.preconditioners import multiply_adds, shapes
from curveball_fused.replay import Replay
from curveball_fused.settings import Settings
from curveball_fused.step import StepInputs, take_step
from curveball_fused.step_arguments import GivenPart

from .cost import Cost, counted, median_seconds
from .report import Explanation, MethodReport
from .trace_report import Function, trace


def explain(model_fn: ModelFn, loss_fn: LossFn, params: Iterable[Any]) -> Explanation:
    """Find out what CurveBall would do with a model, by running it some dozens of times.

    Weights, buffers and generators are put back, so that a training that follows is the same as without. On CUDA,
    torch's statistics of peak memory begin anew.

    Parameters, a model or a loss that cannot be used at all raise the `TypeError`, `ValueError` or `RuntimeError` that
    `CurveBall` and `CurveBall.step` raise for them. A model that no method can follow is a finding, not an error.

    Args:
        model_fn: called without arguments, returns the predictions, as for `CurveBall.step`.
        loss_fn: maps the predictions to the scalar loss, as for `CurveBall.step`.
        params: parameters or parameter groups, as for `CurveBall`.

    Returns:
        The findings; `str()` makes a report of them.

    Example::

        print(explain(lambda: model(x), lambda out: F.cross_entropy(out, y), model.parameters()))
    """
    optimizer = CurveBall(params, auto_lambda=False)
    optimizer._may_share = False  # its steps are of this process
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not (callable(model_fn) and callable(loss_fn) and trained):
        optimizer.step(model_fn, loss_fn)  # which raises, and says why
    device = trained[0].device
    part = GivenPart((model_fn, loss_fn)).part()
    model_fn, loss_fn = part.model_fn, part.loss_fn

    def forward() -> Tensor:
        with torch.enable_grad():
            return checked_loss(loss_fn(checked_outputs(model_fn())))

    def backward() -> None:
        torch.autograd.grad(forward(), trained, allow_unused=True)

    def step(method: str) -> None:
        with torch.no_grad():
            take_step(optimizer, StepInputs([part]), replace(Settings.of(optimizer), curvature=method))

    with _quiet(), force_eager(), _unchanged(forward, trained) as restore:
        errors = {method: _error(partial(step, method), restore) for method in AUTO}
        others = [error for error in errors.values() if error is not None and not _is_refusal(error)]
        if others and all(errors.values()):
            raise others[0]
        checked = {method: error for (method, _), error in guard.known_maps(optimizer).items()}
        outputs, functions = trace(model_fn, trained)
        loss, loss_products = _loss(loss_fn, outputs)
        runs: dict[str, Callable[[], Any]] = {"": forward}
        if not all(errors.values()) or _error(backward, restore) is None:
            runs["backward"] = backward
        runs |= {method: partial(step, method) for method, error in errors.items() if error is None}
        costs = dict(zip(runs, _costs(list(runs.values()), functions, restore, device), strict=True))

    better = (("cuda", "triton") if device.type == "cuda" else ("cpu",)) if device.type in ("cuda", "cpu") else ()
    why_not = {name: backends.why_not(name, device) for name in better}
    return Explanation(
        functions=functions,
        loss=loss,
        loss_products=loss_products,
        methods=tuple(
            MethodReport(method, _reason(error), checked.get(method), costs.get(method))
            for method, error in errors.items()
        ),
        forward=costs[""],
        backward=costs.get("backward"),
        backend=backends.choose("auto", device),
        why_not={name: reason for name, reason in why_not.items() if reason},
        device=device,
        parameters=sum(p.numel() for p in trained),
        parameter_bytes=sum(p.nbytes for p in trained),
        state_bytes=sum(p.numel() * compute_dtype(p.dtype).itemsize for p in trained),
        lambda_interval=optimizer.defaults["lambda_interval"],
        metric_multiply_adds=sum(map(multiply_adds, trained)),
        metric_bytes=sum(
            math.prod(shape) * compute_dtype(p.dtype).itemsize for p in trained for shape in shapes(p).values()
        ),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings; those that are given once per process are left to the training."""
    announced = set(user_warnings.announced)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            user_warnings.announced.intersection_update(announced)


@contextmanager
def _unchanged(forward: Callable[[], Any], params: Sequence[Tensor]) -> Iterator[Callable[[], None]]:
    """Yield a function that puts back what runs of the model and steps have changed; it is called at the end too."""
    weights = [p.detach().clone() for p in params]
    replay = Replay(params, params[0].device)

    def restore() -> None:
        replay.rewind()
        with torch.no_grad():
            for p, weight in zip(params, weights, strict=True):
                p.copy_(weight)

    try:
        replay.first(forward)
        yield restore
    finally:
        restore()


def _error(run: Callable[[], Any], restore: Callable[[], None]) -> Exception | None:
    """Return what a run raises; None where it works."""
    restore()
    try:
        run()
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # what the frames hold takes memory
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        return error
    return None


def _is_refusal(error: Exception | None) -> bool:
    """Return whether an error of a step is that this method cannot follow the model, so that "auto" tries the next."""
    return error is not None and isinstance(error.__cause__, MethodUnsupported)


def _reason(error: Exception | None) -> str:
    if error is None:
        return ""
    return str(error.__cause__).partition(": ")[2] if _is_refusal(error) else str(error)


def _loss(loss_fn: LossFn, outputs: Tensor) -> tuple[str, str]:
    """Return the name of the loss, or "" where it is not recognized, and how its products are computed."""
    leaf = outputs.detach().requires_grad_()
    with torch.enable_grad(), Recognizer(leaf) as seen:
        calls = [call for _, call in seen.recognized(loss_fn(leaf))]
    if not calls:
        return "", "autograd"
    name = " + ".join(f"F.{call.function.__name__}" for call in calls)
    if all(fused(call.function, call.args, call.kwargs, 1.0, "auto") is not None for call in calls):
        return name, "fused kernels"
    has_closed_forms = all(CLOSED_FORMS[call.function](*call.args, **call.kwargs) is not None for call in calls)
    return name, "closed form" if has_closed_forms else "autograd"


def _costs(
    runs: Sequence[Callable[[], Any]], functions: Sequence[Function], restore: Callable[[], None], device: torch.device
) -> list[Cost]:
    counts = []
    for run in runs:
        restore()
        multiply_adds, peak_bytes = counted(run, device)
        if any(function.name.rpartition(".")[2] in torch_modes.RECURRENT for function in functions):
            restore()
            with torch_modes.plain_recurrence(device.type):  # torch does not count the fused ones
                multiply_adds, _ = counted(run, device)
        counts.append((multiply_adds, peak_bytes))
    seconds = median_seconds(runs, restore, device)
    return [Cost(count[0], time, count[1]) for count, time in zip(counts, seconds, strict=True)]
