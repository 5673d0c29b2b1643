"""Warnings that name the user's line, not one of this package or of torch."""

from __future__ import annotations

import sys
import warnings

announced: set[str] = set()  # what has been warned of in this process

_NOT_THE_USER = frozenset({__name__.partition(".")[0], "torch"})


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, at the first function outside of this package and of torch, from the innermost on."""
    frame, levels = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USER:
        frame, levels = frame.f_back, levels + 1
    warnings.warn(message, category, stacklevel=levels)


def announce(key: str, message: str) -> None:
    """Warn once per process."""
    if key not in announced:
        announced.add(key)
        warn_user(message)
