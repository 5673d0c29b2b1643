"""The quadratic model of a loss at the model's outputs: value, gradient g_o and Gauss-Newton products v ↦ H_o v.

A `loss_fn` that returns `F.cross_entropy`, `F.mse_loss` or `F.binary_cross_entropy_with_logits` of the outputs, perhaps
reshaped or sliced, is recognised and gets closed-form products. Every other loss gets autograd's double backward, on
the loss alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LossFn = Callable[[Tensor], Tensor]
Map = Callable[[Tensor], Tensor]
# Gradient g_o; a map v ↦ v' that takes off what H_o and g_o do not see; and the product v' ↦ H_o v'. With v' for v,
# v'·H_o v' is a sum of terms that are not negative, so that rounding can't make a convex loss look concave.
Quadratic = tuple[Tensor, Map, Map]

# Linear rearrangements that may stand between the outputs and a recognised loss, such as `out.view(-1, classes)`.
_REARRANGEMENTS = frozenset(
    "view reshape flatten unflatten transpose permute movedim squeeze unsqueeze contiguous swapaxes "
    "__getitem__ narrow select float double to".split()
)


class LossModel:
    """Loss, gradient and Gauss-Newton products at given outputs, for the minimised objective (sign · loss).

    Args:
        loss_fn: maps the outputs to the scalar loss.
        outputs: the model's predictions, any shape and floating dtype, detached.
        sign: 1, or -1 where the loss is to be maximised.
        params: parameters, which `loss_fn` must not use directly.

    Attributes:
        loss: 0-dim, the user's own value, detached.

    Raises:
        TypeError, RuntimeError: `loss_fn` returned something other than a scalar that depends on the outputs.
    """

    def __init__(self, loss_fn: LossFn, outputs: Tensor, sign: float, params: Iterable[Tensor]) -> None:
        self._leaf = outputs.detach().requires_grad_()
        with torch.enable_grad(), _Recogniser(self._leaf, {id(p) for p in params}) as seen:
            returned = loss_fn(self._leaf)
        with torch.enable_grad():
            loss = checked_loss(returned)
        if not loss.requires_grad:
            raise RuntimeError(
                "loss_fn returned a value that does not depend on the outputs it was given: compute the loss from its "
                "argument, without detach() or torch.no_grad()."
            )
        self.loss = loss.detach()
        self._view = self._leaf
        self._steps: tuple[Map, ...] = ()
        closed = seen.closed_form(returned)
        if closed is None:
            gradient, centre, product = _by_autograd(loss, self._leaf)
        else:
            (self._view, self._steps), (gradient, centre, product) = closed
        self._gradient = gradient if sign > 0 else -gradient
        self._centre = centre
        self._product: Map = product if sign > 0 else lambda v: -product(v)

    def cotangent(self, tangent: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The cotangent to pull back, and what remains to be asked.

        Args:
            tangent: Jz, of the outputs' shape.

        Returns:
            c = H_o Jz + g_o, of the outputs' shape and dtype, and a function of Jr that returns the products of the
            2x2 system as float64 `[g·Jz, Jz·HJz, g·Jr, Jz·HJr, Jr·HJr]`.
        """
        g, jz = self._gradient, self._seen_by_loss(tangent)
        h_jz = self._product(jz)
        first = (_dot(g, jz), _dot(h_jz, jz))
        c = (g + h_jz).to(self._view.dtype)
        if self._view is not self._leaf:
            (c,) = torch.autograd.grad(self._view, self._leaf, c)

        def products(tangent: Tensor) -> Tensor:
            jr = self._seen_by_loss(tangent)
            return torch.stack((*first, _dot(g, jr), _dot(h_jz, jr), _dot(self._product(jr), jr)))

        return c, products

    def _seen_by_loss(self, tangent: Tensor) -> Tensor:
        for step in self._steps:
            tangent = step(tangent)
        return self._centre(tangent.to(self._gradient.dtype))


def checked_loss(loss: Any) -> Tensor:
    """`loss` as a 0-dim tensor, or an error that says what `loss_fn` must return."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a tensor, the scalar loss; it returned {type(loss).__name__}.")
    if loss.numel() != 1:
        raise RuntimeError(
            f"loss_fn must return a scalar; it returned a tensor of shape {tuple(loss.shape)}. Reduce it, for example "
            "with .mean()."
        )
    return loss.reshape(())


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dtype=torch.float64)


def _itself(v: Tensor) -> Tensor:
    return v


def _by_autograd(loss: Tensor, outputs: Tensor) -> Quadratic:
    """H_o v = ∂<g_o, v>/∂outputs; zero where the loss is (piecewise) linear."""
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss, outputs, create_graph=True)

    def product(v: Tensor) -> Tensor:
        if not gradient.requires_grad:
            return torch.zeros_like(v)
        (hv,) = torch.autograd.grad(gradient, outputs, v, retain_graph=True, materialize_grads=True)
        return hv

    return gradient.detach(), _itself, product


class _Recogniser(TorchFunctionMode):
    """Follows the outputs through rearrangements into a loss with a closed form."""

    def __init__(self, outputs: Tensor, params: set[int]) -> None:
        super().__init__()
        self._params = params
        self._views: dict[int, tuple[Tensor, tuple[Map, ...]]] = {id(outputs): (outputs, ())}
        self._calls: list[tuple[Tensor, Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(id(a) in self._params for a in args) and getattr(func, "__name__", "") != "__get__":
            raise RuntimeError(
                "loss_fn uses a parameter of the optimizer directly, which the Gauss-Newton products would miss: use "
                "weight_decay=, or let model_fn return what the loss needs of the parameters."
            )
        result = func(*args, **kwargs)
        if args and id(args[0]) in self._views and isinstance(result, Tensor):
            if func in _CLOSED_FORMS:
                self._calls.append((result, func, args, kwargs))
            elif getattr(func, "__name__", "") in _REARRANGEMENTS and result.is_floating_point():
                _, steps = self._views[id(args[0])]
                step = lambda v: func(v, *args[1:], **kwargs)  # noqa: E731
                self._views[id(result)] = (result, (*steps, step))
        return result

    def closed_form(self, loss: Tensor) -> tuple[tuple[Tensor, tuple[Map, ...]], Quadratic] | None:
        """The rearranged outputs with the way there, and their gradient and product, if `loss` is a known function."""
        for result, func, args, kwargs in self._calls:
            if result is loss:
                closed = _CLOSED_FORMS[func](*args, **kwargs)
                if closed is not None:
                    return self._views[id(args[0])], closed
        return None


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Quadratic | None:
    """L = -1/D Σ_nc t_nc log p_nc, with t = weight · ((1-ε) target + ε/C), s_n = Σ_c t_nc, p = softmax(input).

    g = (s p - t)/D;  v' = v - <p, v>;  H v = s/D p v', positive semi-definite as s ≥ 0.
    """
    if size_average is not None or reduce is not None or reduction not in ("mean", "sum"):
        return None
    dim = 0 if input.dim() == 1 else 1
    x, classes = _at_least_float(input), input.shape[dim]
    p = torch.softmax(x, dim)
    shape = [1] * x.dim()
    shape[dim] = classes
    w = x.new_ones(shape) if weight is None else weight.detach().to(x.dtype).view(shape)
    if target.is_floating_point():
        t = w * ((1 - label_smoothing) * target.detach().to(x.dtype) + label_smoothing / classes)
        s, scale = t.sum(dim, keepdim=True), float(classes) / x.numel()
        denominator = None
        g = p * s - t
    else:
        index = target.unsqueeze(dim)
        kept = index != ignore_index
        index = index.where(kept, 0)
        # The class weight of the target; 0 where the target is ignored.
        own = kept.to(x.dtype) if weight is None else w.view(-1)[index] * kept
        denominator, scale = own.sum(), 1.0
        s, smooth = own, torch.zeros_like(own)
        if label_smoothing:
            own, smooth = (1 - label_smoothing) * own, label_smoothing / classes * (w * kept)
            s = own + label_smoothing / classes * (w.sum() * kept)
        g = (p * s).sub_(smooth).scatter_add_(dim, index, -own)
    if reduction == "mean":
        s = s * scale if denominator is None else s / denominator
        g = g.mul_(scale) if denominator is None else g.div_(denominator)
    h = p * s
    return g, lambda v: v - (p * v).sum(dim, keepdim=True), lambda v: h * v


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Quadratic | None:
    """L = s Σ (input - target)², with s = 1/n for the mean;  g = 2 s (input - target), H = 2 s."""
    plain = size_average is None and reduce is None and weight is None and input.shape == target.shape
    if not plain or reduction not in ("mean", "sum"):
        return None
    x = _at_least_float(input)
    scale = 2.0 / (max(x.numel(), 1) if reduction == "mean" else 1)
    return (x - target.detach()).mul_(scale), _itself, lambda v: scale * v


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Quadratic | None:
    """L = s Σ w [(1-y) x + k softplus(-x)], k = 1 + (pos_weight - 1) y.

    g = s w (1 - y - k σ(-x));  H = s w k σ(x) σ(-x).
    """
    if size_average is not None or reduce is not None or reduction not in ("mean", "sum"):
        return None
    x = _at_least_float(input)
    y = target.detach().to(x.dtype)
    scale = (x.numel() and 1.0 / x.numel()) if reduction == "mean" else 1.0
    w = scale if weight is None else scale * weight.detach().to(x.dtype)
    k = 1.0 if pos_weight is None else 1 + (pos_weight.detach().to(x.dtype) - 1) * y
    below = torch.sigmoid(-x)
    h = w * k * below * torch.sigmoid(x)
    return w * (1 - y - k * below), _itself, lambda v: h * v


def _at_least_float(input: Tensor) -> Tensor:
    """Half-precision logits are worked on in float32, as torch's own loss kernels do."""
    x = input.detach()
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


_CLOSED_FORMS: dict[Any, Callable[..., Quadratic | None]] = {
    F.cross_entropy: cross_entropy,
    F.mse_loss: mse_loss,
    F.binary_cross_entropy_with_logits: binary_cross_entropy_with_logits,
}
