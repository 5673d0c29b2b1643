"""What the GPU benchmarks share: the report, and the copy that their bandwidth is judged by."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.report import Report, results_folder

REPORT = Report(results_folder("build/gpu"), "gpu", "make gpu")
COPY_SIZE = 10**9  # float32: 4 GB read, 4 GB written


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A benchmark that raised leaves a table that says so."""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = (crash.message if crash else report.longreprtext).strip().splitlines()[0]
        REPORT.add(f"error: {report.nodeid.split('::')[-1]}", "This benchmark raised.", [{"": reason}])


@pytest.fixture
def report() -> Iterator[Report]:
    """The report; memory and compiled code of one benchmark are gone before the next."""
    yield REPORT
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def copy() -> Callable[[], object]:
    """torch's copy of 4 GB from one tensor to another."""
    from tests.gpu.device import DEVICE

    source = torch.empty(COPY_SIZE, device=DEVICE).normal_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
