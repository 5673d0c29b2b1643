"""Which kernels are there, which of them run, and why."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

BACKENDS = ("auto", "cuda", "triton", "cpu", "torch")
ADVICE = {
    "cpu": "install a C++ compiler and reinstall curveball_fused with pip install --no-build-isolation",
    "cuda": "install a wheel built for this torch's CUDA, or a CUDA toolkit with nvcc and reinstall with "
    "pip install --no-build-isolation",
    "triton": "pip install triton",
}


def _load(library: str) -> tuple[Any, str]:
    """The native library and an empty string, or None and the reason why it is not there."""
    try:
        return importlib.import_module(f"curveball_fused.{library}"), ""
    except ImportError as error:
        return None, str(error)


def _load_cuda() -> tuple[Any, str]:
    """The same for the CUDA library, which needs the operators that the other one defines, and torch's own CUDA."""
    if torch.version.cuda is None:
        return None, "this torch was built without CUDA"
    if _native is None:
        return None, "the native library it builds on is missing"
    library, reason = _load("_C_cuda")
    if library is not None and library.CUDA_VERSION.split(".")[0] != torch.version.cuda.split(".")[0]:
        return None, f"it is for CUDA {library.CUDA_VERSION}, this torch for CUDA {torch.version.cuda}"
    return library, reason


def _require(backend: str, library: Any, reason: str) -> None:
    if library is None:
        raise ImportError(
            f"CURVEBALL_REQUIRE_NATIVE=1, but the native {backend} library cannot be loaded: {reason}. To get it, "
            f"{ADVICE[backend]}; or unset the variable."
        )


_native, _why_not_native = _load("_C")
_cuda, _why_not_cuda = _load_cuda()
if os.environ.get("CURVEBALL_REQUIRE_NATIVE") == "1":
    _require("cpu", _native, _why_not_native)
    if torch.cuda.is_available():
        _require("cuda", _cuda, _why_not_cuda)


def has_operators() -> bool:
    """Whether torch.ops.curveball_fused is there."""
    return _native is not None


@functools.cache
def choose(backend: str, device: torch.device) -> str:
    """The backend that runs for tensors on `device`: "cuda", "triton", "cpu" or "torch".

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.
        RuntimeError: a backend was asked for by name and cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}.")
    if backend == "auto":
        return next(name for name in ("cuda", "triton", "cpu", "torch") if not why_not(name, device))
    reason = why_not(backend, device)
    if reason:
        raise RuntimeError(f'backend="{backend}" cannot run on {device}: {reason}. Use backend="auto".')
    return backend


def why_not(backend: str, device: torch.device) -> str:
    """Why `backend` cannot run for tensors on `device`; empty if it can."""
    if backend == "torch":
        return ""
    if device.type != ("cpu" if backend == "cpu" else "cuda"):
        return f"its kernels work on {'CPU' if backend == 'cpu' else 'CUDA'} tensors only"
    if backend == "cpu":
        return f"the native library was not built ({_why_not_native})" if _native is None else ""
    capability = torch.cuda.get_device_capability(device)
    name = f"sm_{capability[0]}{capability[1]}"
    if backend == "cuda":
        if _cuda is None:
            return f"the native CUDA library was not loaded ({_why_not_cuda})"
        return "" if _covers(_cuda.ARCHITECTURES, capability) else f"built for {_cuda.ARCHITECTURES}, not for {name}"
    if torch.version.hip is not None:
        return "its kernels were written for NVIDIA GPUs"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return "" if capability >= (8, 0) else f"Triton needs sm_80 or later, this is {name}"


# Imports within functions are statements here, which torch.compile can follow; the modules import this one.
def kernels(chosen: str) -> Any:
    """What holds a chosen backend's `update_`, `dots`, `solve` and `adapt_damping`, called by position."""
    if chosen == "torch":
        from . import reference

        return reference
    if chosen == "triton":
        from . import triton_kernels

        return triton_kernels
    return torch.ops.curveball_fused


def loss_kernels(chosen: str) -> Any:
    """What holds a chosen backend's loss operators, called by position."""
    if chosen == "torch":
        from . import reference_losses

        return reference_losses
    if chosen == "triton":
        from . import triton_losses

        return triton_losses
    return torch.ops.curveball_fused


def has_fused_losses(chosen: str) -> bool:
    """Whether the loss operators of a chosen backend are fused kernels."""
    return chosen != "torch"


def _covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether machine code for "8.0 9.0+PTX", say, runs on a device: same major version and no later minor one, or,
    through PTX, anything later. "9.0a" is for 9.0 alone."""
    for architecture in architectures.split():
        number, _, ptx = architecture.partition("+")
        major, minor = (int(digits) for digits in number.rstrip("af").split("."))
        if number.endswith("a"):
            covered = (major, minor) == capability
        else:
            covered = (major == capability[0] and minor <= capability[1]) or (
                bool(ptx) and (major, minor) <= capability
            )
        if covered:
            return True
    return False


def build_info() -> dict[str, str]:
    """What was built, what will run on this machine, and why, as printable text."""
    try:
        package = version("curveball_fused")
    except PackageNotFoundError:
        package = "not installed (imported from source)"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    info = {
        "curveball_fused": package,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "backend": choose("auto", device),
    }
    for title, library, reason in (("cpu", _native, _why_not_native), ("cuda", _cuda, _why_not_cuda)):
        info[f"{title} library"] = "loaded" if library is not None else f"not loaded: {reason}"
        if library is not None:
            constants = {k: v for k, v in sorted(vars(library).items()) if k.isupper()}
            info |= {f"{title} {name.lower().replace('_', ' ')}": str(value) for name, value in constants.items()}
    for better in ("cuda", "triton") if device.type == "cuda" else ("cpu",):
        if info["backend"] == better:
            break
        info[f"why not {better}"] = why_not(better, device)
        info[f"to get {better}"] = ADVICE[better]
    return info
