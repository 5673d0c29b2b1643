"""The operators of a metric: r in the units of its own statistics.

`backends.reference.preconditioners` says in plain torch what they compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curveball_fused import backends

from ._checks import check_diagonal, check_lists
from ._layouts import laid_out_as, same_dense_layout


@torch.no_grad()
def precondition_(
    v: Sequence[Tensor],
    r: Sequence[Tensor],
    z: Sequence[Tensor] | None,
    weight: Tensor,
    *,
    decay: float,
    eps: float,
    scalars: Tensor | None = None,
    backend: str = "auto",
) -> tuple[list[Tensor], Tensor]:
    """Divide r by Adam's diagonal P = diag(√(v' / weight) + ε), with v' = decay v + (1 - decay) r², in one pass.

    The diagonal is that of Kingma and Ba 2015 (Adam), bias correction included. With tensors that were rotated into the
    eigenbasis of Shampoo's factors it is that of Vyas et al. 2024 (SOAP): the operator takes every basis as it is.

    v stays, so that a step may still be refused when u is known, and becomes v' in a call with `scalars`. In either
    call u is that of v'. A v' that is subnormal, or a u that is nearly so, becomes zero.

    Args:
        v: the decayed averages of r², float32 or float64, of any shapes and strides, zeros at first; written only with
            `scalars`.
        r: Jᵀc, of the same shapes, in the dtype of v, float16 or bfloat16.
        z: the state in the basis of r, of the same shapes and in the dtype of v; None or an empty list: no sums with z.
        weight: the bias correction 1 - decayᵗ in the t-th step, the first being t = 1; 0-dim float64 where the others
            are.
        decay: number of at least 0 and less than 1.
        eps: ε, positive, at least the smallest normal float32 number, 1.2e-38.
        scalars: float64, 1-dim, its first two elements are β and ρ, and v becomes v' if both are finite. None
            (default): v stays.
        backend: "auto" (default), "cuda", "triton", "cpu" or "torch"; one that cannot run here raises RuntimeError.

    Returns:
        u = P⁻¹ r, new tensors in the dtype of v; and float64 `[z·Pz, z·r, r·u]`, summed in a fixed order. Without z the
        first two are zero, for empty lists all three. r·u is not finite if an element of r, or its square in the dtype
        of v, is not.

    Raises:
        ValueError: `decay` or `eps` is out of its range, `weight` is no 0-dim float64 tensor, `scalars` has no β and ρ,
            the lists' lengths or shapes differ, or `backend` is unknown.

    Example::

        v, r, z = [torch.zeros(3)], [torch.full((3,), 2.0)], [torch.ones(3)]
        weight = torch.tensor(1 - 0.999, dtype=torch.float64)
        u, dots = ops.precondition_(v, r, z, weight, decay=0.999, eps=1e-8)
        # u is 1 everywhere, as in Adam's first step; dots are [6, 6, 6]; v is still zero
    """
    check_diagonal(decay, eps, weight)
    if scalars is not None and (scalars.dtype != torch.float64 or scalars.dim() != 1 or scalars.numel() < 2):
        raise ValueError(
            f"scalars must be 1-dim float64 and hold β and ρ first; it is {scalars.dtype}{list(scalars.shape)}."
        )
    z = z or []
    check_lists(v, r, *([z] if z else []))
    if not v:
        return [], torch.zeros(3, dtype=torch.float64, device=weight.device)
    kernels = backends.preconditioner_kernels(backends.choose(backend, weight.device))
    v_flat = [v_i if same_dense_layout(v_i, v_i) else v_i.contiguous() for v_i in v]
    r_flat = [laid_out_as(v_k, r_i) for v_k, r_i in zip(v_flat, r, strict=True)]
    z_flat = [laid_out_as(v_k, z_i) for v_k, z_i in zip(v_flat, z, strict=True)] if z else []
    u = [torch.empty_like(v_k) for v_k in v_flat]
    dots: Tensor = kernels.precondition_(u, v_flat, r_flat, z_flat, weight, decay, eps, scalars)
    if scalars is not None:
        for original, copy in zip(v, v_flat, strict=True):
            if copy is not original:
                original.copy_(copy)
        torch.autograd.graph.increment_version(v)  # so that a graph that still needs the old values says so
    return u, dots


if backends.has_operators():

    @torch.library.register_fake("curveball_fused::precondition_")
    def _(u, v, r, z, weight, decay, eps, scalars=None):  # type: ignore[no-untyped-def]
        return weight.new_empty(3)
