"""`precondition_` held against float64 arithmetic, whichever kernels run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# (u, v, r, z, weight, decay, eps, scalars) -> sums
Precondition = Callable[..., Tensor]
DECAY, STEPS, EPS = 0.97, 12, 1e-3


def weight_of(like: Tensor, decay: float = DECAY, steps: int = STEPS) -> Tensor:
    """1 - decayᵗ, where `like` is."""
    return torch.tensor(1 - decay**steps, dtype=torch.float64, device=like.device)


def exact(v: Tensor, r: Tensor, weight: float, decay: float, eps: float) -> tuple[Tensor, Tensor]:
    """The new v, and p, in float64."""
    v_new = decay * v.double() + (1 - decay) * r.double().square()
    return v_new, (v_new / weight).sqrt() + eps


def check_precondition(
    run: Precondition,
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    r: Sequence[Tensor],
    z: Sequence[Tensor],
    scalars: Tensor | None = None,
    decay: float = DECAY,
    eps: float = EPS,
) -> Tensor:
    """Runs it and compares u, v and the sums, which it returns; v must change only with finite β and ρ."""
    weight = weight_of(v[0] if v else torch.zeros(()), decay)
    old_v, old_r, old_z = ([t.double() if t.dtype != torch.float64 else t.clone() for t in ts] for ts in (v, r, z))
    expected = [exact(v_i, r_i, weight.item(), decay, eps) for v_i, r_i in zip(old_v, old_r, strict=True)]
    sums = run(u, v, r, z, weight, decay, eps, scalars)
    assert sums.dtype == torch.float64 and sums.shape == (3,)
    moves = scalars is not None and bool(scalars[:2].isfinite().all())
    wanted, sizes = sums.new_zeros(3), sums.new_zeros(3)
    for i, (v_new, p) in enumerate(expected):
        info = torch.finfo(v[i].dtype)
        if moves:
            assert ((v[i].double() - v_new).abs() <= 4 * info.eps * v_new + info.tiny).all()
        else:
            assert torch.equal(v[i].double(), old_v[i])
        u_new = old_r[i] / p
        assert ((u[i].double() - u_new).abs() <= 12 * info.eps * u_new.abs() + info.tiny / info.eps).all()
        # The sums are of the numbers that were written, in double; only p is not seen.
        terms = [old_r[i] * u[i].double()]
        if z:
            terms = [old_z[i] * old_z[i] * p, old_z[i] * old_r[i], *terms]
        for k, term in enumerate(terms, 3 - len(terms)):
            wanted[k] += term.sum()
            sizes[k] += term.abs().sum() * (12 * info.eps if k == 0 else 1e-13)
    assert ((sums - wanted).abs() <= sizes).all()
    return sums
