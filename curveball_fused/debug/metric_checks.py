"""Debug mode: whether the metric P of a step is symmetric, and its inverse its inverse."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from curveball_fused.preconditioners import Block, Direction
from curveball_fused.preconditioners.preconditioner import DECAY, EPSILON


def check_metric(blocks: Sequence[Block], direction: Direction, z: Sequence[Tensor]) -> None:
    """Check that each basis is orthogonal, P u = r, and the dot products are z·Pz, z·r and r·u.

    P = Q diag(p) Qᵀ is symmetric by its form, so that an orthogonal Q is all that P and P⁻¹ can lack.

    Args:
        blocks: of all parameters, as they were before the step.
        direction: what P has made of r.
        z: the state.

    Raises:
        RuntimeError: one of them is wrong; the message says which, and by how much.
    """
    eps = max(torch.finfo(block.square_average.dtype).eps for block in blocks)
    expected = torch.zeros(3, dtype=torch.float64)
    sizes = torch.zeros(3, dtype=torch.float64)
    for i, (block, r, u, z_i) in enumerate(zip(blocks, direction.r, direction.u, z, strict=True)):
        for side in block.sides:
            q = side.basis.double()
            length = q.shape[-1]
            error = float((q.mT @ q - torch.eye(length, dtype=q.dtype, device=q.device)).abs().max())
            _judge(f"the orthogonality of a basis of parameter {i}", error, 100 * math.sqrt(length) * eps)
        wide = block.widened()
        turned = wide.to_bases(r.double())
        square = DECAY * wide.square_average + (1 - DECAY) * turned.square()
        p = (square / direction.weight).sqrt() + EPSILON
        difference = wide.from_bases(wide.to_bases(u.double()) * p) - r
        scale = float(r.double().norm()) + EPSILON * float(u.double().norm())
        _judge(f"P u = r for parameter {i}", float(difference.norm()) / scale if scale else 0.0, 1e3 * eps)
        z_turned = wide.to_bases(z_i.double())
        terms = torch.stack((z_turned.square() * p, z_turned * turned, turned.square() / p)).reshape(3, -1)
        expected += terms.sum(1).cpu()
        sizes += terms.abs().sum(1).cpu()
    for name, found, wanted, size in zip(
        ("z·Pz", "z·r", "r·u"), direction.dots.tolist(), expected.tolist(), sizes.tolist(), strict=True
    ):
        _judge(name, abs(found - wanted) / size if size else abs(found), 1e3 * eps)


def _judge(what: str, error: float, tolerance: float) -> None:
    if not error <= tolerance:
        raise RuntimeError(
            f"debug=True: in the preconditioner {what} has a relative error of {error:.1e} (tolerance "
            f"{tolerance:.1e}). Nothing has been changed. Please report it."
        )
