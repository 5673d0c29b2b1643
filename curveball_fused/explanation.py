"""What CurveBall would do with a model and a loss, and at what cost, told before training."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import backends, modes
from .closed_forms import CLOSED_FORMS
from .cost import Cost, counted, median_seconds
from .curvature import WAYS, ModelFn, Unfollowed, _checked
from .fused_losses import fused
from .losses import LossFn, _Recogniser, checked_loss
from .modes import uncompiled
from .optimizer import CurveBall
from .replay import Replay
from .report import report
from .state import state_dtype
from .survey import Function, Survey


@dataclass(frozen=True)
class Way:
    """One of CurveBall's ways to differentiate a model.

    Attributes:
        name: as in `curvature=`.
        refusal: why it cannot follow the model; empty where it can.
        is_error: whether the refusal is one that "auto" does not retreat from, but raises.
        cost: of a step of CurveBall, without a look at λ; None where it cannot.
    """

    name: str
    refusal: str
    is_error: bool
    cost: Cost | None


@dataclass(frozen=True)
class Explanation:
    """What `explain` has found; `str()` of it is a report.

    Attributes:
        functions: those that the model calls on the way from the parameters to the outputs.
        loss: torch's name of the loss that was recognised, or "" for any other.
        loss_products: how its gradient and curvature are computed: "fused kernels", "closed form" or "autograd".
        ways: all, in the order in which "auto" tries them.
        forward: cost of model and loss alone.
        backward: cost of model, loss and backward pass, as for SGD; None where torch has no backward pass.
        backend: whose kernels do the arithmetic on the parameters.
        why_not: for each better backend, why it does not run here.
        device: where the parameters are.
        parameters: number of their elements.
        parameter_bytes, state_bytes: of the parameters that are trained, and of CurveBall's state for them.
        lambda_interval: in one of so many steps a look at λ costs a forward pass more.
    """

    functions: tuple[Function, ...]
    loss: str
    loss_products: str
    ways: tuple[Way, ...]
    forward: Cost
    backward: Cost | None
    backend: str
    why_not: dict[str, str]
    device: torch.device
    parameters: int
    parameter_bytes: int
    state_bytes: int
    lambda_interval: int

    @property
    def way(self) -> str | None:
        """The way that curvature="auto" takes; None where it raises."""
        first = next((way for way in self.ways if way.cost is not None or way.is_error), None)
        return None if first is None or first.is_error else first.name

    def forward_equivalents(self, cost: Cost) -> float | None:
        """Multiply-adds over those of a forward pass; None where that has none that torch counts."""
        return cost.multiply_adds / self.forward.multiply_adds if self.forward.multiply_adds else None

    def __str__(self) -> str:
        return report(self)


def explain(model_fn: ModelFn, loss_fn: LossFn, params: Iterable[Any]) -> Explanation:
    """Tells what CurveBall would do with a model, by running it some dozens of times.

    Weights, buffers and generators are put back, so that a training that follows is the same as without.

    Args:
        model_fn: as for `CurveBall.step`.
        loss_fn: as for `CurveBall.step`.
        params: as for `CurveBall`.

    Returns:
        The findings. That no way can follow the model is one of them, and no error. On CUDA, torch's statistics of peak
        memory begin anew.

    Raises:
        TypeError, ValueError, RuntimeError: parameters, model or loss cannot be used at all, as from `CurveBall` and
            `CurveBall.step`.
    """
    optimizer = CurveBall(params, auto_lambda=False)
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not (callable(model_fn) and callable(loss_fn) and trained):
        optimizer.step(model_fn, loss_fn)  # which raises, and says why
    device = trained[0].device

    def forward() -> Tensor:
        with torch.enable_grad():
            return checked_loss(loss_fn(_checked(model_fn())))

    def backward() -> None:
        torch.autograd.grad(forward(), trained, allow_unused=True)

    def step(way: str) -> None:
        optimizer.defaults["curvature"] = way
        optimizer.step(model_fn, loss_fn)

    with _quiet(), uncompiled(), _unchanged(forward, trained) as restore:
        errors = {way: _error(partial(step, way), restore) for way in WAYS}
        if all(errors.values()) and not all(map(_is_refusal, errors.values())):
            raise next(error for error in errors.values() if error and not _is_refusal(error))
        functions, loss, loss_products = _survey(model_fn, loss_fn, trained)
        runs: dict[str, Callable[[], Any]] = {"": forward}
        if not all(errors.values()) or _error(backward, restore) is None:
            runs["backward"] = backward
        runs |= {way: partial(step, way) for way, error in errors.items() if error is None}
        costs = dict(zip(runs, _costs(list(runs.values()), functions, restore, device), strict=True))

    better = (("cuda", "triton") if device.type == "cuda" else ("cpu",)) if device.type in ("cuda", "cpu") else ()
    why_not = {name: backends.why_not(name, device) for name in better}
    return Explanation(
        functions=functions,
        loss=loss,
        loss_products=loss_products,
        ways=tuple(
            Way(way, _reason(error), error is not None and not _is_refusal(error), costs.get(way))
            for way, error in errors.items()
        ),
        forward=costs[""],
        backward=costs.get("backward"),
        backend=backends.choose("auto", device),
        why_not={name: reason for name, reason in why_not.items() if reason},
        device=device,
        parameters=sum(p.numel() for p in trained),
        parameter_bytes=sum(p.nbytes for p in trained),
        state_bytes=sum(p.numel() * state_dtype(p).itemsize for p in trained),
        lambda_interval=optimizer.defaults["lambda_interval"],
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings; those that are given once per process are left to the training."""
    announced = set(modes._announced)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            modes._announced.intersection_update(announced)


@contextmanager
def _unchanged(forward: Callable[[], Any], params: Sequence[Tensor]) -> Iterator[Callable[[], None]]:
    """Gives a function that puts back what runs of the model and steps have changed, which is called at the end too."""
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
    """What a run raises; None where it works."""
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
    """Whether an error of a step says that this way cannot follow the model, so that "auto" tries the next."""
    return error is not None and isinstance(error.__cause__, Unfollowed)


def _reason(error: Exception | None) -> str:
    if error is None:
        return ""
    return str(error.__cause__).partition(": ")[2] if _is_refusal(error) else str(error)


def _survey(model_fn: ModelFn, loss_fn: LossFn, params: Sequence[Tensor]) -> tuple[tuple[Function, ...], str, str]:
    """The functions of the model, the name of the loss, and how its products are computed."""
    survey = Survey(params, "auto")
    with torch.enable_grad(), survey:
        outputs = _checked(model_fn())
    functions = survey.functions(outputs)
    leaf = outputs.detach().requires_grad_()
    with torch.enable_grad(), _Recogniser(leaf) as seen:
        call = seen.recognised(loss_fn(leaf))
    if call is None:
        return functions, "", "autograd"
    name = f"F.{call.function.__name__}"
    if fused(call.function, call.args, call.kwargs, 1.0, "auto") is not None:
        return functions, name, "fused kernels"
    has_closed_form = CLOSED_FORMS[call.function](*call.args, **call.kwargs) is not None
    return functions, name, "closed form" if has_closed_form else "autograd"


def _costs(
    runs: Sequence[Callable[[], Any]], functions: Sequence[Function], restore: Callable[[], None], device: torch.device
) -> list[Cost]:
    counts = []
    for run in runs:
        restore()
        multiply_adds, peak_bytes = counted(run, device)
        if any(function.name.rpartition(".")[2] in modes._RECURRENT for function in functions):
            restore()
            with modes._plain_recurrence(device.type):  # torch does not count the fused ones
                multiply_adds, _ = counted(run, device)
        counts.append((multiply_adds, peak_bytes))
    seconds = median_seconds(runs, restore, device)
    return [Cost(count[0], time, count[1]) for count, time in zip(counts, seconds, strict=True)]
