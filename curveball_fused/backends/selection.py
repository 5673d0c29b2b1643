"""Which backends can run, which of them does, and why."""

from __future__ import annotations

import functools
import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import native

BACKENDS = ("auto", "cuda", "triton", "cpu", "torch")
# Of which tensors a backend has tangent operators; plain torch has them of all.
TANGENT_DTYPES = {
    "triton": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "cpu": (torch.float32, torch.float64),
}


@functools.cache
def choose(backend: str, device: torch.device) -> str:
    """Choose the backend for tensors on `device`.

    Args:
        backend: one of `BACKENDS`; "auto" takes the first of "cuda", "triton", "cpu" and "torch" that can run.
        device: where the tensors lie.

    Returns:
        "cuda", "triton", "cpu" or "torch".

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


@functools.cache
def choose_tangents(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Choose the backend of the tangent operators, which not every backend has for every dtype.

    Args:
        backend: one of `BACKENDS`; "auto" takes the first of "triton", "cpu" and "torch" that can run.
        device: where the tensors lie.
        dtype: that of the tensors.

    Returns:
        "triton", "cpu" or "torch".

    Raises:
        RuntimeError: a backend was asked for by name and cannot run here, or has no kernel for the dtype. As for
            `choose`, a name that is not one of `BACKENDS` is a ValueError.
    """
    if backend == "auto":
        return next(
            name
            for name in ("triton", "cpu", "torch")
            if not why_not(name, device) and dtype in TANGENT_DTYPES.get(name, (dtype,))
        )
    if backend == "cuda":
        raise RuntimeError(
            'backend="cuda" has no kernels for tangents: use backend="triton", or "auto", which takes Triton where it '
            "runs."
        )
    chosen = choose(backend, device)
    if dtype not in TANGENT_DTYPES.get(chosen, (dtype,)):
        dtypes = " and ".join(str(known) for known in TANGENT_DTYPES[chosen])
        raise RuntimeError(
            f'backend="{backend}" has kernels for tangents of {dtypes}, not of {dtype}: use backend="torch", or '
            '"auto", which takes plain torch there.'
        )
    return chosen


def why_not(backend: str, device: torch.device) -> str:
    """Return why `backend` cannot run for tensors on `device`; empty if it can."""
    if backend == "torch":
        return ""
    if device.type != ("cpu" if backend == "cpu" else "cuda"):
        return f"its kernels work on {'CPU' if backend == 'cpu' else 'CUDA'} tensors only"
    if backend == "cpu":
        return f"the native library was not loaded ({native.CPU.why_not})" if native.CPU.module is None else ""
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
    """Return what holds the operators of a chosen backend on parameters and scalars, called by position."""
    if chosen == "torch":
        from .reference import parameters as reference

        return reference
    if chosen == "triton":
        from .triton import parameters as triton_parameters

        return triton_parameters
    return torch.ops.curveball_fused


def preconditioner_kernels(chosen: str) -> Any:
    """Return what holds a chosen backend's `precondition_`, called by position."""
    if chosen == "torch":
        from .reference import preconditioners as reference_preconditioners

        return reference_preconditioners
    if chosen == "triton":
        from .triton import preconditioners as triton_preconditioners

        return triton_preconditioners
    return torch.ops.curveball_fused


def loss_kernels(chosen: str) -> Any:
    """Return what holds a chosen backend's loss operators, called by position."""
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
    """Return whether the loss operators of a chosen backend are fused kernels."""
    return chosen != "torch"


def build_info() -> dict[str, str]:
    """Return what was built, what will run on this machine, and why.

    Returns:
        Text by key, in an order for printing. "device" is the current CUDA device, if there is one, else the CPU.

        * "curveball_fused", "torch", "python": versions.
        * "device": the name of the GPU, or "cpu".
        * "backend": what `backend="auto"` takes on that device: "cuda", "triton", "cpu" or "torch".
        * "tangents": what computes the fused tangents (`ops.tangents`) there: "triton", "torch" or
          "cpu for float32 and float64, else torch".
        * "cpu library", "cuda library": "loaded", or "not loaded: " and the reason.
        * "cpu compiler", "cpu instruction set", "cpu instruction sets", "cpu torch version": of the CPU library, if it
          is loaded: what compiled it, the processor's instructions that it uses and those that it can use, and the
          torch that it was built with.
        * "cuda architectures", "cuda cuda version", "cuda torch version": what the CUDA library was built for and
          with, if it is loaded.
        * "why not ...", "to get ...": for each better backend that does not run, the reason and the remedy.

    Example::

        for key, value in curveball_fused.build_info().items():
            print(f"{key}: {value}")
    """
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
        "tangents": _who_computes_tangents(device),
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


def _who_computes_tangents(device: torch.device) -> str:
    chosen = choose_tangents("auto", device, torch.float32)
    return "cpu for float32 and float64, else torch" if chosen == "cpu" else chosen
