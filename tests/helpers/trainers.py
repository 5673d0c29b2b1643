"""Trainers' packages, which only the tests of the integrations need."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


def required(package: str) -> Any:
    """Import a package of a trainer. Skip where it is missing, but not where CURVEBALL_REQUIRE_TRAINERS=1 is set."""
    if os.environ.get("CURVEBALL_REQUIRE_TRAINERS") == "1":
        return importlib.import_module(package)
    return pytest.importorskip(package)


@contextmanager
def fresh_accelerate() -> Iterator[None]:
    """Forget the precision that Accelerate has for the whole process, before and after."""
    try:
        from accelerate.state import AcceleratorState
    except ImportError:
        yield
        return
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
