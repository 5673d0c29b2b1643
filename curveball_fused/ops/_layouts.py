"""How tensors lie in memory: kernels walk over lists of them in a straight line."""

from __future__ import annotations

import torch
from torch import Tensor


def same_dense_layout(a: Tensor, b: Tensor) -> bool:
    """Return whether both fill their memory without gaps, in the same order: a flat walk pairs their elements."""
    if a.is_contiguous():
        return b.is_contiguous()
    # empty_like keeps the strides of a tensor exactly if it is dense and does not overlap itself.
    return a.stride() == b.stride() and a.stride() == torch.empty_like(a, device="meta").stride()


def laid_out_as(like: Tensor, t: Tensor) -> Tensor:
    """Return `t`, or a copy of it, in the layout of a dense tensor of its shape."""
    return t if same_dense_layout(like, t) else torch.empty_like(like, dtype=t.dtype).copy_(t)
