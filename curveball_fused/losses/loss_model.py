"""The quadratic model of a loss at the model's outputs: value, gradient g and Gauss-Newton products v ↦ H v.

A `loss_fn` that returns `F.cross_entropy`, `F.nll_loss`, `F.mse_loss` or `F.binary_cross_entropy_with_logits` of the
outputs, perhaps reshaped or sliced, or a sum of such, is recognized and gets closed-form products. Every other loss
gets autograd's double backward, on the loss alone, and numbers that tell whether its Hessian is zero, in whose place
another one is to stand (see `missing_curvature`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from curveball_fused._torch_private import run_backward
from curveball_fused.autograd_graph import nodes_of
from curveball_fused.backends.reference.closed_form_losses import CLOSED_FORMS, Map, Products, products

from .fused import fused
from .missing_curvature import HessianProducts, along_z_of_closed_form
from .recognition import RecognizedLoss, Recognizer

# Of functions that torch differentiates once: by a word of the error, what to write in their place.
_REPLACEMENTS = {
    "cdist": "Instead of torch.cdist(a, b) write (a[:, None] - b).norm(dim=2).",
    "pdist": "Instead of F.pdist(a) write (a[i] - a[j]).norm(dim=1) with i, j = torch.triu_indices(len(a), len(a), 1).",
    "multi_margin": "Instead of F.multi_margin_loss: ((1 + o - o.gather(1, y[:, None])).relu() * (1 - "
    "F.one_hot(y, o.shape[1]))).mean(), squared or F.softplus in place of relu for its curvature.",
    "multilabel_margin": "Instead of F.multilabel_margin_loss use F.multilabel_soft_margin_loss.",
    "ctc_loss": "Instead of F.ctc_loss: the sum over the alignments as a recursion in torch, see docs/losses.md.",
}

LossFn = Callable[[Tensor], Tensor]


class LossModel:
    """Loss, gradient and Gauss-Newton products at given outputs, for the minimized objective (sign · loss).

    Args:
        loss_fn: maps the outputs to the scalar loss.
        outputs: the model's predictions, any shape and floating dtype, detached.
        sign: 1, or -1 where the loss is to be maximized.
        hidden: what depends on the parameters, and they themselves: the loss must use none of it, but for the outputs.
        backend: whose kernels compute the products, where it has them.

    Attributes:
        loss: 0-dim, the user's own value, detached.
        has_closed_form: whether the products are by formulas, and not by autograd.
        size: Σ |g_i o_i| over the outputs o, 0-dim float64; None of a loss with a closed form.
        is_nll: whether the products are those of cross-entropy of logits, and not of the loss's own Hessian.

    Raises:
        TypeError, RuntimeError: `loss_fn` returned something other than a scalar that depends on the outputs.
    """

    def __init__(
        self, loss_fn: LossFn, outputs: Tensor, sign: float, hidden: Iterable[Tensor], backend: str = "auto"
    ) -> None:
        self._leaf = outputs.detach().requires_grad_()
        hidden = list(hidden)
        with torch.enable_grad(), _requiring_gradients(hidden), Recognizer(self._leaf) as seen:
            returned = _in_place_explained(loss_fn, self._leaf)
        calls = seen.recognized(returned)
        forms = [_closed_form(call, sign, backend) for _, call in calls]
        self.has_closed_form = has_forms = bool(forms) and None not in forms
        # What has a closed form is a scalar, and sees no other tensor that requires a gradient.
        loss = _of_outputs(returned if has_forms else _general(returned, hidden))
        self.loss = loss.detach()
        self._by_autograd: HessianProducts | None = None
        if has_forms:
            terms = zip(calls, forms, strict=True)
            self._terms = [_Term(weight, call.view, call.steps, form) for (weight, call), form in terms if form]
        else:
            self._by_autograd = _by_autograd(loss, self._leaf, sign)
            self._terms = [_Term(1.0, self._leaf, (), self._by_autograd.products())]
        self.size = None if self._by_autograd is None else self._by_autograd.size
        self.is_nll = any(call.function is F.nll_loss for _, call in calls)

    def gradient(self) -> Tensor:
        """Return g, of the outputs' shape and dtype."""
        return _total([term.of_outputs(term.form.gradient(), self._leaf) for term in self._terms])

    def cotangent(self, tangent: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the cotangent to pull back, and what remains to be asked.

        Args:
            tangent: Jz, of the outputs' shape.

        Returns:
            c = H Jz + g, of the outputs' shape and dtype, and a function of Jr that returns the products of the
            2x2 system as float64 `[g·Jz, Jz·HJz, g·Jr, Jz·HJr, Jr·HJr]`; of a loss without a closed form, whose H may
            be zero, with one more number, as `missing_curvature` has it.
        """
        found = [term.form.at(term.seen_by_loss(tangent)) for term in self._terms]
        pairs = list(zip(self._terms, found, strict=True))

        def products_with(tangent: Tensor) -> Tensor:
            return _total([term.weighted(products(term.seen_by_loss(tangent))) for term, (_, products) in pairs])

        return _total([term.of_outputs(c, self._leaf) for term, (c, _) in pairs]), products_with

    def along_z(self, tangent: Tensor, products_with: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what tells, with Jz, whether the Hessian is zero, as `missing_curvature` has it.

        Args:
            tangent: Jz.
            products_with: what `cotangent` has returned for it.
        """
        if self._by_autograd is not None and self._by_autograd.along_z is not None:
            return self._by_autograd.along_z
        return along_z_of_closed_form(self._leaf.detach(), self.gradient(), tangent, products_with(tangent))


class _Term(NamedTuple):
    """One of the losses that are summed: weight, the outputs as it got them, how these were rearranged, products."""

    weight: float
    view: Tensor
    steps: tuple[Map, ...]
    form: Products

    def of_outputs(self, cotangent: Tensor, leaf: Tensor) -> Tensor:
        """Return a cotangent of what the loss has seen as one of the outputs, in their dtype, with the weight."""
        cotangent = self.weighted(cotangent.to(self.view.dtype))
        if self.view is not leaf:
            (cotangent,) = torch.autograd.grad(self.view, leaf, cotangent, retain_graph=True)
        return cotangent

    def seen_by_loss(self, tangent: Tensor) -> Tensor:
        """Return a tangent of the outputs as one of what the loss has seen."""
        for step in self.steps:
            tangent = step(tangent)
        return tangent

    def weighted(self, t: Tensor) -> Tensor:
        """Return a tensor times the weight."""
        return t if self.weight == 1 else self.weight * t


def _total(tensors: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


class LossGradient(NamedTuple):
    """A loss at given outputs, and its slope there.

    Attributes:
        loss: 0-dim, the user's own value, detached.
        cotangent: g, of the outputs' shape and dtype, of the minimized objective (sign · loss).
        is_never_negative: whether the loss is known to have no negative values, perhaps as 0-dim bool.
    """

    loss: Tensor
    cotangent: Tensor
    is_never_negative: bool | Tensor


def loss_gradient(loss_fn: LossFn, leaf: Tensor, sign: float, hidden: Sequence[Tensor]) -> LossGradient:
    """Return the loss at outputs that require a gradient, without products with its curvature.

    What it depends on is told by its backward pass, which is cheaper here than a walk through the graph.

    Args:
        loss_fn: as for `LossModel`.
        leaf: the outputs, detached, which require a gradient.
        sign: as for `LossModel`.
        hidden: the parameters, of which the loss must use nothing, but for the outputs.

    Raises:
        TypeError: `loss_fn` returned no tensor.
        RuntimeError: it returned no scalar.
        _independent_of_outputs: the scalar does not depend on the outputs.
        _uses_hidden: it depends on a parameter, other than through the outputs.
    """
    with Recognizer(leaf) as seen:
        returned = _in_place_explained(loss_fn, leaf)
    loss = _of_outputs(checked_loss(returned))
    inputs, ones = (leaf, *hidden), (torch.full_like(loss, sign),)
    try:
        cotangent, *others = run_backward((loss,), ones, False, False, inputs, True, accumulate_grad=False)
    except RuntimeError:
        _refuse_hidden(loss, hidden)  # a graph that it reaches may be gone
        raise
    if any(g is not None for g in others):
        raise _uses_hidden()
    if cotangent is None:
        raise _independent_of_outputs()
    return LossGradient(loss.detach(), cotangent, seen.is_never_negative(returned))


def _of_outputs(loss: Tensor) -> Tensor:
    """Return `loss`, or raise an error if it does not depend on the outputs."""
    if not loss.requires_grad:
        raise _independent_of_outputs()
    return loss


def _independent_of_outputs() -> RuntimeError:
    return RuntimeError(
        "loss_fn returned a value that does not depend on the outputs it was given: compute the loss from its "
        "argument, without detach() or torch.no_grad()."
    )


def checked_loss(loss: Any) -> Tensor:
    """Return `loss` as a 0-dim tensor, or raise an error that says what `loss_fn` must return."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a tensor, the scalar loss; it returned {type(loss).__name__}.")
    if loss.numel() != 1:
        raise RuntimeError(
            f"loss_fn must return a scalar; it returned a tensor of shape {tuple(loss.shape)}. Reduce it, for example "
            "with .mean()."
        )
    return loss.reshape(())


def _general(returned: Any, hidden: Iterable[Tensor]) -> Tensor:
    """Return a loss of unknown origin, checked."""
    with torch.enable_grad():
        loss = checked_loss(returned)
    _refuse_hidden(loss, hidden)
    return loss


@contextmanager
def _requiring_gradients(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let all of the tensors require gradients within the block, so that the graph of what uses them tells of it."""
    without = [t for t in tensors if not t.requires_grad]
    for t in without:
        t.requires_grad_()
    try:
        yield
    finally:
        for t in without:
            t.requires_grad_(False)


def _in_place_explained(loss_fn: LossFn, outputs: Tensor) -> Tensor:
    try:
        return loss_fn(outputs)
    except RuntimeError as error:
        if "leaf Variable" in str(error):
            raise RuntimeError(
                "loss_fn writes to the outputs in place: use the out-of-place form there, such as masked_fill for "
                "masked_fill_, or outputs.clone()."
            ) from error
        raise


def _refuse_hidden(loss: Tensor, hidden: Iterable[Tensor]) -> None:
    """Raise where the loss reaches a parameter, or what depends on one, other than through the outputs."""
    ids, graphs = {id(t) for t in hidden}, {t.grad_fn for t in hidden} - {None}
    if any(id(getattr(node, "variable", None)) in ids or node in graphs for node in nodes_of(loss)):
        raise _uses_hidden()


def _uses_hidden() -> RuntimeError:
    return RuntimeError(
        "loss_fn reads what depends on the parameters beside the outputs: a parameter, or what the model has kept "
        "of its run. The Gauss-Newton products would miss it. Let model_fn return it with the outputs, as in "
        "torch.cat([outputs.flatten(), extra.flatten()]), and loss_fn take it from there; for a penalty on "
        "parameters use weight_decay=."
    )


def _closed_form(call: RecognizedLoss, sign: float, backend: str) -> Products | None:
    """Return products by fused kernels, else in plain torch; None for a variant of the loss without a closed form."""
    kernels = fused(call.function, call.args, call.kwargs, sign, backend)
    if kernels is not None:
        return kernels
    quadratic = CLOSED_FORMS[call.function](*call.args, **call.kwargs)
    return None if quadratic is None else products(quadratic, sign)


def _by_autograd(loss: Tensor, outputs: Tensor, sign: float) -> HessianProducts:
    """Return the products with g and H v = ∂<g, v>/∂outputs, of sign · loss."""
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(sign * loss, outputs, create_graph=True)

    def product(v: Tensor) -> Tensor:
        try:
            (hv,) = torch.autograd.grad(gradient, outputs, v, retain_graph=True, materialize_grads=True)
        except (NotImplementedError, RuntimeError) as error:
            if "derivative" in str(error) or "differentiat" in str(error):
                raise RuntimeError(
                    f"the loss cannot be differentiated twice: {str(error).rstrip('.')}. {_replacement(str(error))}"
                ) from error
            raise
        return hv

    return HessianProducts(outputs.detach(), gradient.detach(), product if gradient.requires_grad else None)


def _replacement(error: str) -> str:
    """Return what to do about a loss that cannot be differentiated twice."""
    known = (advice for word, advice in _REPLACEMENTS.items() if word in error)
    return next(known, "Use a loss that can, for its curvature.")
