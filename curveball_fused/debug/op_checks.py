"""Debug mode, call by call: the derivatives of each torch call of a model, against finite differences of that call.

A Jacobian-vector product is right where it lies between the two one-sided difference quotients, which a kink such as
relu's at zero takes apart and a smooth function does not. The backward pass is right where <u, Jv> = <Jᵀu, v>.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from curveball_fused._torch_private import dual_level, in_functorch_transform
from curveball_fused.curvature import dual_rules, rules
from curveball_fused.curvature.rules import tensors
from curveball_fused.curvature.torch_modes import Decompose

from .finite_differences import differences, dot, real, relative, size
from .recorded_call import RecordedCall, generators_kept, name_of, results_of

# Words in the names of functions that don't have the derivative of what they compute: it passes straight through what
# rounds, supposes that a matrix of which one triangle is read stays symmetric or triangular, fixes the phase of
# eigenvectors, or is zero where numbers are drawn.
_BY_DEFINITION = frozenset(("fake", "cholesky", "eig", "eigh", "eigvalsh", "triangular_solve", "ldl", "normal"))
# Failures to compute a call once more on copies of its arguments, or to differentiate it; the call goes unchecked.
_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)


class OpChecks(Decompose):
    """Check each call on the way from the parameters to the outputs, while the model runs with gradients enabled.

    Args:
        method: whose Jacobian-vector products are checked: those of our rules, torch's dual numbers or double backward.

    Attributes:
        method: as above.
        checked, unchecked: how often each function was checked, and how often it could not be.
        stops: where the model leaves the derivative on purpose, such as `detach`.
        eps: machine epsilon of the lowest precision among the results.
    """

    def __init__(self, method: str) -> None:
        super().__init__(every_call=method == "double_backward")
        self.method = method
        self._modules: list[nn.Module] = []
        self.checked: Counter[str] = Counter()
        self.unchecked: Counter[str] = Counter()
        self.stops: Counter[str] = Counter()
        self.eps = 0.0

    def run(self, model_fn: Callable[[], Tensor]) -> Tensor:
        """Run the model and check its calls.

        `RuntimeError` is raised where the derivative of one is wrong; the message names the function.

        Args:
            model_fn: called without arguments, returns the predictions.

        Returns:
            The outputs, with autograd's graph.
        """
        with torch.enable_grad(), self._located(), self:
            return model_fn()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = list(tensors((args, list(kwargs.values()))))
        if not any(t.requires_grad for t in inputs) or in_functorch_transform():
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            result = func(*args, **kwargs)
            self._note_stop(func, result)
            return result
        call = RecordedCall(func, args, kwargs)
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
            with generators_kept(call.device), torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
                self._check(call)
        return result

    def _check(self, call: RecordedCall) -> None:
        if not _BY_DEFINITION.isdisjoint((call.name, *call.name.split("_"))) or call.kwargs.get("hermitian"):
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

    def _compare(self, call: RecordedCall) -> tuple[float, float, str]:
        """Return the first relative error that is too large, or the last; its tolerance; what it means."""
        v = call.directions()
        own = [t.detach() for t in results_of(*call(call.func))]
        results, jvs, leaves = self._products(call, v)
        which = [i for i, t in enumerate(results) if t.requires_grad]
        dtype, moved = (None, v) if call.is_random else (torch.float64, call.without_padding(v))
        if moved is not v:
            self.stops[call.name] += 1

        def along(step: float) -> list[Tensor]:
            found = results_of(*call.moved(moved, step, dtype))
            return [real(found[i]) for i in which]

        middle = along(0.0)
        # What rounding does to the function itself, as it is when it is badly conditioned, it may do to its derivative.
        exact = own[which[0]].dtype in (torch.float64, torch.complex128)
        rounding = max(relative(real(own[i]) - m, m) for i, m in zip(which, middle, strict=True))
        if rounding > 0.05:
            raise ValueError("rounding leaves nothing of the function to be judged")
        tolerance = (1e-6 if exact else 1e-3) + 10 * rounding
        changed = max(relative(real(results[i]) - real(own[i]), real(own[i])) for i in which)
        if not changed <= tolerance:
            return changed, tolerance, "its rule returns another value than the function does"
        # A derivative much smaller than the function, where terms cancel, is as inexact as these terms are.
        largest = max(map(size, v))
        floors = [1e-3 * min(largest, size(m)) + 1e-12 * largest for m in middle]
        error = differences([real(jvs[i]) for i in which], along, middle, floors)
        if not error <= tolerance:
            return error, tolerance, "its Jacobian-vector product disagrees with a finite difference"
        error = _adjoint_error([results[i] for i in which], [jvs[i] for i in which], leaves, v, floors)
        return error, tolerance, "its backward pass is not the transpose of its Jacobian-vector product"

    def _has_rule(self, call: RecordedCall) -> bool:
        if self.method == "forward":
            return call.func in dual_rules.RULES
        if self.method == "double_backward" or (call.func not in rules.RULES and call.func not in rules.IN_PLACE):
            return False
        with generators_kept(call.device), torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
            return call.by_rule() is not None

    def _products(self, call: RecordedCall, v: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return results with their graph, Jv of each, and the leaves of the graph."""
        recorded = call.by_rule() if self.method == "linearize" else None
        if recorded is not None:
            results, maps, leaves = recorded
            with torch.no_grad():
                tangents = [t.clone() for t in v]
                return results, [tangent_map([*tangents]) for tangent_map in maps], leaves
        leaves, replace = call.leaves()
        with self._kernels(call.func, call.args, call.kwargs):
            results = results_of(*call(call.func, replace))
        if self.method == "double_backward":
            return results, _by_double_backward(results, leaves, v), leaves
        with dual_level(), Decompose(every_call=True):
            duals = results_of(*call(_dual_function(call.func), call.dual(v)))
            pairs = [fwAD.unpack_dual(t) for t in duals]
            return results, [torch.zeros_like(p) if t is None else t.clone() for p, t in pairs], leaves

    def _note_stop(self, func: Any, result: Any) -> None:
        """Note what takes a value, but not its derivative, from what depends on the parameters."""
        name = name_of(func)
        if name.startswith("new_") or name.endswith("_like") or name == "grad":
            return
        values = [t for t in tensors((result,)) if t.is_floating_point() or t.is_complex()]
        if values or isinstance(result, float) or name in ("tolist", "numpy", "__setitem__"):
            self.stops[name] += 1

    def _raise(self, call: RecordedCall, error: float, tolerance: float, complaint: str) -> NoReturn:
        shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in call.active)
        ours = self.method != "double_backward" and self._has_rule(call)
        author = "curveball_fused, whose rule it is" if ours else "PyTorch, whose formula it is"
        other = "forward" if self.method == "double_backward" else "double_backward"
        raise RuntimeError(
            f"wrong derivative of {call.name}{self._place()}, of arguments {shapes}: {complaint} (relative error "
            f"{error:.1e}, tolerance {tolerance:.1e}). Nothing has been changed. Replace the function, or construct "
            f'CurveBall with curvature="{other}"; and please report it to {author}.'
        )

    def _place(self) -> str:
        """Return the module that makes the call, for an error message; empty outside of modules."""
        if not self._modules:
            return ""
        names = [name for name, module in self._modules[0].named_modules() if module is self._modules[-1] and name]
        return f" in {' '.join([type(self._modules[-1]).__name__, *names[:1]])}"

    def _leave(self, module: nn.Module, *_: Any) -> None:
        self._modules.pop()

    @contextmanager
    def _located(self) -> Iterator[None]:
        hooks = (
            register_module_forward_pre_hook(lambda module, _: self._modules.append(module)),
            register_module_forward_hook(self._leave, always_call=True),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _adjoint_error(
    results: list[Tensor], jvs: list[Tensor], leaves: list[Tensor], v: list[Tensor], floors: list[float]
) -> float:
    """Return |<u, Jv> - <Jᵀu, v>| / |u| |Jv|, for a u that lies along Jv in part, lest the products be small."""
    us = []
    for jv in jvs:
        generator = torch.Generator(jv.device).manual_seed(1)
        u = torch.randn(jv.shape, generator=generator, dtype=jv.dtype, device=jv.device)
        us.append(u + jv * (math.sqrt(max(jv.numel(), 1)) / max(float(jv.norm()), 1e-30)))
    gradients = torch.autograd.grad(results, leaves, us, allow_unused=True)
    left = sum(dot(u, jv) for u, jv in zip(us, jvs, strict=True))
    right = sum(dot(g, t) for g, t in zip(gradients, v, strict=True) if g is not None)
    scale = sum(
        math.sqrt(dot(u, u) * max(dot(jv, jv), floor**2 * jv.numel()))
        for u, jv, floor in zip(us, jvs, floors, strict=True)
    )
    if not math.isfinite(left) or not math.isfinite(right):
        return 0.0  # at a pole
    return abs(left - right) / scale if scale else 0.0


def _by_double_backward(results: list[Tensor], leaves: list[Tensor], v: list[Tensor]) -> list[Tensor]:
    """Compute Jv as the derivative of <Jᵀu, v> with respect to u."""
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
    """Return our rule for dual numbers, where there is one and it takes the arguments; else torch's function."""
    rule = dual_rules.RULES.get(func)

    def function(*args: Any, **kwargs: Any) -> Any:
        result = NotImplemented if rule is None else rule("auto", *args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result

    return function


def _itself(t: Tensor) -> Tensor:
    return t
