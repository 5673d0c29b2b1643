"""No step reads a value back to the host: watched on the CPU, and on a device that is only made up."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from curveball_fused import CurveBall
from curveball_fused.cuda_graphs.host_reads import HostRead, NoHostReads
from tests.helpers.training import BACKENDS, small

CPU = torch.device("cpu")
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
READS: dict[str, Callable[[], Any]] = {
    "item": lambda: X.sum().item(),
    "truth": lambda: bool(X[0, 0] > 0),
    "float": lambda: float(X[0, 0]),
    "index": lambda: [1, 2][int(X.argmax()) % 2],
    "equal": lambda: torch.equal(X, X),
    "allclose": lambda: torch.allclose(X, X),
    "nonzero": lambda: X.nonzero(),
    "where": lambda: torch.where(X > 0),
    "mask": lambda: X[X > 0],
    "assignment by mask": lambda: X.index_put((X > 0,), torch.ones(int((X > 0).sum()))),
    "masked_select": lambda: X.masked_select(X > 0),
    "unique": lambda: X.unique(),
    "repeat_interleave": lambda: X.repeat_interleave(torch.arange(5), 0),
    "cholesky": lambda: torch.linalg.cholesky(torch.eye(3)),
    "bincount": lambda: torch.arange(3).bincount(),
    "one_hot": lambda: F.one_hot(torch.arange(3)),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_read_is_told_with_its_line(read: Callable[[], Any]) -> None:
    with pytest.raises(HostRead, match=r"aten\..*test_host_reads\.py:\d+, in <lambda>"), NoHostReads(CPU):
        read()


def test_what_stays_on_the_device_may_pass() -> None:
    with NoHostReads(CPU):
        torch.where(X > 0, X, 0.0).masked_fill(X > 1, 2.0)[torch.arange(3), 1:].sum().clamp(min=0)
        X.clone()[0].copy_(X[1])


WATCHED = [
    (curvature, half)
    for curvature in ("linearize", "forward", "double_backward")
    for half in (None, torch.bfloat16, torch.float16)
    if not (curvature == "forward" and half)  # under a dispatch mode torch's forward mode does not follow autocast
]


def with_an_unknown_loss(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y) + out.logsumexp(1).mean()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(average=0.8, direction="gradient", solve_interval=3),
        dict(auto_lambda=False, rho=0.9),
        dict(preconditioner="kronecker", solve_interval=2),
    ],
)
@pytest.mark.parametrize("loss", [F.cross_entropy, with_an_unknown_loss])
@pytest.mark.parametrize(("curvature", "half"), WATCHED)
def test_no_host_read(
    backend: str, options: dict[str, Any], loss: Any, curvature: str, half: torch.dtype | None
) -> None:
    net, x, y = small()
    rates = (torch.tensor(0.3), 0.5, 0.3)
    groups = [dict(params=net[i].parameters(), lr=lr) for i, lr in zip((0, 1, 4), rates, strict=True)]
    optimizer = CurveBall(groups, curvature=curvature, backend=backend, lambda_interval=2, **options)

    def model_fn() -> Tensor:
        with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
            return net(x)

    # In the first step the guard reads what it has compared, and whether the loss has any curvature.
    optimizer.step(model_fn, lambda out: loss(out, y))
    with NoHostReads(CPU):
        for _ in range(5):
            optimizer.step(model_fn, lambda out: loss(out, y))
            optimizer.stats()
    with pytest.raises(HostRead, match="_local_scalar_dense"), NoHostReads(CPU):
        optimizer.stats()["beta"].item()


def test_a_part_for_the_curvature_needs_no_host_read() -> None:
    net, x, y = small()
    optimizer = CurveBall(net.parameters(), average=0.5)
    part = (lambda: net(x[:4]), lambda out: F.cross_entropy(out, y[:4]))
    optimizer.step(lambda: net(x), lambda out: F.cross_entropy(out, y), curvature_batch=part)
    with NoHostReads(CPU):
        for _ in range(3):
            part = (lambda: net(x[:4]), lambda out: F.cross_entropy(out, y[:4]))
            optimizer.step(lambda: net(x), lambda out: F.cross_entropy(out, y), curvature_batch=part)


@pytest.mark.slow
def test_on_a_device_of_its_own() -> None:
    """In a process of its own, since the fake device stays as long as the process."""
    command = [sys.executable, "-m", "tests.helpers.fake_device"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "36 runs: no host read, no copy; 4 reads told"
