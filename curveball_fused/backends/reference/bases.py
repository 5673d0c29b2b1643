"""The eigenbases and Kronecker factors of a metric in plain torch: the specification, and for all but CPUs the code.

A parameter of two or more dimensions is the matrix M of its first dimension by all others. A basis, or a factor, of one
of its sides is n x n; that of a longer side may be cut into k pieces of b, of which it knows nothing but the pieces
themselves: k x b x b, in which the last one may reach beyond the side.

Matrices of one shape whose sides are of one kind go together, as a stack with one more dimension at the front: a
product then takes one call for all of them, where on a GPU the calls of a net with many small layers would take longer
than the products.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from curveball_fused._torch_private import foreach_copy_, foreach_norm
from curveball_fused.backends.scalars import GATHERED

from .preconditioners import is_taken

Basis = Tensor | None  # None: the identity
# Elements of a matrix. With a larger one a product has 5·10⁸ multiply-adds or more (pieces of 128), which keep a large
# GPU busy for longer than the host needs for a launch: a stack would save little, and cost a copy.
LARGEST_STACKED = 2**22
# Elements of all matrices of a stack: 32 MiB in float32, of which a rotation has up to four at a time, and stacks of
# bases beside them. So it is a bound on memory; more stacks than one per shape have work enough for their launches.
LARGEST_STACK = 2**23


def to_bases(t: Tensor, left: Basis, right: Basis) -> Tensor:
    """Return QᵀM S of a tensor, in its shape, contiguous: kernels walk over it in a straight line."""
    if left is None and right is None:
        return t
    return _to_bases(_matrix(t), left, right).reshape(t.shape)


def from_bases(turned: Tensor, left: Basis, right: Basis) -> Tensor:
    """Return M of QᵀM S."""
    if left is None and right is None:
        return turned
    return _from_bases(_matrix(turned), left, right).reshape(turned.shape)


def stacks(keys: Sequence[Hashable], sizes: Sequence[int]) -> list[list[int]]:
    """Return which tensors go together: those of equal keys, as many as a stack holds.

    Args:
        keys: what a tensor must have in common with another; None: it belongs to none.
        sizes: their elements.
    """
    found: list[list[int]] = []
    last: dict[Hashable, list[int]] = {}
    for i, (key, size) in enumerate(zip(keys, sizes, strict=True)):
        if key is None:
            continue
        if key not in last or (len(last[key]) + 1) * size > LARGEST_STACK or size > LARGEST_STACKED:
            last[key] = []
            found.append(last[key])
        last[key].append(i)
    return found


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return them as one with one more dimension; a single one as it is."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0]


def unstacked(stack: Tensor, count: int) -> list[Tensor]:
    """Return views of the `count` tensors that `stacked` has put together."""
    return list(stack.unbind()) if count > 1 else [stack]


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
    sides = [(alike, _side(left, alike), _side(right, alike)) for alike in _alike(v, left, right)]
    turned, turned_z = (_rotated(_to_bases, tensors, sides) for tensors in (r, z))
    in_bases = [torch.empty_like(v_i) for v_i in v]
    dots = precondition_(in_bases, v, turned, turned_z, weight, decay, eps, None)
    return _rotated(_from_bases, in_bases, sides), turned, dots


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
    groups = _alike(r, left, right)
    if not groups:
        return
    seen = [r[i] for alike in groups for i in alike]
    limit = min(torch.finfo(t.dtype).max for t in seen) / 2
    usable = usable & (torch.stack(list(foreach_norm(seen))).square() <= limit).all()
    for alike in groups:
        m = stacked([_matrix(r[i]) for i in alike])
        for side, rows in ((left, m), (right, m.mT)):
            factors = [factor for i in alike if (factor := side[i]) is not None]
            if factors:
                before = stacked(factors)
                after = torch.where(usable, _with_gram(before, rows, decay), before)
                foreach_copy_(factors, unstacked(after, len(factors)))


def _alike(tensors: Sequence[Tensor], left: Sequence[Basis], right: Sequence[Basis]) -> list[list[int]]:
    """Return which tensors can go through the same products; those without a side go through none."""
    keys = [
        None if a is None and b is None else (t.shape[0], t.numel(), t.dtype, _shape(a), _shape(b))
        for t, a, b in zip(tensors, left, right, strict=True)
    ]
    return stacks(keys, [t.numel() for t in tensors])


def _shape(side: Tensor | None) -> torch.Size | None:
    return None if side is None else side.shape


def _side(bases: Sequence[Basis], alike: Sequence[int]) -> Basis:
    """Return the bases of tensors that are alike as one: all have one, or none."""
    there = [basis for i in alike if (basis := bases[i]) is not None]
    return stacked(there) if there else None


def _rotated(
    rotate: Callable[[Tensor, Basis, Basis], Tensor],
    tensors: Sequence[Tensor],
    sides: Sequence[tuple[Sequence[int], Basis, Basis]],
) -> list[Tensor]:
    """Return the tensors, if there are any, rotated, those that are alike at once; those without a side as they are."""
    result = list(tensors)
    if result:
        for alike, left, right in sides:
            stack = rotate(stacked([_matrix(tensors[i]) for i in alike]), left, right)
            for i, m in zip(alike, unstacked(stack, len(alike)), strict=True):
                result[i] = m.reshape(tensors[i].shape)
    return result


def _matrix(t: Tensor) -> Tensor:
    return t.reshape(t.shape[0], -1)


# Of a matrix, or of a stack of them.


def _to_bases(m: Tensor, left: Basis, right: Basis) -> Tensor:
    """Return QᵀM S, contiguous."""
    if left is not None:
        m = _on_rows(left.mT, m)
    if right is not None:
        m = _on_columns(m, right)
    return m.contiguous()


def _from_bases(m: Tensor, left: Basis, right: Basis) -> Tensor:
    """Return M of QᵀM S, contiguous."""
    if left is not None:
        m = _on_rows(left, m)
    if right is not None:
        m = _on_columns(m, right.mT)
    return m.contiguous()


def _on_rows(q: Tensor, m: Tensor) -> Tensor:
    """Return q m, where q is n x n, or the pieces on a diagonal."""
    if q.ndim == m.ndim:
        return q @ m
    product: Tensor = q @ _in_pieces(m, q)
    return product.flatten(-3, -2)[..., : m.shape[-2], :]


def _on_columns(m: Tensor, q: Tensor) -> Tensor:
    """Return m q, likewise."""
    if q.ndim == m.ndim:
        return m @ q
    product: Tensor = _in_pieces(m.mT, q).mT @ q
    return product.transpose(-3, -2).flatten(-2)[..., : m.shape[-1]]


def _in_pieces(m: Tensor, q: Tensor) -> Tensor:
    """Return the rows of m as they meet the pieces of q, k x b x columns, with zeros after the last."""
    pieces, length, _ = q.shape[-3:]
    if beyond := pieces * length - m.shape[-2]:
        m = F.pad(m, (0, 0, 0, beyond))
    in_pieces: Tensor = m.unflatten(-2, (pieces, length))
    return in_pieces


def _with_gram(factor: Tensor, m: Tensor, decay: float) -> Tensor:
    """Return decay · F + (1 - decay) m mᵀ: of the product as much as the factor has."""
    rows = m if factor.ndim == m.ndim else _in_pieces(m, factor)
    if factor.ndim == 2:
        return torch.addmm(factor, rows, rows.mT, beta=decay, alpha=1 - decay)
    rows = rows.flatten(0, -3)
    return torch.baddbmm(factor.flatten(0, -3), rows, rows.mT, beta=decay, alpha=1 - decay).view(factor.shape)
