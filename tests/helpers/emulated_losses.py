"""What the tests of the emulated loss kernels share: the device, and `loss_truth` for its operators."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.helpers import loss_truth
from tests.helpers.emulated import load, operators

device: Any = load()
cross_entropy = functools.partial(loss_truth.cross_entropy, operators)
check_cross_entropy = functools.partial(loss_truth.check_cross_entropy, operators)
check_elements = functools.partial(loss_truth.check_elements, operators)


@pytest.fixture(autouse=True)
def fresh_device() -> Iterator[None]:
    """Settings as at first; and uninitialized memory is NaN, so that it shows if a kernel reads it."""
    device.reset()
    device.launches()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
