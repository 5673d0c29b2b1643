"""What tests of trainers share: their packages, which only they need, a small training, and the plain loop of it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curveball_fused import CurveBall


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


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def batches() -> DataLoader[Any]:
    numbers = torch.Generator().manual_seed(1)
    x = torch.randn(64, 5, generator=numbers)
    return DataLoader(TensorDataset(x, (x @ torch.randn(5, 3, generator=numbers)).argmax(1)), batch_size=16)


def plain_loop(dtype: torch.dtype = torch.float32, epochs: int = 3) -> Tensor:
    """Return the weights and buffers that the plain loop comes to, in the precision of autocast."""
    model = net()
    optimizer = CurveBall(model.parameters())
    for _ in range(epochs):
        for x, y in batches():
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                optimizer.step(lambda: model(x), lambda outputs: F.cross_entropy(outputs, y))
    return numbers_of(model)


def numbers_of(model: nn.Module) -> Tensor:
    return torch.cat([t.detach().flatten().double() for t in model.state_dict().values()])
