"""Two processes that a trainer starts take the steps of one, whose batches are those of both."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.trainer_processes import TRAINERS, weights
from tests.helpers.trainers import fresh_accelerate, required

ROOT = Path(__file__).parents[2]
PACKAGES = {"fabric": ["lightning"], "huggingface": ["transformers", "accelerate"]}


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    with fresh_accelerate():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_two_processes_are_one(name: str, tmp_path: Path) -> None:
    for package in PACKAGES.get(name, [name]):
        required(package)
    file = tmp_path / "weights.pt"
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*run, "-m", "tests.helpers.trainer_processes", name, str(file)], check=True, cwd=ROOT)
    torch.testing.assert_close(torch.load(file), weights(name), rtol=1e-5, atol=1e-7)
