"""Debug mode, call by call: the derivatives of each torch call of a model, against finite differences of that call.

A Jacobian-vector product is right where it lies between the two one-sided difference quotients, which a kink such as
relu's at zero takes apart and a smooth function does not. The backward pass is right where <u, Jv> = <Jᵀu, v>.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from . import dual_rules, rules
from .modes import Decompose
from .rules import Call, tensors

# A result of these is not meant to have the derivative of what they compute.
_BY_DEFINITION = ("fake_quant", "moving_avg_obs")
# Failures to compute a call once more on copies of its arguments, or to differentiate it; the call goes unchecked.
_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)


class CallChecks(Decompose):
    """Checks each call on the way from the parameters to the outputs, while the model runs with gradients enabled.

    Args:
        way: whose Jacobian-vector products are checked: those of our rules, torch's dual numbers or double backward.

    Attributes:
        checked, unchecked: how often each function was checked, and how often it could not be.
        stops: where the model leaves the derivative on purpose, such as `detach`.
        eps: machine epsilon of the lowest precision among the results.
    """

    def __init__(self, way: str) -> None:
        super().__init__(every_call=way == "double_backward")
        self.way = way
        self._modules: list[nn.Module] = []
        self.checked: Counter[str] = Counter()
        self.unchecked: Counter[str] = Counter()
        self.stops: Counter[str] = Counter()
        self.eps = 0.0

    def run(self, model_fn: Callable[[], Tensor]) -> Tensor:
        """The outputs, with autograd's graph.

        Raises:
            RuntimeError: the derivative of a call is wrong; the message names the function.
        """
        with torch.enable_grad(), self._located(), self:
            return model_fn()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = list(tensors((args, list(kwargs.values()))))
        if not any(t.requires_grad for t in inputs) or torch._C._are_functorch_transforms_active():
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            result = func(*args, **kwargs)
            self._note_stop(func, result)
            return result
        call = FrozenCall(func, args, kwargs)
        inside = None if self._has_rule(call) else rules.COMPOSITES.get(func) or rules.without_override(func)
        if inside is not None:
            with self:
                return inside(*args, **kwargs)
        with self._kernels(func, args, kwargs):
            result = func(*args, **kwargs)
        results = [t for t in results_of(result, args) if t.requires_grad]
        if not results:
            self._note_stop(func, result)
        elif not all(any(t is known and t.is_leaf for known in inputs) for t in results):
            self.eps = max([self.eps, *(torch.finfo(t.dtype).eps for t in results)])
            with _generators_kept(call.device), torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
                self._check(call)
        return result

    def _check(self, call: FrozenCall) -> None:
        if any(word in call.name for word in _BY_DEFINITION):
            self.stops[call.name] += 1
            return
        try:
            error, tolerance, complaint = self._compare(call)
        except _FAILURES:
            self.unchecked[call.name] += 1
            return
        self.checked[call.name] += 1
        if not error <= tolerance:
            self._raise(call, error, tolerance, complaint)

    def _compare(self, call: FrozenCall) -> tuple[float, float, str]:
        """The first relative error that is too large, or the last; its tolerance; what it says."""
        v = call.directions()
        own = [t.detach() for t in results_of(*call(call.func))]
        results, jvs, leaves = self._products(call, v)
        which = [i for i, t in enumerate(results) if t.requires_grad]
        dtype, moved = (None, v) if call.is_random else (torch.float64, call.without_padding(v))
        if moved is not v:
            self.stops[call.name] += 1

        def along(step: float) -> list[Tensor]:
            found = results_of(*call.moved(moved, step, dtype))
            return [_real(found[i]) for i in which]

        middle = along(0.0)
        # What rounding does to the function itself, as it is when it is badly conditioned, it may do to its derivative.
        exact = own[which[0]].dtype in (torch.float64, torch.complex128)
        rounding = max(relative(_real(own[i]) - m, m) for i, m in zip(which, middle, strict=True))
        tolerance = (1e-6 if exact else 1e-3) + 10 * rounding
        changed = max(relative(_real(results[i]) - _real(own[i]), _real(own[i])) for i in which)
        if not changed <= tolerance:
            return changed, tolerance, "its rule returns another value than the function does"
        smallest = 1e-6 * max((float(t.double().square().mean().sqrt()) for t in map(_real, v) if t.numel()), default=0)
        error = differences([_real(jvs[i]) for i in which], along, middle, smallest)
        if not error <= tolerance:
            return error, tolerance, "its Jacobian-vector product disagrees with a finite difference"
        error = _adjoint_error([results[i] for i in which], [jvs[i] for i in which], leaves, v)
        return error, tolerance, "its backward pass is not the transpose of its Jacobian-vector product"

    def _has_rule(self, call: FrozenCall) -> bool:
        if self.way == "forward":
            return call.func in dual_rules.RULES
        if self.way == "double_backward" or (call.func not in rules.RULES and call.func not in rules.IN_PLACE):
            return False
        with _generators_kept(call.device), torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
            return call.by_rule() is not None

    def _products(self, call: FrozenCall, v: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Results with their graph, Jv of each, and the leaves of the graph."""
        recorded = call.by_rule() if self.way == "linearize" else None
        if recorded is not None:
            results, maps, leaves = recorded
            with torch.no_grad():
                tangents = [t.clone() for t in v]
                return results, [tangent_map([*tangents]) for tangent_map in maps], leaves
        leaves, replace = call.leaves()
        with self._kernels(call.func, call.args, call.kwargs):
            results = results_of(*call(call.func, replace))
        if self.way == "double_backward":
            return results, _by_double_backward(results, leaves, v), leaves
        with fwAD.dual_level(), Decompose(every_call=True):
            duals = results_of(*call(_dual_function(call.func), call.dual(v)))
            pairs = [fwAD.unpack_dual(t) for t in duals]
            return results, [torch.zeros_like(p) if t is None else t.clone() for p, t in pairs], leaves

    def _note_stop(self, func: Any, result: Any) -> None:
        """Notes what takes a value, but not its derivative, from what depends on the parameters."""
        name = name_of(func)
        if name.startswith("new_") or name.endswith("_like") or name == "grad":
            return
        values = [t for t in tensors((result,)) if t.is_floating_point() or t.is_complex()]
        if values or isinstance(result, float) or name in ("tolist", "numpy", "__setitem__"):
            self.stops[name] += 1

    def _raise(self, call: FrozenCall, error: float, tolerance: float, complaint: str) -> NoReturn:
        shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in call.active)
        ours = self.way != "double_backward" and self._has_rule(call)
        author = "curveball_fused, whose rule it is" if ours else "PyTorch, whose formula it is"
        other = "forward" if self.way == "double_backward" else "double_backward"
        raise RuntimeError(
            f"wrong derivative of {call.name}{self._place()}, of arguments {shapes}: {complaint} (relative error "
            f"{error:.1e}, tolerance {tolerance:.1e}). Nothing has been changed. Replace the function, or construct "
            f'CurveBall with curvature="{other}"; and please report it to {author}.'
        )

    def _place(self) -> str:
        if not self._modules:
            return ""
        names = [name for name, module in self._modules[0].named_modules() if module is self._modules[-1] and name]
        return f" in {' '.join([type(self._modules[-1]).__name__, *names[:1]])}"

    @contextmanager
    def _located(self) -> Iterator[None]:
        hooks = (
            register_module_forward_pre_hook(lambda module, _: self._modules.append(module)),
            register_module_forward_hook(lambda *_: self._modules.pop() and None, always_call=True),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class FrozenCall:
    """A call that can be made again and again, as the same function, without touching anything of the model.

    Attributes:
        active: copies of the arguments that require gradients.
    """

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.name = func, name_of(func)
        self.device = next(tensors((args, list(kwargs.values())))).device
        self.active: list[Tensor] = []
        self._generators = generator_states(self.device)
        self.args, self.kwargs = _mapped((args, kwargs), self._frozen)
        self._places = {id(t): place for place, t in enumerate(self.active)}
        self._random: bool | None = None

    def _frozen(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        copy = value.detach().clone()
        if value.requires_grad:
            self.active.append(copy)
        return copy

    def __call__(self, function: Any, replace: Callable[[Any], Any] | None = None) -> tuple[Any, tuple[Any, ...]]:
        """What `function` returns, and the arguments it got: copies of those of the call, changed by `replace`."""
        args, kwargs = _mapped((self.args, self.kwargs), replace or _copied)
        set_generators(self._generators, self.device)
        return function(*args, **kwargs), args

    @property
    def is_random(self) -> bool:
        """Whether the call draws random numbers, which would be others in another precision."""
        if self._random is None:
            with torch.no_grad():
                self(self.func)
            now = generator_states(self.device)
            self._random = not all(map(torch.equal, now, self._generators))
        return self._random

    def directions(self) -> list[Tensor]:
        """Random tangents of the arguments' own size; the same for the same call."""
        generator = torch.Generator(self.device).manual_seed(0)
        found = []
        for t in self.active:
            sizes = t[t.isfinite() & (t != 0)].abs().double()
            # A low quantile, as a mask may have put huge numbers among the elements.
            scale = float(sizes.kthvalue(1 + sizes.numel() // 4).values) if sizes.numel() else 1.0
            v = torch.randn(t.shape, generator=generator, dtype=t.dtype, device=t.device)
            found.append(v * min(scale, 1e6))
        return found

    def without_padding(self, v: list[Tensor]) -> list[Tensor]:
        """An embedding's row of padding is a constant, although the function reads it."""
        if self.name != "embedding" or len(v) != 1:
            return v
        padding = self.kwargs.get("padding_idx", self.args[2] if len(self.args) > 2 else None)
        if padding is None or (self.func is torch.embedding and padding < 0):
            return v
        (rows,) = v
        return [rows.index_fill(0, torch.tensor([padding % len(rows)], device=rows.device), 0)]

    def moved(self, v: list[Tensor], step: float, dtype: torch.dtype | None) -> tuple[Any, tuple[Any, ...]]:
        """The call at x + step · v, in float64 if `dtype` says so."""

        def replace(value: Any) -> Any:
            place = self._places.get(id(value))
            wide = _widened(value) if dtype is torch.float64 else _copied(value)
            return wide if place is None else wide.add_(v[place].to(wide.dtype), alpha=step)

        with torch.no_grad():
            return self(self.func, replace)

    def leaves(self) -> tuple[list[Tensor], Callable[[Any], Any]]:
        """Leaves of a graph for the active arguments, and what puts copies of them in place, which may be written to."""
        leaves = [t.clone().requires_grad_() for t in self.active]

        def replace(value: Any) -> Any:
            place = self._places.get(id(value))
            return _copied(value) if place is None else leaves[place].clone()

        return leaves, replace

    def dual(self, v: list[Tensor]) -> Callable[[Any], Any]:
        """What puts dual numbers of tangent `v` in place."""

        def replace(value: Any) -> Any:
            place = self._places.get(id(value))
            return _copied(value) if place is None else fwAD.make_dual(value.clone(), v[place].clone())

        return replace

    def by_rule(self) -> tuple[list[Tensor], list[Any], list[Tensor]] | None:
        """Results, the map of each and the leaves; None where the tape has no rule that takes the call."""
        rule = rules.RULES.get(self.func) or rules.IN_PLACE.get(self.func)
        if rule is None:
            return None
        places: dict[int, int | None] = {}
        leaves, put = self.leaves()

        def replace(value: Any) -> Any:
            copy = put(value)
            if isinstance(copy, Tensor):
                places[id(copy)] = self._places.get(id(value))
            return copy

        try:
            recorded, _ = self(lambda *args, **kwargs: rule(Call(places), *args, **kwargs), replace)
        except TypeError:
            return None
        if recorded is NotImplemented:
            return None
        result, maps = recorded
        return ([result], [maps], leaves) if isinstance(result, Tensor) else (list(result), list(maps), leaves)


def differences(
    jvs: Sequence[Tensor], along: Callable[[float], Sequence[Tensor]], middle: Sequence[Tensor], smallest: float = 0.0
) -> float:
    """The largest relative distance of the tangents `jvs` from what lies between the difference quotients.

    Args:
        along: the results at a distance on the way.
        middle: those at distance 0.
        smallest: a root mean square below which a result counts as constant.
    """
    coarse, fine = (difference_quotients(along, middle, factor) for factor in (1.0, 0.125))
    worst = 0.0
    for jv, (first, wide), (second, narrow) in zip(jvs, coarse, fine, strict=True):
        error = min(_excess(jv, first, wide, smallest), _excess(jv, second, narrow, smallest))
        # Difference quotients that disagree among themselves, as at a jump, tell nothing.
        if relative(first - second, second) < 0.5 * min(1.0, error):
            worst = max(worst, error)
    return worst


def _excess(jv: Tensor, derivative: Tensor, margin: Tensor, smallest: float) -> float:
    judged = derivative.isfinite() & margin.isfinite()
    excess = ((jv.to(derivative.dtype) - derivative).abs() - margin).nan_to_num(nan=math.inf).clamp(min=0)
    return relative(excess[judged], derivative[judged], smallest * math.sqrt(int(judged.sum())))


def difference_quotients(
    along: Callable[[float], Sequence[Tensor]], middle: Sequence[Tensor], factor: float
) -> list[tuple[Tensor, Tensor]]:
    """For each result the central difference quotient, and half the distance of the one-sided ones, with rounding."""
    eps = max(torch.finfo(m.dtype).eps for m in middle)
    step = factor * eps ** (1 / 3)
    found = []
    for before, here, after in zip(along(-step), middle, along(step), strict=True):
        kink = (after - 2 * here + before).abs() / (2 * step)
        found.append(((after - before) / (2 * step), kink + 8 * eps * here.abs() / step))
    return found


def relative(error: Tensor, reference: Tensor, floor: float = 0.0) -> float:
    """|error| / |reference|, of the elements that are finite in the reference; 0 where both are 0."""
    judged = reference.isfinite() & (error.isfinite() | error.isinf())
    size, scale = (float(t[judged].double().norm()) for t in (error, reference))
    scale = max(scale, floor)
    return size / scale if scale > 0 else (math.inf if size > 0 else 0.0)


def results_of(result: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors among the results; the first argument, for a call that writes to it and returns nothing."""
    found = [t for t in tensors((result,)) if t.is_floating_point() or t.is_complex()]
    return [args[0]] if result is None and args and isinstance(args[0], Tensor) else found


def name_of(func: Any) -> str:
    name = str(getattr(func, "__name__", func))
    return str(func.__self__.__name__) if name == "__get__" else name


def generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_generators(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    states = generator_states(device)
    try:
        yield
    finally:
        set_generators(states, device)


def _adjoint_error(results: list[Tensor], jvs: list[Tensor], leaves: list[Tensor], v: list[Tensor]) -> float:
    """|<u, Jv> - <Jᵀu, v>| / |u| |Jv|, for a u that lies along Jv in part, so that the products are not small."""
    us = []
    for jv in jvs:
        generator = torch.Generator(jv.device).manual_seed(1)
        u = torch.randn(jv.shape, generator=generator, dtype=jv.dtype, device=jv.device)
        us.append(u + jv * (math.sqrt(max(jv.numel(), 1)) / max(float(jv.norm()), 1e-30)))
    gradients = torch.autograd.grad(results, leaves, us, allow_unused=True)
    left = sum(_dot(u, jv) for u, jv in zip(us, jvs, strict=True))
    right = sum(_dot(g, t) for g, t in zip(gradients, v, strict=True) if g is not None)
    scale = sum(math.sqrt(_dot(u, u) * _dot(jv, jv)) for u, jv in zip(us, jvs, strict=True))
    if not math.isfinite(left) or not math.isfinite(right):
        return 0.0  # at a pole
    return abs(left - right) / scale if scale else 0.0


def _by_double_backward(results: list[Tensor], leaves: list[Tensor], v: list[Tensor]) -> list[Tensor]:
    """Jv as the derivative of <Jᵀu, v> with respect to u."""
    us = [torch.zeros_like(t, requires_grad=True) for t in results]
    used = [i for i, t in enumerate(results) if t.requires_grad]
    outputs, cotangents = [results[i] for i in used], [us[i] for i in used]
    gradients = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True, allow_unused=True)
    pairs = [(g, t) for g, t in zip(gradients, v, strict=True) if g is not None and g.requires_grad]
    if not pairs:
        return [torch.zeros_like(t) for t in results]
    found = torch.autograd.grad(
        [g for g, _ in pairs], cotangents, [t for _, t in pairs], retain_graph=True, materialize_grads=True
    )
    by_place = dict(zip(used, found, strict=True))
    return [by_place.get(i, torch.zeros_like(t)) for i, t in enumerate(results)]


def _dual_function(func: Any) -> Callable[..., Any]:
    """Our rule for dual numbers, where there is one and it takes the arguments; else torch's function."""
    rule = dual_rules.RULES.get(func)

    def function(*args: Any, **kwargs: Any) -> Any:
        result = NotImplemented if rule is None else rule(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result

    return function


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Nested tuples, lists and dictionaries with each leaf changed; a tensor that occurs twice is changed once."""
    made: dict[int, tuple[Any, Any]] = {}

    def walk(value: Any) -> Any:
        if type(value) is dict:
            return {key: walk(v) for key, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)([walk(v) for v in value])
        if id(value) not in made:
            made[id(value)] = (value, change(value))
        return made[id(value)][1]

    return walk(value)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _widened(value: Any) -> Any:
    """Tensors and names of dtypes in double precision."""
    dtype = value if isinstance(value, torch.dtype) else getattr(value, "dtype", None)
    if not isinstance(dtype, torch.dtype) or not (dtype.is_floating_point or dtype.is_complex):
        return _copied(value)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return wide if isinstance(value, torch.dtype) else value.to(wide, copy=True)


def _real(t: Tensor) -> Tensor:
    t = t.detach()
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _dot(a: Tensor, b: Tensor) -> float:
    return float((_real(a).double() * _real(b).double()).sum())


def _itself(t: Tensor) -> Tensor:
    return t
