from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from curveball_fused.curvature import torch_modes

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads as it is imported
torch.set_num_threads(1)  # the nets are tiny; tests of threading set their own number


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """The same random numbers for each test, and announcements that are made once per process made again."""
    torch.manual_seed(0)
    torch_modes.announced.clear()
    yield
