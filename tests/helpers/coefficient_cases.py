"""Arguments of `keep_coefficients`: finite and not, where β is bounded and where it is not, in any dtype."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from curveball_fused.backends.scalars import AVERAGE_BETA, SCALARS

NAN, INF = float("nan"), float("inf")
Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, float]  # scalars, loss, slope, room, sign

NUMBERS = [
    # loss, slope, room, average of β
    (1.3, 0.7, None, 0.3),
    (1.3, 0.7, 0.1, 0.3),
    (1.3, 0.7, 0.3, 0.3),
    (0.0, 0.7, 0.0, 0.3),
    (-1.3, 0.0, 0.0, 0.3),
    (1.3, 0.7, 0.1, -0.3),
    (1.3, 0.7, INF, 0.3),
    (1.3, 0.7, NAN, 0.3),
    (1.3, 0.7, 0.1, NAN),
    # By rounding to float32 this β·slope would be the room, and not more.
    (1.3, 0.5, 0.1, 2 * 1.00000003 * float(torch.tensor(0.1))),
    *[(loss, 0.7, room, 0.3) for loss in (NAN, INF, -INF) for room in (None, 0.1)],
    *[(1.3, slope, room, 0.3) for slope in (NAN, INF, -INF) for room in (None, 0.1)],
    (INF, INF, 0.1, 0.3),
    (INF, -INF, 0.1, 0.3),
]


def cases(dtypes: list[torch.dtype], device: torch.device | str = "cpu") -> Iterator[Arguments]:
    """All of them, with either sign; loss and room have dtypes of `dtypes`, and the slope is the last of three."""
    for (loss, slope, room, beta), dtype, sign in itertools.product(NUMBERS, dtypes, (1.0, -1.0)):
        scalars = torch.arange(1, len(SCALARS) + 1, dtype=torch.float64, device=device) / 7
        scalars[AVERAGE_BETA] = beta
        three = torch.tensor([5.0, 6.0, slope], dtype=torch.float64, device=device)
        most = None if room is None else torch.tensor(room, dtype=dtype, device=device)
        yield scalars, torch.tensor(loss, dtype=dtype, device=device), three[2], most, sign
