"""Recognize a loss with a closed form, by following the outputs through rearrangements into it."""

from __future__ import annotations

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


class Recognizer(TorchFunctionMode):
    """Follow the outputs through rearrangements into a loss with a closed form."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        # The tensors to follow: each with the steps that lead there, and its version, which writing to it changes.
        self._views: dict[int, tuple[Tensor, tuple[Map, ...], int]] = {id(outputs): (outputs, (), version_of(outputs))}
        self._calls: list[tuple[Tensor, int, Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if args and isinstance(result, Tensor) and self._is_followed(args[0]):
            # Another argument that requires a gradient depends on the outputs too.
            others_constant = not any(isinstance(v, Tensor) and v.requires_grad for v in (*args[1:], *kwargs.values()))
            if func in CLOSED_FORMS and others_constant:
                self._calls.append((result, version_of(result), func, args, kwargs))
            elif getattr(func, "__name__", "") in _REARRANGEMENTS and result.is_floating_point():
                steps = self._views[id(args[0])][1]
                step = lambda v: func(v, *args[1:], **kwargs)  # noqa: E731
                self._views[id(result)] = (result, (*steps, step), version_of(result))
        return result

    def _is_followed(self, tensor: Any) -> bool:
        entry = self._views.get(id(tensor))
        return entry is not None and entry[2] == version_of(entry[0])

    def recognized(self, loss: Any) -> RecognizedLoss | None:
        """Return the call that returned `loss`, if it is one of a known function on the outputs."""
        for result, version, function, args, kwargs in self._calls:
            if result is loss and version_of(result) == version and self._is_followed(args[0]):
                return RecognizedLoss(function, args, kwargs, *self._views[id(args[0])][:2])
        return None

    def is_never_negative(self, loss: Any) -> bool | Tensor:
        """Return whether `loss` is of a function that has no negative values; where that is not sure, as 0-dim bool."""
        call = self.recognized(loss)
        if call is None or call.function not in _OF_ANY_SIGN:
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
