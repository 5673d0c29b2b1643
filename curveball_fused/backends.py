"""Which kernels are there, which one runs, and why."""

from __future__ import annotations

import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

BACKENDS = ("auto", "cuda", "triton", "cpu", "torch")


def _load_native() -> tuple[Any, str]:
    """The native library and an empty string, or None and the reason why it is not there."""
    try:
        return importlib.import_module("curveball_fused._C"), ""
    except ImportError as error:
        if os.environ.get("CURVEBALL_REQUIRE_NATIVE") == "1":
            raise ImportError(
                f"CURVEBALL_REQUIRE_NATIVE=1, but the native library cannot be loaded: {error}. Reinstall "
                "curveball_fused with a C++ compiler (pip install --no-build-isolation), or unset the variable."
            ) from error
        return None, str(error)


_native, _reason = _load_native()


def choose(backend: str, device: torch.device) -> str:
    """The backend that runs for tensors on `device`: "cpu" or "torch".

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.
        RuntimeError: a backend was asked for by name and cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}.")
    native = _native is not None and device.type == "cpu"
    if backend == "auto":
        return "cpu" if native else "torch"
    if backend == "torch" or (backend == "cpu" and native):
        return backend
    raise RuntimeError(f'backend="{backend}" cannot run on {device}: {_why_not(backend)} Use backend="auto".')


def _why_not(backend: str) -> str:
    if backend in ("cuda", "triton"):
        return f"this version has no {backend} kernels."
    if _native is None:
        return f"the native library was not built ({_reason})."
    return "its kernels work on CPU tensors only."


def build_info() -> dict[str, str]:
    """What was built, what will run on this machine, and why, as printable text."""
    try:
        package = version("curveball_fused")
    except PackageNotFoundError:
        package = "not installed (imported from source)"
    info = {
        "curveball_fused": package,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": choose("auto", torch.device("cpu")),
    }
    if _native is None:
        info["native library"] = f"not loaded: {_reason}"
        info["advice"] = "install a C++ compiler and reinstall with --no-build-isolation for the fast CPU kernels"
    else:
        info["native library"] = "loaded"
        info |= {f"native {k.lower()}": str(v) for k, v in sorted(vars(_native).items()) if k.isupper()}
    info["cuda"] = "tensors on a GPU are served by the torch backend; this version has no CUDA kernels"
    return info
