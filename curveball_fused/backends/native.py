"""The native libraries: whether they are loaded, and if not, why."""

from __future__ import annotations

import importlib
import os
from typing import Any, NamedTuple

import torch

ADVICE = {
    "cpu": "install a C++ compiler and reinstall curveball_fused with pip install --no-build-isolation",
    "cuda": "install a wheel built for this torch's CUDA, or a CUDA toolkit with nvcc and reinstall with "
    "pip install --no-build-isolation",
    "triton": "pip install triton",
}
# What the CPU library defines in torch.ops.curveball_fused (csrc/schemas.h), each of which Python code relies on.
OPERATORS = (
    "update_",
    "dots",
    "precondition_",
    "precondition_in_bases",
    "update_statistics_",
    "solve",
    "adapt_damping",
    "keep_coefficients",
    "cross_entropy_cotangent",
    "cross_entropy_products",
    "mse_cotangent",
    "mse_products",
    "bce_cotangent",
    "bce_products",
    "layer_norm_tangent",
    "batch_norm_tangent",
    "attention_tangent",
    "activation",
)


class Library(NamedTuple):
    """A native library; `module` is None where it cannot be used, and `why_not` says why."""

    module: Any
    why_not: str


def _load(name: str) -> Library:
    try:
        return Library(importlib.import_module(f"curveball_fused.{name}"), "")
    except ImportError as error:
        return Library(None, str(error))


def _load_cpu() -> Library:
    """Load the CPU library, unless it is older or newer than the Python files and lacks an operator."""
    library = _load("_C")
    missing = [name for name in OPERATORS if not hasattr(torch.ops.curveball_fused, name)]
    if library.module is not None and missing:
        return Library(
            None,
            f"it was built from other sources, without the operator {missing[0]}: reinstall curveball_fused with pip "
            "install --no-build-isolation",
        )
    return library


def _load_cuda() -> Library:
    """Load the CUDA library, which needs the operators that the CPU's defines, and torch's own CUDA."""
    if torch.version.cuda is None:
        return Library(None, "this torch was built without CUDA")
    if CPU.module is None:
        return Library(None, "the native library it builds on is missing")
    library = _load("_C_cuda")
    if library.module is not None and library.module.CUDA_VERSION.split(".")[0] != torch.version.cuda.split(".")[0]:
        return Library(None, f"it is for CUDA {library.module.CUDA_VERSION}, this torch for CUDA {torch.version.cuda}")
    return library


def _require(backend: str, library: Library) -> None:
    """Raise ImportError if a library is not loaded."""
    if library.module is None:
        raise ImportError(
            f"CURVEBALL_REQUIRE_NATIVE=1, but the native {backend} library cannot be loaded: {library.why_not}. To get "
            f"it, {ADVICE[backend]}; or unset the variable."
        )


CPU = _load_cpu()
CUDA = _load_cuda()
if os.environ.get("CURVEBALL_REQUIRE_NATIVE") == "1":
    _require("cpu", CPU)
    if torch.cuda.is_available():
        _require("cuda", CUDA)


def has_operators() -> bool:
    """Return whether the native library is loaded, and with it all of torch.ops.curveball_fused."""
    return CPU.module is not None


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Return whether machine code for `architectures`, such as "8.0 9.0+PTX", runs on a device of `capability`."""
    # It does on the same major version and no earlier minor one, or, through PTX, on anything later. "9.0a" is for 9.0
    # alone.
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
