"""What the GPU tests and benchmarks share: the device, the backends, random tensors, the launches of a call.

Importing this skips the module that does so where there is no GPU.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

if not torch.cuda.is_available():
    pytest.skip("no GPU: torch.cuda.is_available() is false", allow_module_level=True)

DEVICE = torch.device("cuda", 0)
BACKENDS = ("cuda", "triton")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal numbers on the device."""
    return torch.randn(shape, dtype=torch.float64, device=DEVICE).to(dtype)


def to_device(*numbers: float) -> Tensor:
    """A float64 vector on the device."""
    return torch.tensor(numbers, dtype=torch.float64, device=DEVICE)


def resnet50() -> list[tuple[int, ...]]:
    """The shapes of ResNet-50's 161 parameters, 25.6 million numbers."""

    def convolution(before: int, after: int, size: int) -> list[tuple[int, ...]]:
        return [(after, before, size, size), (after,), (after,)]  # with its batch norm

    shapes, before = convolution(3, 64, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(before, width, 1) + convolution(width, width, 3) + convolution(width, 4 * width, 1)
            if block == 0:
                shapes += convolution(before, 4 * width, 1)
            before = 4 * width
    return [*shapes, (1000, before), (1000,)]


def launches(call: Callable[[], object]) -> list[str]:
    """Names of all that `call` puts on the GPU: kernels, copies and fills.

    Raises:
        RuntimeError: there are none, by which the profiler does not work here.
    """
    call()  # compiles, fills caches
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not names:
        raise RuntimeError("the profiler saw nothing on the GPU: no launches were counted")
    return names
