"""What a mistake in the package is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PythonMutant:
    name: str
    file: str  # in curveball_fused/
    old: str  # occurs there once
    new: str
    check: str  # a fast test in tests/
    only: str = "test"  # as in `pytest -k`: those of its cases that count
