"""Memory for the tests that need much of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture
def need_memory() -> Iterator[Callable[[float], None]]:
    """Skips a test unless so many bytes are free on the GPU, and gives them back after it, as others run beside it."""

    def need(count: float) -> None:
        if torch.cuda.mem_get_info()[0] < count:
            pytest.skip(f"needs {count / 2**30:.0f} GiB of free memory")

    yield need
    gc.collect()
    torch.cuda.empty_cache()
