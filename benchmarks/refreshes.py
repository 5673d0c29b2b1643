"""Ways to refresh a basis Q of a factor F, on any device: of (F + δ) Q an orthogonal matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from curveball_fused.preconditioners.bases import SHIFT, cholesky_qr

SHAPES = [(count, n) for n in (32, 64, 128) for count in (1, 12, 72)]  # 72 of 128: one side of GPT-2 small's 768
SETTLED = 20  # refreshes after which a basis of a factor that stays has nearly diagonalized it
NEWTON_SCHULZ_STEPS = 12  # too few where the condition is large, so that its time is at least that


def iterated(factor: Tensor, basis: Tensor) -> Tensor:
    """(F + δ) Q."""
    shift = SHIFT * factor.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return factor @ basis + shift * basis


def normalized(a: Tensor) -> Tensor:
    """Each column over its length: the one of an eigenvalue of 1e-4 beside that of 1 is not lost."""
    return a / torch.linalg.vector_norm(a, dim=-2, keepdim=True)


def qr(factor: Tensor, basis: Tensor) -> Tensor:
    """By Householder's reflections: what the package takes on a CPU."""
    return torch.linalg.qr(iterated(factor, basis))[0]


def cholesky_qr_double(factor: Tensor, basis: Tensor) -> Tensor:
    """What the package takes elsewhere."""
    return cholesky_qr(iterated(factor, basis), basis)


def cholesky_qr_single(factor: Tensor, basis: Tensor) -> Tensor:
    """The same without double precision."""
    a, failed = normalized(iterated(factor, basis)), torch.zeros((), dtype=torch.bool, device=basis.device)
    for _ in range(2):
        r, info = torch.linalg.cholesky_ex(a.mT @ a, upper=True)
        a = torch.linalg.solve_triangular(r, a, upper=True, left=False)
        failed = failed | (info != 0)[..., None, None]
    return torch.where(failed, basis, a)


def newton_schulz(factor: Tensor, basis: Tensor) -> Tensor:
    """The orthogonal matrix that is nearest to A, by X ← X (3 - XᵀX) / 2: products of matrices alone.

    That is no step of orthogonal iteration. Of A = (F + δ) Q₀, as F + δ is positive, it is Q₀ itself; of A with columns
    of length one it is another, which moves away from the eigenvectors.
    """
    x = normalized(iterated(factor, basis))
    x = x / torch.linalg.matrix_norm(x, keepdim=True)
    for _ in range(NEWTON_SCHULZ_STEPS):
        x = 1.5 * x - 0.5 * x @ (x.mT @ x)
    return x


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "QR": qr,
    "Cholesky-QR, twice": cholesky_qr_single,
    "Cholesky-QR, twice, float64": cholesky_qr_double,
    f"Newton-Schulz, {NEWTON_SCHULZ_STEPS} steps": newton_schulz,
}


class Side(NamedTuple):
    """A stack of factors as of a training, and bases to refresh."""

    factor: Tensor
    basis: Tensor


def side(count: int, n: int, device: torch.device, settled: bool) -> Side:
    """Averages over gradients whose eigenvalues span six powers of ten; bases of the start, or those of later on."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(count, n, n, generator=generator, dtype=torch.float64))
    factor = ((q * torch.logspace(0, -6, n, dtype=torch.float64)) @ q.mT).float().to(device)
    basis = torch.eye(n, device=device).expand(count, n, n).contiguous()
    for _ in range(SETTLED if settled else 0):
        basis = qr(factor, basis)
    return Side(factor, basis)


class Quality(NamedTuple):
    """How good a way is.

    Attributes:
        from_start: largest entry of |QᵀQ - 1| over `SETTLED` refreshes from the identity.
        off_diagonal: the norm of what QᵀFQ then has off its diagonal, over that of F.
    """

    from_start: float
    off_diagonal: float


def quality(way: Callable[[Tensor, Tensor], Tensor], count: int, n: int, device: torch.device) -> Quality:
    """Refresh from the identity as often as it takes QR to settle."""
    factor, basis = side(count, n, device, settled=False)
    error = 0.0
    for _ in range(SETTLED):
        basis = way(factor, basis)
        wide = basis.double()
        error = max(error, float((wide.mT @ wide - torch.eye(n, dtype=torch.float64, device=device)).abs().max()))
    turned = basis.double().mT @ factor.double() @ basis.double()
    off = turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))
    return Quality(error, float(torch.linalg.matrix_norm(off).max() / torch.linalg.matrix_norm(factor).max()))
