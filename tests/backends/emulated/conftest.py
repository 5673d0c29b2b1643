"""Every test of the emulated kernels begins with the device as it was at first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers import emulated


@pytest.fixture(autouse=True)
def fresh_device(device: Any) -> Iterator[None]:
    yield from emulated.fresh(device)
