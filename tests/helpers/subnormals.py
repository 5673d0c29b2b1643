"""What becomes of z where r stays zero: it must not end as a subnormal number."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curveball_fused.backends.dtypes import compute_dtype

Update = Callable[[list[Tensor], list[Tensor], list[Tensor]], object]


def check_vanishing(update: Update, dtype: torch.dtype) -> None:
    """`update(w, z, r)` sets z below the smallest normal number over epsilon to zero, of either sign, and no other."""
    state = compute_dtype(dtype)
    limit = torch.finfo(state).tiny / torch.finfo(state).eps
    z = (torch.tensor([1e-9, -0.1, 0.0, 4.0, -4.0, float("nan")], dtype=torch.float64) * limit).to(state).repeat(7)
    new = z.clone()
    update([torch.ones(len(z), dtype=dtype)], [new], [torch.zeros(len(z), dtype=dtype)])
    gone = z.abs() < limit
    assert (new[gone] == 0).all() and (new[~gone] != 0).all() and torch.equal(new.isnan(), z.isnan())
