"""The operators of a Kronecker metric: r in its eigenbases and back, and what bases and squares are made of.

`backends.reference.bases` says in plain torch what they compute.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from curveball_fused import backends
from curveball_fused.backends.reference import bases as reference

from ._checks import check_diagonal, check_lists, check_scalars


@torch.no_grad()
def precondition_in_bases(
    v: Sequence[Tensor],
    r: Sequence[Tensor],
    z: Sequence[Tensor] | None,
    weight: Tensor,
    *,
    left: Sequence[Tensor | None],
    right: Sequence[Tensor | None],
    decay: float,
    eps: float,
    backend: str = "auto",
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Divide r by a diagonal in eigenbases: u = Q [(QᵀrS) / p] Sᵀ, p = √(v' / weight) + ε, v' of the squares of QᵀrS.

    The metric of Vyas et al. 2024 (SOAP). A tensor of two or more dimensions is the matrix of its first dimension by
    all others; Q turns its rows, S its columns. On a CPU a piece of the matrix makes the whole way while it is in the
    cache; elsewhere these are matrix products, one for all tensors of a shape, around the pass of `precondition_`.
    Nothing is written: for that there is `update_statistics_`.

    Args:
        v: as `precondition_` takes it, in the bases.
        r: Jᵀc, of the same shapes, in any floating dtype.
        z: the state, of the same shapes; None or an empty list: no sums with it.
        weight: as for `precondition_`.
        left: Q for each tensor, in the dtype of v: orthogonal, n x n, or, for a side in k equal pieces, k x b x b, of
            which the last may reach beyond it. None: the identity; as it must be for fewer than two dimensions.
        right: S for each, likewise.
        decay: as for `precondition_`.
        eps: as for `precondition_`.
        backend: as for `precondition_`.

    Returns:
        u = P⁻¹r and QᵀrS, in the dtype of v; and float64 `[z·Pz, z·r, r·u]`, as from `precondition_`. QᵀrS is r itself
        where there is no basis.

    Raises:
        ValueError: `decay`, `eps` or `weight` is out of its range, lists differ in length or shapes, or a basis does
            not fit its side.
        RuntimeError: a basis has another dtype than v, or `backend` cannot run here.

    Example::

        v, r = [torch.zeros(3, 2)], [torch.randn(3, 2)]
        q, _ = torch.linalg.qr(torch.randn(3, 3))
        weight = torch.tensor(1 - 0.9, dtype=torch.float64)
        u, turned, dots = ops.precondition_in_bases(v, r, None, weight, left=[q], right=[None], decay=0.9, eps=1e-8)
        # turned is qᵀr; qᵀu is 1 or -1 everywhere, as in Adam's first step
    """
    check_diagonal(decay, eps, weight)
    z = z or []
    check_lists(v, r, *([z] if z else []))
    _check_lengths(v, left=left, right=right)
    if not v:
        return [], [], torch.zeros(3, dtype=torch.float64, device=weight.device)
    chosen = backends.choose(backend, weight.device)
    v = _contiguous(v)
    r, z = _like(v, r), _like(v, z)
    if chosen != "cpu":
        _check_sides(v, left=left, right=right)
        kernels = backends.preconditioner_kernels(chosen)
        with torch.autocast(weight.device.type, enabled=False):  # in whose precision a basis would not be orthogonal
            return reference.precondition_in_bases(kernels.precondition_, v, r, z, left, right, weight, decay, eps)
    bases, sides = _those_there(left, right)
    u = [torch.empty_like(v_i) for v_i in v]
    turned = [torch.empty_like(v_i) if side else r_i for v_i, r_i, side in zip(v, r, sides, strict=True)]
    arguments = u, turned, v, r, z, _contiguous(bases), sides, weight, decay, eps
    try:
        dots: Tensor = torch.ops.curveball_fused.precondition_in_bases(*arguments)
    except RuntimeError:
        _check_sides(v, left=left, right=right)  # which says more; all is checked there, and faster
        raise
    return u, turned, dots


@torch.no_grad()
def update_statistics_(
    v: Sequence[Tensor],
    turned: Sequence[Tensor],
    r: Sequence[Tensor],
    scalars: Tensor,
    weight: Tensor,
    *,
    left: Sequence[Tensor | None],
    right: Sequence[Tensor | None],
    decay: float,
    gather: bool,
    backend: str = "auto",
) -> Tensor:
    """Let v and Shampoo's factors see r: v ← decay v + (1 - decay) turned², L ← decay L + (1 - decay) rrᵀ, R with rᵀr.

    The factors are those of Gupta et al. 2018. All stay as they are where β or ρ is not finite, the mark of a step that
    is skipped; and the factors also where the trace of an rrᵀ overflows. What of a factor reaches beyond its side must
    be zero, and stays so.

    Args:
        v: as `precondition_` takes it.
        turned: r in the bases, as `precondition_in_bases` returns it.
        r: as it takes it.
        scalars: float64, the values named by `backends.scalars.SCALARS`, of which β and ρ are read.
        weight: 1 - decayᵗ with this step's r in it, 0-dim float64.
        left: L for each tensor, in the dtype of v, of the shape of its Q; or None.
        right: R for each, likewise.
        decay: number of at least 0 and less than 1.
        gather: whether the factors see r, or v alone.
        backend: as for `precondition_`.

    Returns:
        New scalars, with `weight` in its place among them.

    Raises:
        ValueError: `scalars` has another dtype or shape; or as from `precondition_in_bases`.
        RuntimeError: as from there.

    Example::

        # v, r, turned and weight as in the example of `precondition_in_bases`; scalars as `solve` returns them
        factor = torch.zeros(3, 3)
        scalars = ops.update_statistics_(
            v, turned, r, scalars, weight, left=[factor], right=[None], decay=0.9, gather=True
        )
        # factor is 0.1 r rᵀ now, v is 0.1 turned²
    """
    check_scalars(scalars)
    check_diagonal(decay, 1.0, weight)
    check_lists(v, turned, r)
    _check_lengths(v, left=left, right=right)
    chosen = backends.choose(backend, weight.device)
    own_v, turned, r = _contiguous(v), _like(v, turned), _like(v, r)
    factors, sides = _those_there(left, right)
    own_factors = _contiguous(factors)
    if chosen != "cpu":
        _check_sides(v, left=left, right=right)
        kernels = backends.preconditioner_kernels(chosen)
        with torch.autocast(weight.device.type, enabled=False):
            scalars = reference.update_statistics_(
                kernels.precondition_, own_v, turned, r, left, right, weight, decay, scalars, gather
            )
    else:
        arguments = own_v, turned, own_factors, r, sides, weight, decay, scalars, gather
        try:
            scalars = torch.ops.curveball_fused.update_statistics_(*arguments)
        except RuntimeError:
            _check_sides(v, left=left, right=right)
            raise
        for original, own in zip(factors, own_factors, strict=True):
            if own is not original:
                original.copy_(own)
    for original, own in zip(v, own_v, strict=True):
        if own is not original:
            original.copy_(own)
    torch.autograd.graph.increment_version([*v, *factors])  # so that a graph that still needs the old values says so
    return scalars


def _check_lengths(v: Sequence[Tensor], **squares: Sequence[Tensor | None]) -> None:
    """Check that there are as many sides as tensors."""
    for name, side in squares.items():
        if len(side) != len(v):
            raise ValueError(f"{name} must have an entry for each of {len(v)} tensors; it has {len(side)}.")


def _check_sides(v: Sequence[Tensor], **squares: Sequence[Tensor | None]) -> None:
    """Check that bases or factors fit the sides of the tensors, and have their dtypes."""
    kinds = [(v_i.shape, v_i.dtype) for v_i in v]
    for name, side in squares.items():
        for i, ((shape, dtype), square) in enumerate(zip(kinds, side, strict=True)):
            if square is not None and square.dtype != dtype:
                raise RuntimeError(f"{name}[{i}] is {square.dtype} beside a tensor of {dtype}: they must agree.")
            if square is not None and not _fits(square.shape, _length(shape, name)):
                raise ValueError(
                    f"{name}[{i}] is {list(square.shape)}; for the side of {_length(shape, name)} of a tensor of shape "
                    f"{list(shape)} it must be n x n, or k x b x b with as few pieces as reach over it."
                )


def _length(shape: torch.Size, side: str) -> int:
    if len(shape) < 2 or 0 in shape:
        return 0
    return shape[0] if side == "left" else math.prod(shape[1:])


@functools.cache
def _fits(square: torch.Size, length: int) -> bool:
    if length == 0 or len(square) not in (2, 3) or square[-1] != square[-2]:
        return False
    return square[-1] == length if len(square) == 2 else (square[0] - 1) * square[1] < length <= square[0] * square[1]


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def _like(v: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors, if there are any, in the dtypes of v, contiguous."""
    pairs = zip(v, tensors, strict=True) if tensors else ()
    return [t.contiguous() if t.dtype == v_i.dtype else t.to(v_i.dtype).contiguous() for v_i, t in pairs]


def _those_there(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> tuple[list[Tensor], list[int]]:
    """Return the bases or factors in the order of their tensors, and which sides have one: 1 left, 2 right, 3 both."""
    there = [t for both in zip(left, right, strict=True) for t in both if t is not None]
    return there, [(a is not None) + 2 * (b is not None) for a, b in zip(left, right, strict=True)]


if backends.has_operators():

    @torch.library.register_fake("curveball_fused::precondition_in_bases")
    def _(u, turned, v, r, z, bases, sides, weight, decay, eps):  # type: ignore[no-untyped-def]
        return weight.new_empty(3)

    @torch.library.register_fake("curveball_fused::update_statistics_")
    def _(v, turned, factors, r, sides, weight, decay, scalars, gather):  # type: ignore[no-untyped-def]
        return torch.empty_like(scalars)
