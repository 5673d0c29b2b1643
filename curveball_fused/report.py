"""An explanation as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from .backends import ADVICE
from .survey import COMPOSITE, DUAL, IN_PLACE_RULE, OWN, REFUSED, Function

if TYPE_CHECKING:
    from .cost import Cost
    from .explanation import Explanation

_FOLLOWED = {
    OWN: "own rule",
    IN_PLACE_RULE: "own rule, in place",
    COMPOSITE: "the functions it is composed of",
    DUAL: "torch's dual numbers",
}
_WAYS = {
    "linearize": "one run of the model, which leaves a tape of tangent maps",
    "forward": "dual numbers",
    "double_backward": "autograd, differentiated once more",
}
_WIDTHS = (13, 9, 9, 9, 6, 11)
_SEEN_BY = {
    "cpu": "Peak memory: of the tensors that operators returned; what one allocates inside itself is not seen.",
    "cuda": "Peak memory: what torch's allocator gave out.",
}


def report(explanation: Explanation) -> str:
    """Readable text, for a terminal of 100 columns."""
    parts = (_summary, _functions, _costs)
    return "\n\n".join("\n".join(part(explanation)) for part in parts)


def _summary(e: Explanation) -> Iterator[str]:
    usable = [way.name for way in e.ways if way.cost]
    if e.way is not None:
        yield f'curvature="auto" takes "{e.way}": {_WAYS[e.way]}.'
    elif usable:
        yield f'curvature="auto" ends with an error. Construct CurveBall with curvature="{usable[0]}", which works.'
    else:
        yield "CurveBall cannot train this model: no way of differentiating it works. Replace what the reasons name."
    for way in e.ways:
        if way.refusal:
            yield f'  "{way.name}" cannot be had: {way.refusal.rstrip(".")}.'
    yield f'{e.parameters:,} parameters on {e.device}; backend "{e.backend}" does their arithmetic.'
    for name, reason in e.why_not.items():
        yield f'  Why not "{name}": {reason}. To get it, {ADVICE[name]}.'
    by = {"autograd": "autograd, twice", "closed form": "a closed form"}.get(e.loss_products, e.loss_products)
    variant = ", in a variant that has no closed form" if e.loss and e.loss_products == "autograd" else ""
    yield f"Loss: {e.loss or 'none of those that are recognised'}{variant}; its curvature by {by}."


def _functions(e: Explanation) -> Iterator[str]:
    width = max([len(_short(f.name)) for f in e.functions], default=0)
    width = max(width, len("function"))
    yield "On the way from the parameters to the outputs, with a linearised run"
    yield f"  calls  {'function':{width}}  followed by"
    for f in e.functions:
        followed = f"refused: {f.reason}" if f.followed == REFUSED else _FOLLOWED[f.followed]
        yield f"  {f.calls:5}  {_short(f.name):{width}}  {followed}"
    lacking: dict[str, Function] = {f.name: f for f in e.functions if f.lacks}
    if not lacking:
        yield "None of these torch functions lacks a forward mode."
    for name, f in lacking.items():
        yield f"No forward mode for {_short(name)}: {f.lacks}"


def _costs(e: Explanation) -> Iterator[str]:
    heads = ("", "multiply-adds", "x forward", "time", "x forward", "x SGD", "peak memory")
    yield _line(heads)
    rows = {"forward": e.forward, "forward + backward (SGD)": e.backward}
    rows |= {f"step, {way.name}": way.cost for way in e.ways}
    for name, cost in rows.items():
        if cost is not None:
            yield _row(name, cost, e)
    each = e.lambda_interval
    yield f"One of {each} steps looks at λ: a forward pass more, which is not in these figures, nor is SGD's update."
    beside = f"the parameters ({_bytes(e.parameter_bytes)}), CurveBall's state ({_bytes(e.state_bytes)}) and the data"
    yield f"{_SEEN_BY.get(e.device.type, _SEEN_BY['cpu'])} Beside it:"
    yield f"{beside}."


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
    """Torch functions as one writes them."""
    return name.replace("torch.nn.functional.", "F.").replace("torch.Tensor.", "Tensor.").removesuffix(".__get__")
