"""Optimizers in several threads, in forked and in spawned processes; and an import that stays by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

from curveball_fused import CurveBall
from tests.helpers.against_oracle import METHODS
from tests.helpers.training import advance, assert_equal, everything

ROOT = Path(__file__).resolve().parents[2]
OPTIONS: list[dict[str, Any]] = [*(dict(curvature=name) for name in METHODS), dict(preconditioner="kronecker")]


def trained(seed: int, options: dict[str, Any], steps: int = 20) -> list[Tensor]:
    """A net with weights and data of its own, made without the generator that all threads share."""
    own = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=own))
    x, y = torch.randn(10, 4, generator=own), torch.randint(0, 3, (10,), generator=own)
    optimizer = CurveBall(net.parameters(), **options)
    advance(optimizer, net, x, y, steps)
    return everything(optimizer, net)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_optimizers_in_threads_do_what_they_do_one_after_the_other(
    options: dict[str, Any],
) -> None:
    before = sys.getswitchinterval()
    apart = [trained(seed, options) for seed in range(3)]
    sys.setswitchinterval(1e-5)  # threads take turns in the middle of everything
    try:
        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(trained, range(3), [options] * 3))
    finally:
        sys.setswitchinterval(before)
    for one, other in zip(apart, together):
        assert_equal(one, other)


def test_threads_by_several_methods_at_once() -> None:
    """One has a level of dual numbers open, of which torch has one for all, and another asks whether it is in one."""
    options: list[dict[str, Any]] = [dict(curvature="forward"), dict(curvature="linearize")] * 2
    apart = [trained(seed, options[seed]) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(apart, pool.map(trained, range(4), options)):
            assert_equal(one, other)


def wide() -> tuple[nn.Module, Tensor, Tensor]:
    """A net large enough that torch and our kernels share the work among threads."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(100, 400), nn.Tanh(), nn.Linear(400, 10))
    return net, torch.randn(512, 100), torch.randint(0, 10, (512,))


def in_child(work: Callable[[], str]) -> str:
    """What `work` returns, or the message of its error, in a process that is forked; "hangs" after a minute."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, work().encode())
        except RuntimeError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    until = time.monotonic() + 60
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hangs"
        time.sleep(0.02)
    with os.fdopen(reading) as file:
        return file.read()


def step_in_fork(parent: int, child: int) -> None:
    """As a program: step on `parent` threads, fork, step on `child` threads; print what came of it."""
    torch.set_num_threads(parent)
    net, x, y = wide()
    optimizer = CurveBall(net.parameters(), preconditioner="kronecker")
    advance(optimizer, net, x, y, 2)

    def work() -> str:
        torch.set_num_threads(child)
        return str(float(advance(optimizer, net, x, y)[0]))

    forked = in_child(work)
    own = str(float(advance(optimizer, net, x, y)[0]))
    print("equal" if forked == own else forked)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("parent", "child", "wanted"),
    [(2, 2, "torch.set_num_threads(1)"), (2, 1, "equal"), (1, 1, "equal"), (1, 2, "equal")],
)
def test_a_forked_process_steps_or_says_why_not(parent: int, child: int, wanted: str) -> None:
    program = f"from tests.evidence import test_threads_and_processes as t; t.step_in_fork({parent}, {child})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert wanted in done.stdout, done.stdout + done.stderr


def save_trained(file: str) -> None:
    torch.set_num_threads(1)
    torch.save(trained(0, {}), file)


@pytest.mark.slow
def test_a_spawned_process_takes_the_same_steps(tmp_path: Path) -> None:
    process = torch.multiprocessing.get_context("spawn").Process(target=save_trained, args=(str(tmp_path / "there"),))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert_equal(trained(0, {}), torch.load(tmp_path / "there"))


WITHOUT_NETWORK = """
import socket

def refuse(*arguments, **options):
    raise AssertionError("the import opens a connection")

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
for name in ("create_connection", "getaddrinfo", "gethostbyname"):
    setattr(socket, name, refuse)
"""


def import_without_network(before: str) -> subprocess.CompletedProcess[str]:
    program = f"{WITHOUT_NETWORK}\n{before}\nimport curveball_fused, curveball_fused.integrations"
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)


def test_the_import_opens_no_connection() -> None:
    done = import_without_network("")
    assert done.returncode == 0, done.stderr


def test_a_connection_would_be_seen() -> None:
    assert "opens a connection" in import_without_network("socket.create_connection(('localhost', 9))").stderr
    assert "opens a connection" in import_without_network("socket.socket().connect(('localhost', 9))").stderr
