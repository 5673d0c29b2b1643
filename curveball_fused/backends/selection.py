"""Which kernels are there, which of them run, and why."""

from __future__ import annotations

import functools
import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import native

BACKENDS = ("auto", "cuda", "triton", "cpu", "torch")


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
        return f"the native library was not built ({native.CPU.why_not})" if native.CPU.module is None else ""
    capability = torch.cuda.get_device_capability(device)
    name = f"sm_{capability[0]}{capability[1]}"
    if backend == "cuda":
        if native.CUDA.module is None:
            return f"the native CUDA library was not loaded ({native.CUDA.why_not})"
        built = native.CUDA.module.ARCHITECTURES
        return "" if native.covers(built, capability) else f"built for {built}, not for {name}"
    if torch.version.hip is not None:
        return "its kernels were written for NVIDIA GPUs"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return "" if capability >= (8, 0) else f"Triton needs sm_80 or later, this is {name}"


# Imports within functions are statements here, which torch.compile can follow; the modules import this one.
def kernels(chosen: str) -> Any:
    """What holds a chosen backend's `update_`, `dots`, `solve` and `adapt_damping`, called by position."""
    if chosen == "torch":
        from .reference import parameters as reference

        return reference
    if chosen == "triton":
        from .triton import parameters as triton_parameters

        return triton_parameters
    return torch.ops.curveball_fused


def loss_kernels(chosen: str) -> Any:
    """What holds a chosen backend's loss operators, called by position."""
    if chosen == "torch":
        from .reference import losses as reference_losses

        return reference_losses
    if chosen == "triton":
        from .triton import losses as triton_losses

        return triton_losses
    return torch.ops.curveball_fused


def tangent_kernels(chosen: str) -> Any:
    """Return what holds the tangent operators of "triton", "cpu" or "torch", called by position."""
    if chosen == "torch":
        from .reference import tangents as reference_tangents

        return reference_tangents
    if chosen == "triton":
        from .triton import tangents as triton_tangents

        return triton_tangents
    return torch.ops.curveball_fused


def has_fused_losses(chosen: str) -> bool:
    """Whether the loss operators of a chosen backend are fused kernels."""
    return chosen != "torch"


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
    for title, library in (("cpu", native.CPU), ("cuda", native.CUDA)):
        info[f"{title} library"] = f"not loaded: {library.why_not}" if library.module is None else "loaded"
        if library.module is not None:
            constants = {k: v for k, v in sorted(vars(library.module).items()) if k.isupper()}
            info |= {f"{title} {name.lower().replace('_', ' ')}": str(value) for name, value in constants.items()}
    for better in ("cuda", "triton") if device.type == "cuda" else ("cpu",):
        if info["backend"] == better:
            break
        info[f"why not {better}"] = why_not(better, device)
        info[f"to get {better}"] = native.ADVICE[better]
    return info
