"""The eigenbases of the Kronecker factors: which are brought up to date after which step, and how."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from curveball_fused._torch_private import foreach_copy_
from curveball_fused.backends.reference.bases import stacked, stacks, unstacked
from curveball_fused.backends.reference.preconditioners import is_taken

from .blocks import SIDES

INTERVAL = 20  # steps from one refresh of a basis to the next
EARLY_REFRESHES = 0, 1, 2, 4, 8  # steps after which all bases are refreshed, as they begin as the identity
EARLY_STEPS = 10  # of which no other refreshes any, and whose gradients the factors all see
SHIFT = 1e-4  # δ over the mean eigenvalue of a factor
GATHER_INTERVAL = 2  # steps, after the first ones, from one gradient that the factors see to the next


def gathers(step: int) -> bool:
    """Return whether the factors see the gradient in the step of this number, counted from zero."""
    return step < EARLY_STEPS or step % GATHER_INTERVAL == 0


@torch.no_grad()
def refresh(states: Sequence[Mapping[str, Tensor]], step: int, scalars: Tensor) -> None:
    """Bring the bases up to date whose turn it is after a step, unless it was skipped.

    Args:
        states: of the parameters.
        step: its number, counted from zero.
        scalars: as the step has left them.
    """
    sides = [(state[factor], state[basis]) for state in states for factor, basis in SIDES if factor in state]
    turn = step if step < EARLY_STEPS else EARLY_STEPS + (step - EARLY_STEPS) % INTERVAL
    due = [sides[i] for i in due_after(turn, tuple(_work(factor) for factor, _ in sides))]
    if not due:
        return
    taken = is_taken(scalars)
    # On a CPU each goes alone: a call costs little there, and products of stacks round otherwise.
    keys = [(i if factor.is_cpu else None, factor.shape, factor.dtype) for i, (factor, _) in enumerate(due)]
    with torch.autocast(scalars.device.type, enabled=False):  # in whose precision no basis is orthogonal
        for alike in stacks(keys, [factor.numel() for factor, _ in due]):
            refresh_alike([due[i] for i in alike], taken)


def refresh_alike(sides: Sequence[tuple[Tensor, Tensor]], taken: Tensor) -> None:
    """Bring bases up to date, all of them at once, if the step is taken.

    Args:
        sides: factors of one shape, and their bases, which are written.
        taken: 0-dim bool.
    """
    factor, basis = (stacked(tensors) for tensors in zip(*sides, strict=True))
    new = torch.where(taken, refreshed(factor, basis), basis)
    foreach_copy_([basis for _, basis in sides], unstacked(new, len(sides)))


def refreshed(factor: Tensor, basis: Tensor) -> Tensor:
    """Return the orthogonal Q of (F + δ) Q₀ = QR: one step of orthogonal iteration towards the eigenvectors of F.

    With a δ that is small beside the mean eigenvalue, a direction that F has nothing to say of stays as it is, and is
    not what rounding makes of zero. Nothing is read by the host, and every result is orthogonal anew, so that rounding
    does not add up.
    """
    shift = SHIFT * factor.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    product = factor @ basis + shift * basis
    if product.is_cpu:
        basis, _ = torch.linalg.qr(product)
        return basis
    return cholesky_qr(product, basis)


def cholesky_qr(a: Tensor, otherwise: Tensor) -> Tensor:
    """Return the Q of A = QR by products and Cholesky decompositions, for which a GPU has fast batched code.

    There torch's QR decomposes the matrices of a stack column by column: 17 times as long for 72 of 128 x 128. That R
    with RᵀR = AᵀA gives Q = A R⁻¹. As AᵀA has the square of A's condition, this is done in double precision, and twice:
    the second time mends what the first leaves of rounding (CholeskyQR2, Yamamoto et al. 2015). Columns of length one
    keep the condition low, and do not change Q.

    Args:
        a: [..., n, n], float32 or float64, of a condition below 10⁷ or so.
        otherwise: taken where AᵀA is not positive definite, as where A is zero.
    """
    q = a.double()
    q = q / torch.linalg.vector_norm(q, dim=-2, keepdim=True)
    found = torch.ones(a.shape[:-2], dtype=torch.bool, device=a.device)
    for _ in range(2):
        r, info = torch.linalg.cholesky_ex(q.mT @ q, upper=True)
        q = torch.linalg.solve_triangular(r, q, upper=True, left=False)
        found = found & (info == 0)
    found = found & q.isfinite().all(-1).all(-1)  # not every library says so of NaN
    return torch.where(found[..., None, None], q.to(a.dtype), otherwise)


@functools.cache
def due_after(step: int, works: tuple[int, ...]) -> list[int]:
    """Return which sides are refreshed after a step.

    In a whole interval each is, and the work is shared out among the steps.

    Args:
        step: its number, counted from zero.
        works: of all sides.
    """
    if step < EARLY_STEPS:
        return list(range(len(works))) if step in EARLY_REFRESHES else []
    loads = [0] * INTERVAL
    due = []
    for i in sorted(range(len(works)), key=lambda i: -works[i]):
        slot = loads.index(min(loads))
        loads[slot] += works[i]
        if slot == (step - 1) % INTERVAL:  # the emptiest one where a multiple of it solves
            due.append(i)
    return due


def _work(factor: Tensor) -> int:
    """Return that of a refresh, in proportion: the length cubed, of each piece."""
    return factor.numel() * factor.shape[-1]
