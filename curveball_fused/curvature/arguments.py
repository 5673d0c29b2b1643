"""Nested arguments of torch functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def map_nested(change: Callable[[Any], Any], value: Any) -> Any:
    """Return nested tuples, lists and dictionaries with each leaf changed.

    Of other types, subclasses of these included, nothing is known: they are leaves. torch's pytree knows more types and
    takes five times as long, which each call that the tape leaves to dual numbers would pay several times in a step.
    """
    if type(value) is dict:
        return {key: map_nested(change, v) for key, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)([map_nested(change, v) for v in value])
    return change(value)
