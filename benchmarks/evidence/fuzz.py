"""Call the public functions with random arguments, of which many do not fit; write down what came of them.

python -m benchmarks.evidence.fuzz

A call must either do what the plain torch backend does, within rounding, or raise ValueError, TypeError or RuntimeError
with a message, and have changed none of its arguments. Each block of cases has a process of its own, so that one that
ends or waits forever is seen.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.evidence.records import Record, Records
from curveball_fused import CurveBall, ops
from curveball_fused.backends.dtypes import compute_dtype
from curveball_fused.backends.scalars import SCALARS
from curveball_fused.ops import losses, tangents

CASES = 5000
RECORDS = Records("fuzz", ("kind", "seed"))
LIMIT = 900  # seconds for a block
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 3e-2, torch.float16: 3e-3}
REFUSALS = (ValueError, TypeError, RuntimeError)

Call = tuple[Callable[..., Any], list[Any], dict[str, Any]]


class Draw:
    """Random arguments."""

    def __init__(self, seed: str) -> None:
        self.choose = random.Random(seed)
        self._numbers = torch.Generator().manual_seed(self.choose.getrandbits(40))
        self.dtype = self.one(*DTYPES)

    def one(self, *values: Any) -> Any:
        return self.choose.choice(values)

    def length(self) -> int:
        length: int = self.one(0, 1, 1, 2, 3, 5, 8, 17, 33)
        return length

    def shape(self) -> tuple[int, ...]:
        return tuple(self.length() for _ in range(self.one(0, 1, 1, 2, 2, 3, 4)))

    def tensor(self, *shape: int, dtype: torch.dtype | None = None, contiguous: bool = True) -> Tensor:
        drawn = torch.randn(*shape, 2, generator=self._numbers, dtype=torch.float64).to(dtype or self.dtype)
        if contiguous or self.one(True, False):
            return drawn[..., 0].clone()
        return self.one(drawn[..., 0], drawn[..., 0].mT.contiguous().mT if len(shape) > 1 else drawn[..., 0])

    def number(self) -> Tensor:
        return self.tensor(dtype=torch.float64).abs()

    def maybe(self, value: Any) -> Any:
        return self.one(None, value)

    def spoiled(self, value: Any) -> Any:
        """An argument that is not what it should be."""
        if isinstance(value, Tensor):
            other = self.one(*(dtype for dtype in (*DTYPES, torch.int64, torch.bool) if dtype != value.dtype))
            kinds = [value.to(other), value[None], value.flatten()[1:], value.expand(2, *value.shape)]
            return self.one(*kinds, torch.empty(0, dtype=value.dtype), torch.stack((value, value), -1)[..., 0])
        if isinstance(value, list) and value:
            i = self.choose.randrange(len(value))
            return self.one(value[:i] + value[i + 1 :], [*value[:i], self.spoiled(value[i]), *value[i + 1 :]])
        if isinstance(value, str):
            return "other"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return value
        return self.one(-1, 0, 2, 1000) if isinstance(value, int) else self.one(-1.0, 0.0, torch.nan, torch.inf, 1e300)


def lists(draw: Draw) -> Call:
    state, shapes = compute_dtype(draw.dtype), [draw.shape() for _ in range(draw.one(0, 1, 2, 5))]
    w, r = ([draw.tensor(*shape, contiguous=False) for shape in shapes] for _ in range(2))
    z, v = ([draw.tensor(*shape, dtype=state, contiguous=False) for shape in shapes] for _ in range(2))
    scalars, first = draw.tensor(len(SCALARS), dtype=torch.float64), draw.one(0, len(w))
    if draw.one(True, False, False):
        scalars[draw.one(0, 1)] = torch.nan
    sizes = [first, len(w) - first]
    rates = [draw.one(0.5, 1.0, draw.number()) for _ in sizes]
    metric = dict(decay=draw.one(0.0, 0.9), eps=1e-3, scalars=draw.maybe(scalars))
    one: Call = draw.one(
        (ops.dots, [z, r], {}),
        (ops.update_, [w, z, r, scalars[: draw.one(3, 16)]], dict(lr=rates[0], weight_decay=draw.one(0.0, 0.1))),
        (ops.update_groups_, [w, z, r, scalars], dict(group_sizes=sizes, lr=rates, weight_decay=[0.1, 0.0])),
        (ops.precondition_, [[t.square() for t in v], r, draw.maybe(z), draw.number() + 0.1], metric),
    )
    return one


def numbers(draw: Draw) -> Call:
    scalars, loss = draw.tensor(len(SCALARS), dtype=torch.float64).abs(), draw.tensor(dtype=torch.float64)
    products, (z, u) = draw.tensor(5, dtype=torch.float64), draw.tensor(2, 4, dtype=torch.float64)
    sums = torch.stack((z @ z, z @ u, u @ u))
    products[2] = 10.0  # r·r = g·Ju + θ Jz·HJu cannot be negative
    solve = dict(dots=draw.maybe(sums), beta=draw.maybe(0.3), rho=draw.maybe(0.9), lr=draw.one(0.5, draw.number()))
    solve |= dict(theta=draw.one(0.0, 1.0), average=draw.one(0.0, 0.9), bounded=draw.one(True, False))
    rule = dict(low=0.5, high=1.5, factor=0.9, minimum=1e-6, maximum=1e6)
    one: Call = draw.one(
        (ops.solve, [scalars, loss, products], solve),
        (ops.adapt_damping, [scalars, loss], rule),
        (ops.keep_coefficients, [scalars, loss, sums[2], draw.maybe(draw.number())], dict(sign=draw.one(1.0, -1.0))),
    )
    return one


def bases(draw: Draw) -> Call:
    dtype = compute_dtype(draw.dtype)
    shapes = [draw.one((draw.length(), draw.length()), (draw.length(),)) for _ in range(draw.one(0, 1, 2, 3))]
    v, r, z = ([draw.tensor(*shape, dtype=dtype, contiguous=False) for shape in shapes] for _ in range(3))

    def squares(side: int) -> list[Tensor | None]:
        fits = [shape[side] if len(shape) == 2 and 0 not in shape else 0 for shape in shapes]
        drawn = [draw.tensor(n, n, dtype=dtype) for n in fits]
        return [draw.maybe(t + t.mT) if t.numel() else None for t in drawn]

    scalars, weight = draw.tensor(len(SCALARS), dtype=torch.float64), draw.number() + 0.1
    both = dict(left=squares(0), right=squares(1), decay=draw.one(0.0, 0.9))
    v = [t.square() for t in v]
    one: Call = draw.one(
        (ops.precondition_in_bases, [v, r, draw.maybe(z), weight], both | dict(eps=1e-3)),
        (ops.update_statistics_, [v, z, r, scalars, weight], both | dict(gather=draw.one(True, False))),
    )
    return one


def loss_functions(draw: Draw) -> Call:
    shape = draw.length() + 1, draw.length() + 2  # a mean over no row is 0 / 0
    x, v, u = (draw.tensor(*shape) for _ in range(3))
    classes = torch.randint(shape[1], shape[:1], generator=torch.Generator().manual_seed(draw.choose.getrandbits(40)))
    classes[0] = 1  # which is never ignored
    weights = draw.maybe(draw.tensor(shape[1], dtype=compute_dtype(x.dtype)).abs() + 0.1)
    both = dict(mean=draw.one(True, False), sign=draw.one(1.0, -1.0))
    entropy = both | dict(ignore_index=draw.one(-100, 0), label_smoothing=draw.one(0.0, 0.1))
    target, positive = u.sigmoid(), draw.maybe(weights)
    # What the second call wants back from the first.
    *_, first, stats = losses.cross_entropy_cotangent(x, v, classes, weights, **entropy, backend="cpu")
    second = losses.mse_cotangent(x, v, u, **both, backend="torch")[2]
    third = losses.bce_cotangent(x, v, target, weights, positive, **both, backend="torch")[2]
    one: Call = draw.one(
        (losses.cross_entropy_cotangent, [x, v, classes, weights], entropy),
        (losses.cross_entropy_products, [x, v, u, classes, stats, first, weights], entropy),
        (losses.mse_cotangent, [x, v, u], both),
        (losses.mse_products, [x, v, u, u.clone(), second], both),
        (losses.bce_cotangent, [x, v, target, weights, positive], both),
        (losses.bce_products, [x, v, u, target, third, weights, positive], both),
    )
    return one


def tangent_functions(draw: Draw) -> Call:
    draw.dtype = draw.one(torch.float32, torch.float64)  # those that have kernels
    rows, size = draw.length(), draw.length()
    vectors = [draw.maybe(draw.tensor(size)) for _ in range(3)]
    x, dx = draw.tensor(rows, size), draw.tensor(rows, size)
    statistics = [draw.tensor(rows), draw.tensor(rows)]
    b, h, t, s, d, e = (draw.one(1, 2, 3, 7, 17) for _ in range(6))
    qkv = [draw.tensor(*shape) for shape in [(b, h, t, d), (b, h, s, d), (b, h, s, e)] * 2]
    mask = draw.one(None, draw.tensor(b, h, t, s))
    is_causal = mask is None and draw.one(True, False)
    out = F.scaled_dot_product_attention(*qkv[3:], mask, is_causal=is_causal, scale=0.3)
    one: Call = draw.one(
        (tangents.layer_norm_tangent, [dx, x, draw.maybe(statistics[0]), statistics[1], *vectors], {}),
        (
            tangents.batch_norm_tangent,
            [dx, x, draw.tensor(size), draw.tensor(size), *vectors],
            dict(training=draw.one(True, False)),
        ),
        (
            tangents.attention_tangent,
            [*qkv, out, mask],
            dict(is_causal=is_causal, scale=0.3),
        ),
        (tangents.activation, [draw.tensor(*draw.shape()), draw.one(*tangents.ACTIVATIONS)], {}),
    )
    return one


OPTIONS: dict[str, tuple[Any, ...]] = {
    "lr": (1.0, 0.0, -1.0, torch.nan, torch.tensor(0.5), torch.ones(2), "1"),
    "beta": (None, 0.1, -0.1, torch.inf, True),
    "rho": (None, 0.9, 1.5, torch.nan),
    "preconditioner": (None, None, "kronecker", "diagonal", 3),
    "direction": (None, "residual", "gradient", "up"),
    "lambd": (None, 1.0, 0.0, -1.0, 1e9, "1"),
    "auto_lambda": (True, False, 1),
    "lambda_factor": (None, 0.9, 0.0, 1.1),
    "lambda_interval": (5, 1, 0, 2.5, None),
    "average": (None, 0.0, 0.9, 1.0),
    "solve_interval": (None, 1, 3, 0, "3"),
    "weight_decay": (0.0, 0.1, -0.1, None),
    "maximize": (False, True, 0),
    "curvature": ("auto", "linearize", "linearize_operators", "forward", "double_backward", "backward"),
    "debug": (False, False, True, None),
}


def options(draw: Draw) -> Call:
    chosen = {name: draw.one(values[0], *values) for name, values in OPTIONS.items() if draw.one(*[True, *[False] * 5])}
    w = nn.Parameter(draw.tensor(3))
    strange = [nn.Parameter(torch.ones(2, dtype=torch.complex64)), torch.ones(2, dtype=torch.int64), torch.ones(2), 3]
    groups = [{"params": [w], "lr": draw.one(0.5, -1.0)}, {"params": nn.Parameter(draw.tensor(2))}]
    unusual = [[w, w], [], groups, [w, draw.one(*strange)], None, w, {"params": [w]}]
    given = draw.one([w], [w], draw.one(*unusual))

    def make(backend: str, **chosen: Any) -> list[Any]:
        optimizer = CurveBall(given, backend=backend, **chosen)
        return [optimizer.param_groups[0]["params"], *optimizer.stats().values()]

    return make, [], chosen


def steps(draw: Draw) -> Call:
    draw.dtype = draw.one(torch.float32, torch.float64)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(draw.dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(draw.tensor(*p.shape))
    x, y = draw.tensor(5, 3), draw.tensor(5, 2)

    def of_tensor(loss: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
        def loss_fn(outputs: Any) -> Any:
            if not isinstance(outputs, Tensor):
                raise TypeError("a loss that is given something else")
            return loss(outputs)

        return loss_fn

    squares = of_tensor(lambda out: F.mse_loss(out, y))

    def raises() -> Tensor:
        raise ValueError("a model that fails")

    models: list[Any] = [lambda: model(x), lambda: {"out": model(x)}, raises, lambda: None, lambda: x, lambda: 3.0]
    models += [lambda: (model(x), squares), None, 3, model, lambda: model(x).detach(), lambda: model(x[:0])]
    loss_fns: list[Any] = [
        squares,
        of_tensor(torch.sum),
        lambda out: out,
        lambda out: None,
        lambda out: 1.0,
        None,
        "l",
    ]
    loss_fns += [
        lambda out: squares(out["out"] if isinstance(out, dict) else None),
        of_tensor(lambda out: out.sum() * torch.nan),
    ]

    def argument(fitting: Any, others: list[Any]) -> Any:
        return draw.one(fitting, fitting, draw.one(*others))

    part = argument(models[0], models), argument(squares, loss_fns)
    lists_of_parts: list[Any] = [[part, (models[0], squares)], [], [part], [models[6]], [3], part, iter([part])]
    arguments = draw.one([*part], [*part], [*part], [draw.one(*lists_of_parts)], [])
    others = dict(weights=([1.0, 2.0], [1.0], [-1.0], [0.0], 3), closure=(models[6], models[0], 3))
    others |= dict(curvature_batch=(part, models[6], 3), scaler=(3,))
    given = {name: draw.one(*values) for name, values in others.items() if draw.one(*[True, *[False] * 6])}
    preconditioner, curvature = draw.one(None, "kronecker"), draw.one("auto", *OPTIONS["curvature"][:5])

    def step(backend: str) -> list[Any]:
        before = copy.deepcopy(model.state_dict())
        optimizer = CurveBall(
            model.parameters(), preconditioner=preconditioner, curvature=curvature, backend=backend, lambd=1.0
        )
        try:
            loss, _ = optimizer.step(*arguments, **given)
            weights = [p.detach().clone() for p in model.parameters()]
            assert all(bool(w.isfinite().all()) for w in weights), "weights that are not finite"
            return [loss, *weights]
        except REFUSALS:
            assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()), "changed weights"
            raise
        finally:
            model.load_state_dict(before)

    return step, [], {}


KINDS: dict[str, tuple[Callable[[Draw], Call], int]] = {  # and how many blocks of each
    "lists": (lists, 3),
    "numbers": (numbers, 3),
    "bases": (bases, 3),
    "losses": (loss_functions, 3),
    "tangents": (tangent_functions, 3),
    "options": (options, 3),
    "steps": (steps, 2),
}


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors within lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, (list, tuple)):
        yield from itertools.chain.from_iterable(map(tensors, value))
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def called(call: Call, backend: str) -> tuple[list[Tensor] | None, str]:
    """Return results and arguments after a call, or None if it was refused; and what is wrong with it."""
    function, args, kwargs = call
    args, kwargs = copy.deepcopy((args, kwargs)) if function in PUBLIC else (args, kwargs)
    before = copy.deepcopy(list(tensors([args, kwargs])))
    try:
        result = function(*args, **kwargs, backend=backend)
    except REFUSALS as error:
        same = all(
            torch.equal(a, b) or bool(a.isnan().any()) for a, b in zip(before, tensors([args, kwargs]), strict=True)
        )
        return None, "" if same and str(error) else f"changed its arguments, or said nothing: {error!r}"
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    if function is losses.cross_entropy_cotangent:
        result = result[:3]  # the fourth is each backend's own
    return list(tensors([result, args, kwargs])), ""


PUBLIC = {
    *(getattr(ops, name) for name in ops.__all__ if callable(getattr(ops, name))),
    *(getattr(losses, name) for name in ("cross_entropy_cotangent", "cross_entropy_products", "mse_cotangent")),
    *(getattr(losses, name) for name in ("mse_products", "bce_cotangent", "bce_products")),
    tangents.layer_norm_tangent,
    tangents.batch_norm_tangent,
    tangents.attention_tangent,
    tangents.activation,
}


def differ(ours: list[Tensor], torchs: list[Tensor], tolerance: float) -> str:
    """Return what is not the same within rounding, or an empty string."""
    for i, (a, b) in enumerate(zip(ours, torchs, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {i} is {a.dtype}{list(a.shape)}, plain torch's {b.dtype}{list(b.shape)}"
        wide, other = a.double(), b.double()
        scale = other[other.isfinite()].abs().amax().clamp(min=1.0).item() if other.isfinite().any() else 1.0
        if not torch.allclose(wide, other, rtol=tolerance, atol=tolerance * scale, equal_nan=True):
            return f"result {i} is off by {(wide - other).abs().max().item():.1e} of {scale:.1e}"
    return ""


def outcome(kind: str, seed: int, index: int) -> tuple[str, str]:
    """Return what came of one case: "worked", "refused", "refused by one backend" or "fault"; and which fault."""
    draw = Draw(f"{kind} {seed} {index}")
    function, args, kwargs = KINDS[kind][0](draw)
    spoiled = function in PUBLIC and draw.one(True, False)
    if spoiled:
        names = [*range(len(args)), *kwargs]
        name = draw.one(*names)
        if isinstance(name, int):
            args = [*args[:name], draw.spoiled(args[name]), *args[name + 1 :]]
        else:
            kwargs = kwargs | {name: draw.spoiled(kwargs[name])}
    tolerance = max(TOLERANCES[draw.dtype], TOLERANCES[torch.float32] if kind == "steps" else 0.0)
    (ours, fault), (torchs, other_fault) = (called((function, args, kwargs), name) for name in ("cpu", "torch"))
    if not fault and other_fault:
        fault = f"plain torch: {other_fault}"
    if not fault and not spoiled and ours is not None and torchs is not None:
        fault = differ(ours, torchs, tolerance)
    if fault:
        return "fault", f"{kind} {seed} {index}, {function.__name__}: {fault}"
    if (ours is None) != (torchs is None):
        return "refused by one backend", ""
    return ("refused" if ours is None else "worked"), ""


def block(kind: str, seed: int, cases: int) -> Record:
    """Return how many cases had which outcome, and the first faults."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = [outcome(kind, seed, index) for index in range(cases)]
    counts = Counter(name for name, _ in found)
    return {
        **{name: counts[name] for name in ("worked", "refused", "refused by one backend", "fault")},
        "faults": [text for _, text in found if text][:20],
    }


def main() -> None:
    if len(sys.argv) > 1:  # the process of one block
        print(json.dumps(block(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
        return
    for run in RECORDS.missing({"kind": kind, "seed": s} for kind, (_, seeds) in KINDS.items() for s in range(seeds)):
        command = [sys.executable, "-m", "benchmarks.evidence.fuzz", run["kind"], str(run["seed"]), str(CASES)]
        start = time.monotonic()
        # A block that ends otherwise, or waits, is an error here, and not written down.
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=LIMIT, check=True)
        made = json.loads(done.stdout.splitlines()[-1])
        RECORDS.add({**run, "cases": CASES, **made, "seconds": round(time.monotonic() - start, 1)})


if __name__ == "__main__":
    main()
