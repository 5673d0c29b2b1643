"""An explanation: its fields, and its text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from curveball_fused.backends import ADVICE
from curveball_fused.curvature import METHODS
from curveball_fused.curvature.call_maps import DOUBLE_BACKWARD, DUAL_NUMBERS
from curveball_fused.curvature.tape import COMPOSITE, IN_PLACE_RULE, OWN_RULE

from .cost import Cost
from .trace_report import REFUSED, Function

_HANDLED_BY = {
    OWN_RULE: "own rule",
    IN_PLACE_RULE: "own rule, in place",
    COMPOSITE: "the functions it is composed of",
    DUAL_NUMBERS: "torch's dual numbers",
    DOUBLE_BACKWARD: "its backward pass, differentiated",
}
_WIDTHS = (13, 9, 9, 9, 6, 11)
_SEEN_BY = {
    "cpu": "Peak memory: of the tensors that operators returned; what one allocates inside itself is not seen.",
    "cuda": "Peak memory: what torch's allocator gave out.",
}


@dataclass(frozen=True)
class MethodReport:
    """One of CurveBall's methods to differentiate a model.

    Attributes:
        name: as in `curvature=`.
        refusal: why it cannot follow the model; empty where it can.
        adjoint_error: by how much its two Jacobian products missed being each other's transpose, relative; None, or
            NaN, where that could not be told.
        cost: of a step of CurveBall that does not adapt λ; None where it cannot follow the model.
    """

    name: str
    refusal: str
    adjoint_error: float | None
    cost: Cost | None


@dataclass(frozen=True)
class Explanation:
    """What `explain` has found; `str()` of it is a report.

    Attributes:
        functions: those that the model calls on the way from the parameters to the outputs.
        loss: torch's name of the loss that was recognized, or "" for any other.
        loss_products: how its gradient and curvature are computed: "fused kernels", "closed form" or "autograd".
        methods: all, in the order in which "auto" tries them.
        forward: cost of model and loss alone.
        backward: cost of model, loss and backward pass, as for SGD; None where torch has no backward pass.
        backend: whose kernels do the arithmetic on the parameters.
        why_not: for each better backend, why it does not run here.
        device: where the parameters are.
        parameters: number of their elements.
        parameter_bytes, state_bytes: of the parameters that are trained, and of CurveBall's state for them.
        lambda_interval: one of so many steps adapts λ, which costs a forward pass more.
        metric_multiply_adds: of u = P⁻¹r, in each step with `preconditioner="kronecker"`.
        metric_bytes: of P in the optimizer's state, likewise.

    Example::

        found = explain(lambda: model(x), lambda out: F.cross_entropy(out, y), model.parameters())
        assert found.method == "linearize", [f for f in found.functions if f.handled_by == "refused"]
    """

    functions: tuple[Function, ...]
    loss: str
    loss_products: str
    methods: tuple[MethodReport, ...]
    forward: Cost
    backward: Cost | None
    backend: str
    why_not: dict[str, str]
    device: torch.device
    parameters: int
    parameter_bytes: int
    state_bytes: int
    lambda_interval: int
    metric_multiply_adds: int
    metric_bytes: int

    @property
    def method(self) -> str | None:
        """The method that `curvature="auto"` chooses; None where it raises."""
        return next((method.name for method in self.methods if method.cost is not None), None)

    def forward_equivalents(self, cost: Cost) -> float | None:
        """Return multiply-adds over those of a forward pass; None where that has none that torch counts."""
        return cost.multiply_adds / self.forward.multiply_adds if self.forward.multiply_adds else None

    def __str__(self) -> str:
        """Return the explanation as text for a terminal."""
        return report(self)


def report(explanation: Explanation) -> str:
    """Return the explanation as text for a terminal of 100 columns."""
    parts = (_summary, _functions, _costs)
    return "\n\n".join("\n".join(part(explanation)) for part in parts)


def _summary(e: Explanation) -> Iterator[str]:
    if e.method is not None:
        yield f'curvature="auto" takes "{e.method}": {METHODS[e.method].description}.'
        yield _checked(next(method for method in e.methods if method.name == e.method))
    else:
        yield "CurveBall cannot train this model: no method of differentiating it works. Replace what the reasons name."
    for method in e.methods:
        if method.refusal:
            yield f'  "{method.name}" cannot be had: {method.refusal.rstrip(".")}.'
    yield f'{e.parameters:,} parameters on {e.device}; backend "{e.backend}" does their arithmetic.'
    for name, reason in e.why_not.items():
        yield f'  Why not "{name}": {reason}. To get it, {ADVICE[name]}.'
    by = {"autograd": "autograd, twice", "closed form": "a closed form"}.get(e.loss_products, e.loss_products)
    variant = ", in a variant that has no closed form" if e.loss and e.loss_products == "autograd" else ""
    yield f"Loss: {e.loss or 'none of those that are recognized'}{variant}; its curvature by {by}."


def _checked(method: MethodReport) -> str:
    error = method.adjoint_error
    if error is None or math.isnan(error):
        return "Not checked: a product of the first step was not finite."
    return f"Checked in a step: J and its transpose belong to one linear map, to a relative {error:.0e}."


def _functions(e: Explanation) -> Iterator[str]:
    width = max([len(_short(f.name)) for f in e.functions], default=0)
    width = max(width, len("function"))
    yield "On the way from the parameters to the outputs, with a linearized run"
    yield f"  calls  {'function':{width}}  followed by"
    for f in e.functions:
        handled_by = f"refused: {f.reason}" if f.handled_by == REFUSED else _HANDLED_BY[f.handled_by]
        yield f"  {f.calls:5}  {_short(f.name):{width}}  {handled_by}"
    lacking: dict[str, Function] = {f.name: f for f in e.functions if f.lacks}
    if not lacking:
        yield "None of these torch functions lacks a forward mode."
    for name, f in lacking.items():
        yield f"No forward mode for {_short(name)}: {f.lacks}"


def _costs(e: Explanation) -> Iterator[str]:
    heads = ("", "multiply-adds", "x forward", "time", "x forward", "x SGD", "peak memory")
    yield _line(heads)
    rows = {"forward": e.forward, "forward + backward (SGD)": e.backward}
    rows |= {f"step, {method.name}": method.cost for method in e.methods}
    for name, cost in rows.items():
        if cost is not None:
            yield _row(name, cost, e)
    each = e.lambda_interval
    yield f"One of {each} steps adapts λ: a forward pass more, which is not in these figures, nor is SGD's update."
    beside = f"the parameters ({_bytes(e.parameter_bytes)}), CurveBall's state ({_bytes(e.state_bytes)}) and the data"
    yield f"{_SEEN_BY.get(e.device.type, _SEEN_BY['cpu'])} Beside it:"
    yield f"{beside}."
    over = e.backward.multiply_adds if e.backward is not None else 0
    ratio = f" ({e.metric_multiply_adds / over:.2f} of forward + backward)" if over else ""
    yield 'With preconditioner="kronecker" most steps are a forward and a backward pass, and for the metric'
    yield f"{_si(e.metric_multiply_adds).strip()} multiply-adds{ratio} and {_bytes(e.metric_bytes)} of state."


def _row(name: str, cost: Cost, e: Explanation) -> str:
    counted = e.forward_equivalents(cost)
    times = [cost.seconds / over.seconds if over else None for over in (e.forward, e.backward)]
    ratios = [_ratio(counted), *map(_ratio, times)]
    return _line(
        (name, _si(cost.multiply_adds), ratios[0], f"{_si(cost.seconds)}s", *ratios[1:], _bytes(cost.peak_bytes))
    )


def _line(cells: Iterable[str]) -> str:
    first, *others = cells
    return "  ".join([f"{first:26}", *(f"{cell:>{width}}" for cell, width in zip(others, _WIDTHS, strict=True))])


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _si(value: float) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    if value == 0 or value >= 1:
        return f"{value:.3g} "
    return f"{value * 1e3:.3g} m" if value >= 1e-3 else f"{value * 1e6:.3g} µ"


def _bytes(value: int) -> str:
    return f"{value / 2**20:.1f} MiB"


def _short(name: str) -> str:
    """Return a torch function's name as one writes it."""
    return name.replace("torch.nn.functional.", "F.").replace("torch.Tensor.", "Tensor.").removesuffix(".__get__")
