"""Replicas on the GPU: by NCCL in one process, and in two that share the GPU by gloo."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from curveball_fused import CurveBall
from tests.gpu.device import DEVICE
from tests.helpers.replicas import BATCH, HOW, OPTIONS, STEPS, batch, join_group, net, numbers_of, optimizer_of

SPLIT = (7, 5)


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[None]:
    meet = f"file://{tmp_path}/meet"
    dist.init_process_group("nccl", rank=0, world_size=1, init_method=meet, timeout=timedelta(seconds=60))
    yield
    dist.destroy_process_group()


def part(called: Any, step: int, rank: int, split: tuple[int, ...]) -> Any:
    x, y = (t.to(DEVICE).split(split)[rank] for t in batch(step))
    return (lambda: called(x)), (lambda out: F.cross_entropy(out, y))


def train(rank: int, split: tuple[int, ...], how: str, options: str) -> tuple[Tensor, Tensor, CurveBall]:
    """Train on one process's part of every batch; return the losses and everything that all must share."""
    model = net().to(DEVICE)
    if how == "alone":
        called, optimizer = model, CurveBall(model.parameters(), **OPTIONS[options])
    else:
        called, optimizer = optimizer_of(model, how, OPTIONS[options])
    losses = [optimizer.step(*part(called, step, rank, split))[0] for step in range(STEPS)]
    return torch.stack(losses).cpu(), numbers_of(model, optimizer).cpu(), optimizer


@pytest.mark.usefixtures("nccl")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("how", HOW)
def test_one_process_by_nccl_is_as_one_alone(how: str, options: str) -> None:
    losses, numbers, optimizer = train(0, (BATCH,), how, options)
    optimizer.check_replicas()
    assert optimizer._processes is not None and optimizer._processes.sent_bytes > 0
    expected_losses, expected_numbers, _ = train(0, (BATCH,), "alone", options)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(numbers, expected_numbers, rtol=1e-7, atol=1e-9, equal_nan=True)


@pytest.mark.usefixtures("nccl")
def test_later_steps_wait_for_nothing() -> None:
    model = net().to(DEVICE)
    called, optimizer = optimizer_of(model, "wrapped", OPTIONS["metric"])
    parts = [part(called, step, 0, (BATCH,)) for step in range(3)]
    optimizer.step(*parts[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for each in parts[1:]:
            optimizer.step(*each)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def of_two(rank: int, folder: str) -> None:
    join_group(rank, 2, folder)
    found = {}
    for how in HOW:
        for options in ("published", "metric"):
            losses, numbers, optimizer = train(rank, SPLIT, how, options)
            optimizer.check_replicas()
            found[how, options] = losses, numbers
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_on_one_gpu_are_as_one(tmp_path: Path) -> None:
    mp.spawn(of_two, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (how, options), (losses, numbers) in first.items():
        assert torch.equal(numbers, second[how, options][1]), "the replicas are not equal"
        expected, *_ = train(0, (BATCH,), "alone", options)
        torch.testing.assert_close(losses, expected, rtol=1e-8, atol=1e-9)
