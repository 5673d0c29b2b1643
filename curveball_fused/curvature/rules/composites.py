"""Composites: functions that are handled by the functions that they are composed of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from curveball_fused import _torch_private


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """w = g v / |v|, with a norm for each index of one dimension, or a single one for dim = -1."""
    others = [d for d in range(v.dim()) if d != dim % v.dim()]
    norm: Tensor = torch.linalg.vector_norm(v, dim=None if dim == -1 else others, keepdim=True)
    return v * (g / norm)


COMPOSITES: dict[Any, Callable[..., Tensor]] = {_torch_private.weight_norm: weight_norm}
_OVERRIDES = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


@functools.cache
def without_override(function: Any) -> Callable[..., Any] | None:
    """Return a function of torch.nn.functional, so changed that modes see the functions that it calls in its place.

    That is its own code with torch's "has anybody overridden this function?" answered with no: **the first thing to
    break with a new torch**; `tests/curvature/test_tape.py` notices.

    Returns:
        None for a function that is not written in Python.
    """
    if not isinstance(function, FunctionType) or function.__module__ != "torch.nn.functional":
        return None
    if not set(_OVERRIDES) & set(function.__code__.co_names):  # it is a function that it calls that asks
        return None
    names = function.__globals__ | {name: lambda *_: False for name in _OVERRIDES}
    inside = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    inside.__kwdefaults__ = function.__kwdefaults__
    return inside
