"""The eigenbases and Kronecker factors of a metric in plain torch: the specification, and for all but CPUs the code.

A parameter of two or more dimensions is the matrix M of its first dimension by all others. A basis, or a factor, of one
of its sides is n x n; that of a longer side may be cut into k pieces of b, of which it knows nothing but the pieces
themselves: k x b x b, in which the last one may reach beyond the side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from curveball_fused.backends.scalars import GATHERED

from .preconditioners import is_taken

Basis = Tensor | None  # None: the identity


def to_bases(t: Tensor, left: Basis, right: Basis) -> Tensor:
    """Return QᵀM S of a tensor, in its shape, contiguous: kernels walk over it in a straight line."""
    if left is None and right is None:
        return t
    m = _matrix(t)
    if left is not None:
        m = _on_rows(left.mT, m)
    if right is not None:
        m = _on_columns(m, right)
    return m.reshape(t.shape).contiguous()


def from_bases(turned: Tensor, left: Basis, right: Basis) -> Tensor:
    """Return M of QᵀM S."""
    if left is None and right is None:
        return turned
    m = _matrix(turned)
    if left is not None:
        m = _on_rows(left, m)
    if right is not None:
        m = _on_columns(m, right.mT)
    return m.reshape(turned.shape)


def precondition_in_bases(
    precondition_: Callable[..., Tensor],
    v: Sequence[Tensor],
    r: Sequence[Tensor],
    z: Sequence[Tensor],
    left: Sequence[Basis],
    right: Sequence[Basis],
    weight: Tensor,
    decay: float,
    eps: float,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return u, r in the bases, and the dot products: the rotations around a backend's `precondition_`."""
    turned, turned_z = (
        [to_bases(*each) for each in zip(tensors, left[: len(tensors)], right[: len(tensors)], strict=True)]
        for tensors in (r, z)
    )
    in_bases = [torch.empty_like(v_i) for v_i in v]
    dots = precondition_(in_bases, v, turned, turned_z, weight, decay, eps, None)
    return [from_bases(*each) for each in zip(in_bases, left, right, strict=True)], turned, dots


def update_statistics_(
    precondition_: Callable[..., Tensor],
    v: Sequence[Tensor],
    turned: Sequence[Tensor],
    r: Sequence[Tensor],
    left: Sequence[Tensor | None],
    right: Sequence[Tensor | None],
    weight: Tensor,
    decay: float,
    scalars: Tensor,
    gather: bool,
) -> Tensor:
    """Let v and, where `gather`, the factors see r, if the step is taken; return the scalars with the new weight."""
    precondition_([torch.empty_like(v_i) for v_i in v], v, turned, [], weight, decay, 1.0, scalars)
    taken = is_taken(scalars)
    if gather:
        _gather(r, left, right, decay, taken)
    scalars = scalars.clone()
    scalars[GATHERED] = torch.where(taken, weight, scalars[GATHERED])
    return scalars


def _gather(
    r: Sequence[Tensor], left: Sequence[Tensor | None], right: Sequence[Tensor | None], decay: float, usable: Tensor
) -> None:
    """Let all factors become decay · L + (1 - decay) MMᵀ and likewise R, unless `usable`, 0-dim bool, is false.

    They stay as they are, too, where the trace of an MMᵀ overflows though no square in M does: neither the factor nor
    its basis would ever be finite again.
    """
    seen = [(_matrix(r_i), a, b) for r_i, a, b in zip(r, left, right, strict=True) if a is not None or b is not None]
    if not seen:
        return
    limit = min(torch.finfo(m.dtype).max for m, _, _ in seen) / 2
    usable = usable & (torch.stack([torch.linalg.vector_norm(m) for m, _, _ in seen]).square() <= limit).all()
    kept = torch.where(usable, torch.full_like(usable, decay, dtype=torch.float64), 1)
    for m, *factors in seen:
        m = torch.where(usable, m, 0)
        for factor, rows in zip(factors, (m, m.mT), strict=True):
            if factor is not None:
                _add_gram(factor.mul_(kept), rows, 1 - decay)


def _matrix(t: Tensor) -> Tensor:
    return t.reshape(t.shape[0], -1)


def _on_rows(q: Tensor, m: Tensor) -> Tensor:
    """Return q m, where q is n x n, or the pieces on a diagonal."""
    if q.ndim == 2:
        return q @ m
    product: Tensor = q @ _in_pieces(m, q)
    return product.flatten(0, 1)[: len(m)]


def _on_columns(m: Tensor, q: Tensor) -> Tensor:
    """Return m q, likewise."""
    if q.ndim == 2:
        return m @ q
    product: Tensor = _in_pieces(m.mT, q).mT @ q
    return product.transpose(0, 1).flatten(1)[:, : m.shape[1]]


def _in_pieces(m: Tensor, q: Tensor) -> Tensor:
    """Return the rows of m as they meet the pieces of q, k x b x columns, with zeros after the last."""
    pieces, length, _ = q.shape
    if beyond := pieces * length - len(m):
        m = F.pad(m, (0, 0, 0, beyond))
    in_pieces: Tensor = m.unflatten(0, (pieces, length))
    return in_pieces


def _add_gram(factor: Tensor, m: Tensor, weight: float) -> None:
    """Add weight · m mᵀ to a factor: as much of it as the factor has."""
    if factor.ndim == 2:
        factor.addmm_(m, m.mT, alpha=weight)
    else:
        rows = _in_pieces(m, factor)
        factor.baddbmm_(rows, rows.mT, alpha=weight)
