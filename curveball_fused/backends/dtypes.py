"""The dtype of the arithmetic, and of what the optimizer keeps."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, else float32: what the kernels compute in, and the dtype of z."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return `tensor`, in float32 if it is float16 or bfloat16."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
