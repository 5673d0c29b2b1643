"""Debug mode: the products of a step against finite differences of the model, and against the adjoint identities.

Slow, and full of host reads: some twenty runs of the model, beside the checks of each call in `op_checks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from curveball_fused._torch_private import has_gradient_hooks
from curveball_fused.autograd_graph import nodes_of
from curveball_fused.curvature import ModelFn, evaluate
from curveball_fused.curvature.double_backward import DoubleBackward
from curveball_fused.curvature.dual_numbers import DualNumbers
from curveball_fused.curvature.torch_modes import first_line
from curveball_fused.losses import checked_loss
from curveball_fused.replay import Replay
from curveball_fused.user_warnings import announce

from .finite_differences import difference_quotients, dot, relative
from .op_checks import OpChecks


@dataclass(frozen=True)
class Step:
    """What a step has computed before it changes anything.

    Attributes:
        method: of linearizing the model, as in `curvature=`, or "compiled".
        model_fn: called without arguments, returns the predictions.
        loss_fn: maps the predictions to the scalar loss.
        sign: 1, or -1 where the loss is maximized.
        params: the parameters that are optimized.
        replay: makes further runs of the model the same function.
        z: the state, in the parameters' shapes.
        outputs: the predictions, detached.
        jz: Jz, of the outputs' shape.
        theta: θ, 1 or 0.
        c: g + θ H Jz, of the outputs' shape.
        r: Jᵀc, in the parameters' shapes.
        u: P⁻¹r, likewise.
        ju: Ju, of the outputs' shape.
        products: float64 `[g·Jz, Jz·HJz, g·Ju, Jz·HJu, Ju·HJu]`.
        is_hessian: whether H is the loss's Hessian, rather than another curvature in its place.
    """

    method: str
    model_fn: ModelFn
    loss_fn: Callable[[Tensor], Tensor]
    sign: float
    params: Sequence[Tensor]
    replay: Replay
    z: Sequence[Tensor]
    outputs: Tensor
    jz: Tensor
    theta: float
    c: Tensor
    r: Sequence[Tensor]
    u: Sequence[Tensor]
    ju: Tensor
    products: Tensor
    is_hessian: bool


def check(step: Step) -> None:
    """Check each call of the model, the Jacobian products and those of the loss.

    `RuntimeError` is raised for one that is wrong; the message says which, by how much, and what to do. What cannot be
    checked is announced in a warning.

    Args:
        step: what a step has computed; weights, buffers and generators are left as they were.
    """
    # A compiled step transposes torch's backward passes.
    calls = OpChecks("double_backward" if step.method == "compiled" else step.method)
    outputs = step.replay.again(partial(calls.run, step.model_fn))
    custom = _custom_functions(outputs)
    eps = max(calls.eps, torch.finfo(outputs.dtype).eps, *(torch.finfo(p.dtype).eps for p in step.params))
    about = _about(calls, custom)
    _judge("model_fn, run once more,", relative(step.outputs.double() - outputs, outputs.double()), eps**0.5, about)
    if not any(has_gradient_hooks(p) for p in step.params):
        _check_adjoint(step, eps, about)
    stops = [*calls.stops, *custom]
    for name, direction, jv in (("Jz", step.z, step.jz), ("Ju", step.u, step.ju)):
        # A finite difference of the model would see what its derivative is not meant to see.
        if stops or step.replay.wrote_parameters:
            _check_by_another_method(step, name, direction, jv, eps, about)
        else:
            _check_by_differences(step, name, direction, jv, eps, about)
    _check_loss(step)


def suspects(method: str, model_fn: ModelFn, replay: Replay) -> str:
    """Return which function of a model has a wrong derivative, or else where to search, for an error message.

    Args:
        method: of linearizing the model, as in `curvature=`, or "compiled".
        model_fn: called without arguments, returns the predictions.
        replay: makes another run of the model the same function.
    """
    calls = OpChecks("double_backward" if method == "compiled" else method)
    try:
        outputs = replay.again(partial(calls.run, model_fn))
    except RuntimeError as error:
        return first_line(error).partition(". Nothing has been changed")[0]
    return _searched(calls, _custom_functions(outputs))


def _check_adjoint(step: Step, eps: float, about: str) -> None:
    """Check that z·r = Jz·c and u·r = Ju·c, for r = Jᵀc."""
    for name, v, jv in (("z·Jᵀc = Jz·c", step.z, step.jz), ("u·Jᵀc = Ju·c", step.u, step.ju)):
        left, right = sum(dot(a, b) for a, b in zip(v, step.r, strict=True)), dot(jv, step.c)
        scale = max(abs(left), abs(right), 0.1 * _norm([jv]) * _norm([step.c]))
        _judge(f"the adjoint identity {name}", abs(left - right) / scale if scale else 0.0, 2 * eps**0.5, about)


def _check_by_differences(
    step: Step, name: str, direction: Sequence[Tensor], jv: Tensor, eps: float, about: str
) -> None:
    """Check Jv against (f(w + hv) - f(w - hv)) / 2h.

    One of several h must agree: rounding bounds h from below, curvature from above.
    """
    length = _norm(direction)
    if length == 0:
        return _judge(f"{name}, of the zero vector,", _norm([jv]), 0.0, about)
    errors, quotients, tolerance = [], [], 4 * eps ** (1 / 3)
    for factor in (1.0, 1 / 8, 1 / 64, 8.0):
        h = factor * eps ** (1 / 3) * (_norm(step.params) or 1.0) / length
        quotient = (_at(step, direction, h) - _at(step, direction, -h)) / (2 * h)
        slack = 16 * eps * step.outputs.double().norm() / h
        errors.append(_trimmed(jv.double() - quotient, quotient, float(slack)))
        quotients.append(quotient)
        if errors[-1] <= tolerance:
            return None
    first, second = sorted(range(len(errors)), key=errors.__getitem__)[:2]
    if relative(quotients[first] - quotients[second], quotients[first]) > 0.5 * min(1.0, errors[first]):
        return announce(name, f"curveball_fused: {name} is unchecked: finite differences of this model disagree.")
    return _judge(f"{name}, against a finite difference of the model,", min(errors), tolerance, about)


def _check_by_another_method(
    step: Step, name: str, direction: Sequence[Tensor], jv: Tensor, eps: float, about: str
) -> None:
    other = DualNumbers if step.method == "double_backward" else DoubleBackward
    model_fn, replay = partial(step.replay.again, step.model_fn), Replay(step.params, step.params[0].device)
    try:
        with torch.enable_grad():
            _, expected = other(model_fn, step.params, replay).jvp(direction)
    except (RuntimeError, NotImplementedError) as error:
        return announce(name, f"curveball_fused: {name} is unchecked: {first_line(error)}")
    difference = relative(jv.double() - expected, expected.double())
    return _judge(f"{name}, against {other.__name__},", difference, 4 * eps**0.5, about)


def _check_loss(step: Step) -> None:
    """Check c = H Jz + g and the products of the 2x2 system, with H by differences of the loss's gradient.

    Where another curvature stands for H, only the products with the gradient are checked.
    """
    x, dtype = step.outputs.double(), step.outputs.dtype
    try:
        g = _gradient(step, x)
    except (RuntimeError, TypeError):  # a loss of one precision only
        x = step.outputs
        g = _gradient(step, x)
    rounding = _gradient(step, step.outputs).double() - g.double()
    tolerance = max(1e-6 if dtype == torch.float64 else 2e-3, 2 * torch.finfo(dtype).eps)
    scale = float(x.square().mean().sqrt()) or 1.0
    curved = []
    for v in (step.jz.to(x.dtype), step.ju.to(x.dtype)):
        length = float(v.square().mean().sqrt())
        unit = v / length if length else v
        along = lambda t, unit=unit: [_gradient(step, x + t * scale * unit)]  # noqa: E731
        ((hv, margin),) = difference_quotients(along, [g], 1.0)
        curved.append((hv.double() * (length / scale), margin.double() * (length / scale)))
    (hz, z_margin), (hu, u_margin) = curved
    g, jz, ju = g.double(), step.jz.double(), step.ju.double()
    error = ((step.c.double() - g - step.theta * hz).abs() - z_margin - 10 * rounding.abs() * (1 + jz.abs())).clamp(
        min=0
    )
    blame = "loss_fn's Hessian product is wrong: please report it"
    if step.is_hessian:
        _judge("c = g + θ H Jz", relative(error, g.abs() + hz.abs()), tolerance, blame)
    names = ("g·Jz", "Jz·HJz", "g·Ju", "Jz·HJu", "Ju·HJu")
    pairs = ((g, jz, rounding), (hz, jz, z_margin), (g, ju, rounding), (hz, ju, z_margin), (hu, ju, u_margin))
    for name, (a, b, margin), found in zip(names, pairs, step.products.tolist(), strict=True):
        if "H" in name and not step.is_hessian:
            continue
        slack = 10 * _norm([margin]) * _norm([b])
        size = _norm([a]) * _norm([b])
        _judge(name, max(abs(found - dot(a, b)) - slack, 0.0) / size if size else abs(found), tolerance, blame)


def _gradient(step: Step, at: Tensor) -> Tensor:
    leaf = at.detach().clone().requires_grad_()

    def loss() -> Tensor:
        evaluate(step.model_fn)  # as the loss may draw random numbers of its own
        with torch.enable_grad():
            return step.sign * checked_loss(step.loss_fn(leaf))

    return torch.autograd.grad(step.replay.again(loss), leaf)[0]


def _at(step: Step, direction: Sequence[Tensor], h: float) -> Tensor:
    """Return the outputs at w + h v, in float64."""
    with _moved(step.params, direction, h):
        return step.replay.again_at_new_weights(partial(evaluate, step.model_fn)).double()


@contextmanager
def _moved(params: Sequence[Tensor], direction: Sequence[Tensor], h: float) -> Iterator[None]:
    """Put the parameters at w + h v; then back, exactly.

    In place, so that views and flattened copies that the model holds move with them.
    """
    before = [p.detach().clone() for p in params]
    try:
        for p, v in zip(params, direction, strict=True):
            p.add_(v.to(p.dtype), alpha=h)
        yield
    finally:
        for p, value in zip(params, before, strict=True):
            p.copy_(value)


def _trimmed(error: Tensor, reference: Tensor, slack: float) -> float:
    """Return |error| / |reference| without the worst tenth of the elements: at kinks, or of another routing."""
    squares = error.flatten().square().nan_to_num(nan=math.inf).sort().values
    kept = float(squares[: len(squares) - len(squares) // 10].sum().sqrt())
    return max(kept - slack, 0.0) / max(float(reference.norm()), 1e-300)


def _judge(what: str, error: float, tolerance: float, about: str) -> None:
    if not error <= tolerance:
        raise RuntimeError(
            f"debug=True: {what} has a relative error of {error:.1e} (tolerance {tolerance:.1e}). Nothing has been "
            f"changed. {about}."
        )


def _about(calls: OpChecks, custom: Sequence[str]) -> str:
    """Return where to search for a wrong product of the whole model, and what to do."""
    other = "forward" if calls.method == "double_backward" else "double_backward"
    advice = f'Construct CurveBall with curvature="{other}", and report it if the model is not to blame'
    return f"{_searched(calls, custom)}. {advice}"


def _searched(calls: OpChecks, custom: Sequence[str]) -> str:
    """Return which calls are right by themselves, and which are to be suspected."""
    text = "Each of these calls is right by itself: " + ", ".join(calls.checked) if calls.checked else ""
    if custom:
        text += f"; suspect first what could not be checked by itself, the autograd functions {', '.join(custom)}"
    if calls.unchecked:
        text += f"; not checked by themselves were {', '.join(calls.unchecked)}"
    return text


def _custom_functions(outputs: Tensor) -> list[str]:
    """Return the names of the torch.autograd.Function classes in the graph; only their authors know the derivative."""
    custom = (node for node in nodes_of(outputs) if isinstance(node, torch.autograd.function.BackwardCFunction))
    return sorted({type(node).__name__.removesuffix("Backward") for node in custom})


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))
