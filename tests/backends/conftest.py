"""The emulated GPU, built when the first test needs it."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.helpers import emulated


@pytest.fixture(scope="session")
def device() -> ModuleType:
    """What sets how the emulated GPU runs the kernels, and tells what it has run."""
    return emulated.load()
