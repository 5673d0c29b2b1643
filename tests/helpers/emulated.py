"""The CUDA kernels on the CPU: builds and loads the module that registers torch.ops.curveball_emulated.*."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from curveball_fused.backends.scalars import SCALARS

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "emulator"
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


@contextmanager
def one_process_at_a_time(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that is being built, as tests run in several processes."""
    import fcntl  # which Windows lacks, as it does the emulator

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(target: str = "emulator", **definitions: str) -> None:
    """Run CMake, which does nothing if nothing has changed; one process at a time."""
    options = {"Python_EXECUTABLE": sys.executable, **definitions}
    with one_process_at_a_time(BUILD):
        for command in (
            [
                "cmake",
                "-S",
                ROOT,
                "-B",
                BUILD,
                "-G",
                "Ninja",
                *(f"-D{name}={value}" for name, value in options.items()),
            ],
            ["cmake", "--build", BUILD, "--target", target],
        ):
            result = subprocess.run(command, env=os.environ | {"PATH": PATH}, capture_output=True, text=True)
            assert result.returncode == 0, result.stdout + result.stderr


def why_not() -> str | None:
    """What the emulator lacks here; None if it can be built."""
    if platform.machine() not in ("x86_64", "AMD64") or not sys.platform.startswith("linux"):
        return "the emulator needs Linux on x86-64"
    for tool in ("cmake", "ninja"):
        if shutil.which(tool, path=PATH) is None:
            return f"the emulator needs {tool}"
    return None if importlib.util.find_spec("pybind11") else "the emulator needs pybind11"


def load() -> ModuleType:
    """Return the module, whose functions set what the device does; skip the test where it can't be built.

    For the fixture `device`, so that no compiler runs before a test needs it. CURVEBALL_EMULATOR names the directory of
    another build (tests/backends/emulated/test_mutants.py: one with a mistake).
    """
    if "_emulator" not in sys.modules:
        directory = os.environ.get("CURVEBALL_EMULATOR")
        if directory is None:
            if reason := why_not():
                if os.environ.get("CURVEBALL_REQUIRE_NATIVE") == "1":
                    raise RuntimeError(f"CURVEBALL_REQUIRE_NATIVE=1, but {reason}")
                pytest.skip(reason)
            build()
            directory = str(BUILD)
        sys.path.insert(0, directory)
    return importlib.import_module("_emulator")


operators: Any = torch.ops.curveball_emulated
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def fresh(device: Any) -> Iterator[None]:
    """For a fixture: settings as at first; and uninitialized memory is NaN, so that it shows if a kernel reads it."""
    device.reset()
    device.launches()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def scalars(beta: float = 0.3, rho: float = 0.8, direction_damping: float = 0.2) -> Tensor:
    values = dict(
        beta=beta,
        rho=rho,
        lambd=0.25,
        z_dot_z=-1.0,
        linear_term=0.7,
        quadratic_term=0.4,
        predicted_change=-0.5,
        loss=3.0,
        direction_damping=direction_damping,
    )
    return torch.tensor([values.get(name, 2.0) for name in SCALARS], dtype=torch.float64)
