"""Outputs as models return them: tuples, lists, dictionaries and dataclasses of tensors, nested or not.

All else knows one tensor. So what depends on the parameters goes on as one vector, of which the loss is given the
parts, in their places; where there is only one such tensor, it goes on as it is.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from curveball_fused._torch_private import DisableTorchFunction, in_dual_level
from curveball_fused.backends.dtypes import compute_dtype


class StructuredOutputs:
    """A model and a loss of outputs of any structure, as those of one tensor.

    Args:
        model_fn: called without arguments, returns a tensor, or a structure of tensors and other things.
        loss_fn: maps that to the loss.
    """

    def __init__(self, model_fn: Callable[[], Any], loss_fn: Callable[[Any], Tensor]) -> None:
        self._model_fn, self._loss_fn = model_fn, loss_fn
        self._returned: Any = None  # by the last run
        self._places: set[int] | None = None  # of the tensors that depend on the parameters, among all of them
        self._is_structure = False
        self._samples = 1

    @property
    def samples(self) -> int:
        """How many samples the last run of the model had: the length of the first tensor that depends on parameters."""
        return self._samples

    def of(self, outputs: Tensor) -> Any:
        """Return outputs of `model_fn` in the structure and the dtypes that the model has returned, detached."""
        return self._restored(outputs, wide=False)

    def model_fn(self) -> Tensor:
        """Run the model; return one tensor."""
        returned: Any = self._model_fn()
        self._is_structure = not isinstance(returned, Tensor)
        if isinstance(returned, Tensor):
            self._samples = _length(returned)
            return returned
        found: list[Tensor] = []

        def note(t: Tensor) -> Tensor:
            found.append(t)
            return t

        _changed(returned, note)
        if self._places is None:  # in the first run, whatever runs follow
            self._places = {i for i, t in enumerate(found) if _depends(t)}
        parts = [t for i, t in enumerate(found) if i in self._places]
        self._returned = _changed(returned, _Forgetting(self._places))
        if not parts:  # of which the check of one tensor says what is wrong
            real = [t for t in found if t.is_floating_point()]
            wrong: Tensor = real[0] if real else returned
            return wrong
        for t in parts:
            if not t.is_floating_point() or t.layout != torch.strided:
                raise TypeError(
                    f"model_fn must return real, dense floating-point tensors where they depend on parameters; one is "
                    f"{t.dtype}, {t.layout}."
                )
        self._samples = _length(parts[0])
        return parts[0] if len(parts) == 1 else torch.cat([t.reshape(-1) for t in parts])

    def loss_fn(self, outputs: Tensor) -> Tensor:
        """Return the loss of outputs of `model_fn`, as they belong to its last run."""
        return self._loss_fn(self._restored(outputs, wide=True))

    def _restored(self, outputs: Tensor, wide: bool) -> Any:
        """Return the structure with parts of `outputs` in the places of what they are; `wide`: in float32 at least."""
        if not self._is_structure:
            return outputs
        places = self._places or set()
        begin, i = 0, -1

        def part(t: Tensor) -> Tensor:
            nonlocal begin, i
            i += 1
            if i not in places:
                return t.detach()
            if len(places) == 1:
                return outputs
            begin += t.numel()
            dtype = compute_dtype(t.dtype) if wide else t.dtype
            found = outputs[begin - t.numel() : begin].view(t.shape)
            return found if found.dtype == dtype else found.to(dtype)

        return _changed(self._returned, part)


class _Forgetting:
    """Put in the place of a tensor that depends on parameters one without memory, so that no graph is kept.

    Args:
        places: of these tensors among all.
    """

    def __init__(self, places: set[int]) -> None:
        self._places, self._count = places, 0

    def __call__(self, t: Tensor) -> Tensor:
        self._count += 1
        if self._count - 1 not in self._places:
            return t
        with DisableTorchFunction():
            return torch.empty(t.shape, dtype=t.dtype, device="meta")


def _length(t: Tensor) -> int:
    return t.shape[0] if t.ndim else 1


def _depends(t: Tensor) -> bool:
    """Return whether a tensor of a run of the model depends on what is differentiated."""
    return t.requires_grad or (in_dual_level() and t.is_floating_point() and fwAD.unpack_dual(t).tangent is not None)


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of nested tuples, lists, mappings and dataclasses with each tensor changed, in their order."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, MutableMapping):  # Hugging Face's ModelOutput is a dataclass, too, and keeps both in step
        new: Any = {} if type(value) is dict else copy.copy(value)
        for key, item in value.items():
            new[key] = _changed(item, change)
        return new
    if isinstance(value, (list, tuple)):
        items = [_changed(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        same: Any = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(same, field.name, _changed(getattr(value, field.name), change))
        return same
    return value
