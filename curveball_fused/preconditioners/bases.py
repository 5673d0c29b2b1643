"""The eigenbases of the Kronecker factors: which are brought up to date after which step, and how."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

INTERVAL = 10  # steps from one refresh of a basis to the next
EARLY_STEPS = 10  # after each of the first steps all bases are refreshed, as they begin as the identity


def refreshed(factor: Tensor, basis: Tensor) -> Tensor:
    """Return the orthogonal Q of F Q₀ = QR: one step of orthogonal iteration towards the eigenvectors of F.

    Nothing is read by the host, and every result is orthogonal anew, so that rounding does not add up.
    """
    basis, _ = torch.linalg.qr(factor @ basis)
    return basis


def due_after(step: int, lengths: Sequence[int]) -> list[int]:
    """Return which sides are refreshed after a step.

    In a whole interval each is, and the work, a side's length cubed, is shared out among the steps.

    Args:
        step: its number, counted from zero.
        lengths: of all sides.
    """
    if step < EARLY_STEPS:
        return list(range(len(lengths)))
    loads = [0] * INTERVAL
    due = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        slot = loads.index(min(loads))
        loads[slot] += lengths[i] ** 3
        if slot == step % INTERVAL:
            due.append(i)
    return due
