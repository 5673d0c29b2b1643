"""Which backend runs, and what is said about the others, on fake machines."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from curveball_fused import backends
from curveball_fused.backends import native
from tests.helpers.tiers import slow

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forget_choices() -> Iterator[None]:
    forget()
    yield
    forget()


def forget() -> None:
    backends.choose.cache_clear()
    backends.choose_tangents.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Fakes a GPU, what the native libraries were built for (None: not there), and whether Triton is installed."""

    def make(
        capability: tuple[int, int] = (9, 0), cuda: str | None = "8.0 9.0+PTX", triton: bool = True, cpu: bool = True
    ) -> None:
        forget()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        library = SimpleNamespace(ARCHITECTURES=cuda) if cuda else None
        monkeypatch.setattr(native, "CUDA", native.Library(library, "" if cuda else "no such file"))
        monkeypatch.setattr(native, "CPU", native.Library(SimpleNamespace() if cpu else None, ""))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)

    return make


@pytest.mark.parametrize(
    ("description", "device", "expected"),
    [
        (dict(), GPU, "cuda"),
        (dict(capability=(8, 6)), GPU, "cuda"),
        (dict(capability=(12, 0)), GPU, "cuda"),  # by PTX
        (dict(capability=(12, 0), cuda="8.0 9.0"), GPU, "triton"),
        (dict(capability=(9, 0), cuda="8.0 12.0+PTX"), GPU, "triton"),
        (dict(capability=(9, 0), cuda="9.0a"), GPU, "cuda"),
        (dict(capability=(10, 0), cuda="9.0a"), GPU, "triton"),
        (dict(capability=(8, 0), cuda="8.6"), GPU, "triton"),
        (dict(cuda=None), GPU, "triton"),
        (dict(cuda=None, triton=False), GPU, "torch"),
        (dict(cuda=None, capability=(7, 5)), GPU, "torch"),
        (dict(), CPU, "cpu"),
        (dict(cpu=False), CPU, "torch"),
        (dict(), torch.device("meta"), "torch"),
    ],
    ids=str,
)
def test_auto_takes_the_best_that_runs(
    machine: Any, description: dict[str, Any], device: torch.device, expected: str
) -> None:
    machine(**description)
    assert backends.choose("auto", device) == expected


@pytest.mark.parametrize(
    ("description", "backend", "device", "reason"),
    [
        (dict(cuda=None), "cuda", GPU, "no such file"),
        (dict(capability=(12, 1), cuda="9.0"), "cuda", GPU, "built for 9.0, not for sm_121"),
        (dict(triton=False), "triton", GPU, "not installed"),
        (dict(capability=(7, 0)), "triton", GPU, "sm_80"),
        (dict(), "cuda", CPU, "CUDA tensors only"),
        (dict(), "triton", CPU, "CUDA tensors only"),
        (dict(), "cpu", GPU, "CPU tensors only"),
        (dict(cpu=False), "cpu", CPU, "not loaded"),
    ],
    ids=str,
)
def test_a_named_backend_that_cannot_run_raises(
    machine: Any, description: dict[str, Any], backend: str, device: torch.device, reason: str
) -> None:
    machine(**description)
    with pytest.raises(RuntimeError, match=rf'backend="{backend}".*{reason}.*auto'):
        backends.choose(backend, device)


@pytest.mark.parametrize(
    ("description", "device", "dtype", "expected"),
    [
        (dict(), GPU, torch.float32, "triton"),
        (dict(), GPU, torch.bfloat16, "triton"),
        (dict(cuda=None), GPU, torch.float64, "triton"),
        (dict(triton=False), GPU, torch.float32, "torch"),
        (dict(capability=(7, 5)), GPU, torch.float32, "torch"),
        (dict(), CPU, torch.float32, "cpu"),
        (dict(), CPU, torch.float64, "cpu"),
        (dict(), CPU, torch.bfloat16, "torch"),
        (dict(), CPU, torch.float16, "torch"),
        (dict(cpu=False), CPU, torch.float32, "torch"),
        (dict(), torch.device("meta"), torch.float32, "torch"),
    ],
    ids=str,
)
def test_tangents_by_the_best_that_has_kernels_for_them(
    machine: Any, description: dict[str, Any], device: torch.device, dtype: torch.dtype, expected: str
) -> None:
    machine(**description)
    assert backends.choose_tangents("auto", device, dtype) == expected
    assert backends.choose_tangents(expected, device, dtype) == expected
    assert backends.choose_tangents("torch", device, dtype) == "torch"


@pytest.mark.parametrize(
    ("description", "backend", "device", "dtype", "words"),
    [
        (dict(), "cuda", GPU, torch.float32, 'no kernels for tangents.*"triton".*"auto"'),
        (dict(triton=False), "cuda", GPU, torch.float32, 'no kernels for tangents.*"triton".*"auto"'),
        (dict(triton=False), "triton", GPU, torch.float32, 'not installed.*"auto"'),
        (dict(), "triton", CPU, torch.float32, 'CUDA tensors only.*"auto"'),
        (dict(), "cpu", GPU, torch.float32, 'CPU tensors only.*"auto"'),
        (dict(cpu=False), "cpu", CPU, torch.float32, 'not loaded.*"auto"'),
        (dict(), "cpu", CPU, torch.bfloat16, 'float32 and torch.float64, not of torch.bfloat16.*"torch".*"auto"'),
        (dict(), "triton", GPU, torch.float8_e5m2, 'not of torch.float8_e5m2.*"torch".*"auto"'),
    ],
    ids=str,
)
def test_a_named_backend_without_kernels_for_tangents_raises(
    machine: Any, description: dict[str, Any], backend: str, device: torch.device, dtype: torch.dtype, words: str
) -> None:
    machine(**description)
    with pytest.raises(RuntimeError, match=f'backend="{backend}".*{words}'):
        backends.choose_tangents(backend, device, dtype)


@pytest.mark.parametrize(
    ("description", "gpu", "expected"),
    [
        (dict(), True, "triton"),
        (dict(cuda=None), True, "triton"),
        (dict(triton=False), True, "torch"),
        (dict(), False, "cpu for float32 and float64, else torch"),
        (dict(cpu=False), False, "torch"),
    ],
    ids=str,
)
def test_says_who_computes_tangents(
    machine: Any, monkeypatch: pytest.MonkeyPatch, description: dict[str, Any], gpu: bool, expected: str
) -> None:
    machine(**description)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert backends.build_info()["tangents"] == expected


@pytest.mark.parametrize(
    ("description", "backend", "words"),
    [
        (dict(cuda=None), "triton", ["no such file", "wheel built for this torch's CUDA"]),
        (dict(cuda=None, triton=False), "torch", ["no such file", "pip install triton"]),
        (dict(), "cuda", ["8.0 9.0+PTX"]),
    ],
    ids=str,
)
def test_says_what_it_chose_why_and_how_to_get_better(
    machine: Any, monkeypatch: pytest.MonkeyPatch, description: dict[str, Any], backend: str, words: list[str]
) -> None:
    machine(**description)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    info = backends.build_info()
    assert info["backend"] == backend and info["device"] == "a GPU"
    for word in words:
        assert any(word in value for value in info.values()), info
    assert any(key.startswith("to get") for key in info) == (backend != "cuda")


# A torch with CUDA, a GPU, and a CUDA library of ours that is missing or for another CUDA.
PRETEND = """
import sys, torch, types
torch.version.cuda = "12.8"
torch.cuda.is_available = lambda: True
sys.modules["curveball_fused._C_cuda"] = {library}
from curveball_fused.backends import native
print(native.CUDA.why_not)
"""


@pytest.mark.skipif(not backends.has_operators(), reason="needs the native kernels")
@pytest.mark.parametrize("required", [slow("0"), "1"])
@pytest.mark.parametrize(
    ("library", "reason"),
    [
        slow("None", "_C_cuda"),
        ("types.SimpleNamespace(CUDA_VERSION='13.0')", "for CUDA 13.0, this torch for CUDA 12.8"),
    ],
)
def test_a_missing_cuda_library_is_an_error_only_where_native_is_required(
    library: str, reason: str, required: str
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PRETEND.format(library=library)],
        capture_output=True,
        text=True,
        env=os.environ | {"CURVEBALL_REQUIRE_NATIVE": required},
    )
    assert (result.returncode != 0) == (required == "1"), result.stderr
    assert reason in result.stdout + result.stderr
    assert required == "0" or "nvcc" in result.stderr


# A native library that has one operator, as an older one may lack others.
OTHER_SOURCES = """
import sys, torch, types
older = torch.library.Library("curveball_fused", "DEF")
older.define("update_(Tensor(a!)[] params) -> Tensor")
sys.modules["curveball_fused._C"] = types.SimpleNamespace()
import curveball_fused
net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.GELU())
optimizer = curveball_fused.CurveBall(net.parameters())
optimizer.step(lambda: net(torch.eye(3)), lambda out: (out - 1).square().mean())
info = curveball_fused.build_info()
print(info["backend"], info["tangents"], info["cpu library"], info["why not cpu"])
"""


@pytest.mark.parametrize("required", ["0", "1"])
def test_a_library_from_other_sources_counts_as_not_loaded(required: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", OTHER_SOURCES],
        capture_output=True,
        text=True,
        env=os.environ | {"CURVEBALL_REQUIRE_NATIVE": required},
    )
    assert (result.returncode != 0) == (required == "1"), result.stderr
    reason = "built from other sources, without the operator dots: reinstall"
    if required == "1":
        assert "ImportError" in result.stderr and reason in result.stderr
    else:
        assert result.stdout.startswith("torch torch not loaded: ") and result.stdout.count(reason) == 2


def test_the_operators_are_those_that_the_library_defines() -> None:
    schemas = (Path(__file__).parents[2] / "csrc" / "schemas.h").read_text()
    assert set(re.findall(r'"(\w+)\(', schemas)) == set(native.OPERATORS)
