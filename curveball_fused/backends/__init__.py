"""The backends: the same operators in C++ for CPUs, in CUDA C++, in Triton and in plain torch."""

from .native import ADVICE, has_operators
from .selection import (
    BACKENDS,
    build_info,
    choose,
    choose_tangents,
    has_fused_losses,
    kernels,
    loss_kernels,
    preconditioner_kernels,
    tangent_kernels,
    why_not,
)

__all__ = [
    "ADVICE",
    "BACKENDS",
    "build_info",
    "choose",
    "choose_tangents",
    "has_fused_losses",
    "has_operators",
    "kernels",
    "loss_kernels",
    "preconditioner_kernels",
    "tangent_kernels",
    "why_not",
]
