"""Which backend runs, and what is said about the others, on machines made up for the purpose."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
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
    backends.choose.cache_clear()
    yield
    backends.choose.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes up a GPU, what the native libraries were built for (None: not there), and whether Triton is installed."""

    def make(
        capability: tuple[int, int] = (9, 0), cuda: str | None = "8.0 9.0+PTX", triton: bool = True, cpu: bool = True
    ) -> None:
        backends.choose.cache_clear()
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
        (dict(cpu=False), "cpu", CPU, "not built"),
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
