"""Memory for the tests that need much of it."""

from __future__ import annotations

import fcntl
import gc
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture
def need_memory() -> Iterator[Callable[[float], None]]:
    """Skips a test unless so many bytes are free on the GPU, and gives them back after it.

    One such test at a time, as other processes run the tests of other backends.
    """

    def need(count: float) -> None:
        if torch.cuda.mem_get_info()[0] < count:
            pytest.skip(f"needs {count / 2**30:.0f} GiB of free memory")

    with Path(tempfile.gettempdir(), "curveball_fused_gpu_memory.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield need
        gc.collect()
        torch.cuda.empty_cache()
