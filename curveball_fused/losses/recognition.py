"""Recognize losses with closed forms, and their sums, by following the outputs through rearrangements into them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from curveball_fused._torch_private import version_of
from curveball_fused.backends.reference.closed_form_losses import CLOSED_FORMS, Map

# Linear rearrangements that may stand between the outputs and a recognized loss, such as `out.view(-1, classes)`.
_REARRANGEMENTS = frozenset(
    "view reshape flatten unflatten transpose permute movedim squeeze unsqueeze contiguous swapaxes "
    "__getitem__ narrow select float double to".split()
)


# Of those with a closed form: the arguments, beside the outputs, that may have any sign. F.nll_loss has no bound at
# zero, as it may be given the logarithms of densities.
_OF_ANY_SIGN = {F.cross_entropy: (), F.mse_loss: ("target",), F.binary_cross_entropy_with_logits: ()}


class RecognizedLoss(NamedTuple):
    """A call of a loss that has a closed form."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    view: Tensor  # the outputs as the loss got them
    steps: tuple[Map, ...]  # how they were rearranged


class Sum(NamedTuple):
    """What is known of a number: Σ weight · loss + constant, the calls by their places, with weights of at least 0."""

    terms: tuple[tuple[float, int], ...]
    constant: float

    def plus(self, other: Any) -> Sum | None:
        """Return the sum with another, or with a number; None for what is neither."""
        if isinstance(other, Sum):
            return Sum(self.terms + other.terms, self.constant + other.constant)
        return Sum(self.terms, self.constant + other) if _is_number(other) else None

    def times(self, factor: Any) -> Sum | None:
        """Return the sum times a number of at least 0; None for anything else."""
        if not _is_number(factor) or not 0 <= factor < math.inf:
            return None
        return Sum(tuple((weight * factor, call) for weight, call in self.terms), self.constant * factor)


class Recognizer(TorchFunctionMode):
    """Follow the outputs through rearrangements into losses with closed forms, and these into sums."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        # The tensors to follow: each with the steps that lead there, and its version, which writing to it changes.
        self._views: dict[int, tuple[Tensor, tuple[Map, ...], int]] = {id(outputs): (outputs, (), version_of(outputs))}
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self._sums: dict[int, tuple[Tensor, int, Sum]] = {}  # by the id of the result, with its version

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if args and isinstance(result, Tensor) and self._is_followed(args[0]):
            # Another argument that requires a gradient depends on the outputs too.
            others_constant = not any(isinstance(v, Tensor) and v.requires_grad for v in (*args[1:], *kwargs.values()))
            if func in CLOSED_FORMS and others_constant:
                self._calls.append((func, args, kwargs))
                self._note(result, Sum(((1.0, len(self._calls) - 1),), 0.0))
            elif getattr(func, "__name__", "") in _REARRANGEMENTS and result.is_floating_point():
                steps = self._views[id(args[0])][1]
                step = lambda v: func(v, *args[1:], **kwargs)  # noqa: E731
                self._views[id(result)] = (result, (*steps, step), version_of(result))
        elif len(args) == 2 and not kwargs and isinstance(result, Tensor):
            self._combine(getattr(func, "__name__", ""), *args, result)
        return result

    def _combine(self, name: str, a: Any, b: Any, result: Tensor) -> None:
        """Note a sum of sums, or one times a number."""
        known = self._sum_of(a), self._sum_of(b)
        first, second = known if known[0] is not None else known[::-1]
        if first is None:
            return
        other = second if second is not None else b if known[0] is not None else a
        combined = None
        if name == "add":
            combined = first.plus(other)
        elif name == "mul":
            combined = first.times(other)
        elif known[0] is not None and _is_number(b):
            combined = first.plus(-b) if name == "sub" else first.times(1 / b) if name == "div" and b > 0 else None
        if combined is not None:
            self._note(result, combined)

    def _note(self, result: Tensor, known: Sum) -> None:
        self._sums[id(result)] = (result, version_of(result), known)

    def _sum_of(self, value: Any) -> Sum | None:
        entry = self._sums.get(id(value))
        return entry[2] if entry is not None and entry[0] is value and entry[1] == version_of(value) else None

    def _is_followed(self, tensor: Any) -> bool:
        entry = self._views.get(id(tensor))
        return entry is not None and entry[2] == version_of(entry[0])

    def recognized(self, loss: Any) -> list[tuple[float, RecognizedLoss]]:
        """Return weights and calls if `loss` is a sum of known functions on the outputs; else nothing."""
        known = self._sum_of(loss)
        if known is None or not all(self._is_followed(self._calls[call][1][0]) for _, call in known.terms):
            return []
        calls = [(weight, *self._calls[call]) for weight, call in known.terms]
        return [
            (weight, RecognizedLoss(function, args, kwargs, *self._views[id(args[0])][:2]))
            for weight, function, args, kwargs in calls
        ]

    def is_never_negative(self, loss: Any) -> bool | Tensor:
        """Return whether `loss` is of functions that have no negative values; where that is not sure, as 0-dim bool."""
        known, terms = self._sum_of(loss), self.recognized(loss)
        if known is None or not terms or known.constant < 0:
            return False
        signs = [_is_never_negative(call) for _, call in terms]
        if not all(sign is not False for sign in signs):
            return False
        unsure = [sign for sign in signs if isinstance(sign, Tensor)]
        return torch.stack(unsure).all() if unsure else True


def _is_never_negative(call: RecognizedLoss) -> bool | Tensor:
    if call.function not in _OF_ANY_SIGN:
        return False
    given = dict(zip(("outputs", "target", "weight"), call.args, strict=False)) | call.kwargs
    if call.function is F.mse_loss and len(call.args) > 2:
        return False  # by position come torch's deprecated options
    given.pop("outputs", None)
    signs = [
        (t >= 0).all()
        for name, t in given.items()
        if name not in _OF_ANY_SIGN[call.function] and isinstance(t, Tensor) and t.is_floating_point()
    ]
    if call.function is F.binary_cross_entropy_with_logits:
        signs.append((given["target"] <= 1).all())
    return torch.stack(signs).all() if signs else True


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
