from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

from curveball_fused import user_warnings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads as it is imported
torch.set_num_threads(1)  # the nets are tiny; tests of threading set their own number

if importlib.util.find_spec("hypothesis"):  # which the tests on a GPU do without
    from hypothesis import settings

    # Few random cases while one works, `make test`; many before a change is taken, `make test-all`.
    settings.register_profile("dev", deadline=None, max_examples=25, derandomize=True)
    settings.register_profile("ci", deadline=None, max_examples=200, derandomize=True)
    settings.register_profile("search", deadline=None, max_examples=200)  # others in each run
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """The same random numbers for each test, and announcements that are made once per process made again."""
    torch.manual_seed(0)
    user_warnings.announced.clear()
    yield
