"""Learning rates as the operators take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rates_on_device(lr: Sequence[float | Tensor], device: torch.device) -> tuple[list[float], Tensor | None]:
    """Return the groups' rates as numbers, and, where one is a tensor, all of them as a vector on the device."""
    # Reading a tensor that is on the host already has nobody wait.
    lr = [float(r) if isinstance(r, Tensor) and r.device.type == "cpu" != device.type else r for r in lr]
    if not any(isinstance(rate, Tensor) for rate in lr):
        return [float(rate) for rate in lr], None
    if len(lr) == 1:
        return [0.0], torch.as_tensor(lr[0]).reshape(1)
    filled = [r if isinstance(r, Tensor) else torch.full((), r, dtype=torch.float64, device=device) for r in lr]
    return [0.0] * len(lr), torch.stack([rate.reshape(()).double() for rate in filled])
