"""Two tiers of tests: those that run while one works, and those that are marked slow."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """One case of a parametrization that only `make test-all` runs, as faster ones go the same way."""
    return pytest.param(*values, marks=pytest.mark.slow)
