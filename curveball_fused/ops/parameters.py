"""The operators on lists of parameters.

`backends.reference.parameters` says in plain torch what they compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curveball_fused import backends
from curveball_fused.backends.scalars import DIRECTION_DAMPING, LAMBD, SCALARS, Z_DOT_Z

from ._checks import check_lists, check_scalars
from ._layouts import laid_out_as, same_dense_layout
from ._rates import rates_on_device


def update_(
    params: Sequence[Tensor],
    z: Sequence[Tensor],
    r: Sequence[Tensor],
    coefficients: Tensor,
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Update parameters and state in one pass: z ← (ρ-βλ) z - β r;  w ← (1 - lr·weight_decay) w + lr z.

    Equation (8) of docs/method.md (Henriques et al. 2019), with decoupled weight decay.

    Args:
        params: w, float16, bfloat16, float32 or float64, of any shapes and strides; written.
        z: state of the same shapes; float64 for float64 parameters, else float32; written.
        r: Jᵀc, of the parameters' shapes, in the dtypes of w or z.
        coefficients: float64, 1-dim, its first elements are β, ρ and λ; or all scalars that `solve` has returned, whose
            θλ takes the place of λ. Where β or ρ is not finite, w and z stay untouched.
        lr: number or 0-dim tensor.
        weight_decay: number (default: 0).
        backend: "auto" (default), "cuda", "triton", "cpu" or "torch"; one that cannot run here raises RuntimeError.

    Returns:
        z·z of the new z, 0-dim float64.

    Raises:
        ValueError: `coefficients` has too few or too many elements, the lists' lengths or shapes differ, or `backend`
            is unknown.

    Example::

        w, z, r = [torch.ones(3)], [torch.zeros(3)], [torch.ones(3)]
        coefficients = torch.tensor([0.5, 0.9, 1.0], dtype=torch.float64)  # β, ρ, λ
        ops.update_(w, z, r, coefficients, lr=1.0)  # z is -0.5 and w 0.5 everywhere; returns 0.75
    """
    if coefficients.dim() != 1 or not 3 <= coefficients.numel() <= len(SCALARS):
        raise ValueError(
            f"coefficients must be 1-dim and hold β, ρ and λ first; it has the shape {list(coefficients.shape)}."
        )
    scalars = coefficients.new_zeros(len(SCALARS))
    scalars[: coefficients.numel()] = coefficients
    if coefficients.numel() <= DIRECTION_DAMPING:
        scalars[DIRECTION_DAMPING] = coefficients[LAMBD]
    updated = update_groups_(
        params, z, r, scalars, group_sizes=[len(params)], lr=[lr], weight_decay=[weight_decay], backend=backend
    )
    return updated[Z_DOT_Z]


@torch.no_grad()
def update_groups_(
    params: Sequence[Tensor],
    z: Sequence[Tensor],
    r: Sequence[Tensor],
    scalars: Tensor,
    *,
    group_sizes: Sequence[int],
    lr: Sequence[float | Tensor],
    weight_decay: Sequence[float],
    backend: str = "auto",
) -> Tensor:
    """Do `update_` for all parameter groups at once, from scalars to scalars.

    Args:
        params: w, the groups' tensors one after another; written.
        z: state; written.
        r: Jᵀc.
        scalars: float64, the values named by `backends.scalars.SCALARS`; not changed.
        group_sizes: how many tensors each group has.
        lr: the rate of each group, number or 0-dim tensor.
        weight_decay: the decay of each group.
        backend: "auto" (default), "cuda", "triton", "cpu" or "torch"; one that cannot run here raises RuntimeError.

    Returns:
        New scalars: z·z is that of the new z, and where the rates differ, the predicted change is that of the mean rate
        Σ lr_g z_g·z_g / z·z.

    Raises:
        ValueError: `scalars` has another dtype or shape, the lists' lengths or shapes differ, or `backend` is unknown.

    Example::

        scalars = ops.solve(scalars, loss, products)
        scalars = ops.update_groups_(w, z, r, scalars, group_sizes=[2, 1], lr=[1.0, 0.1], weight_decay=[0.0, 0.0])
    """
    check_scalars(scalars)
    check_lists(params, z, r)
    kernels = backends.kernels(backends.choose(backend, scalars.device))
    rates, rate_tensor = rates_on_device(lr, scalars.device)
    w_flat, z_flat, r_flat, copies = [], [], [], []
    for w_i, z_i, r_i in zip(params, z, r, strict=True):
        w_k, z_k = w_i, z_i
        if not same_dense_layout(w_i, z_i):
            w_k, z_k = w_i.contiguous(), z_i.contiguous()
            copies += [(w_i, w_k), (z_i, z_k)]
        w_flat.append(w_k)
        z_flat.append(z_k)
        r_flat.append(laid_out_as(w_k, r_i))
    updated: Tensor = kernels.update_(w_flat, z_flat, r_flat, scalars, group_sizes, rates, weight_decay, rate_tensor)
    for original, copy in copies:
        original.copy_(copy)
    torch.autograd.graph.increment_version([*params, *z])  # so that a graph that still needs the old values says so
    return updated


@torch.no_grad()
def dots(z: Sequence[Tensor], r: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """Return `[z·z, z·r, r·r]` over two lists of tensors in one pass, summed in float64 and in a fixed order.

    Lists whose lengths or shapes differ raise ValueError, as does an unknown backend.

    Args:
        z: float32 or float64, of any shapes and strides.
        r: of the same shapes, float16, bfloat16, float32 or float64.
        backend: "auto" (default), "cuda", "triton", "cpu" or "torch"; one that cannot run here raises RuntimeError.

    Returns:
        The Gram matrix's three entries, float64 `[3]`; zeros for empty lists.

    Example::

        ops.dots([torch.ones(3)], [torch.full((3,), 2.0)])  # tensor([3., 6., 12.], dtype=torch.float64)
    """
    check_lists(z, r)
    if not z:
        return torch.zeros(3, dtype=torch.float64)
    kernels = backends.kernels(backends.choose(backend, z[0].device))
    z_flat = [z_i if same_dense_layout(z_i, z_i) else z_i.contiguous() for z_i in z]
    r_flat = [laid_out_as(z_i, r_i) for z_i, r_i in zip(z_flat, r, strict=True)]
    result: Tensor = kernels.dots(z_flat, r_flat)
    return result


if backends.has_operators():

    @torch.library.register_fake("curveball_fused::update_")
    def _(params, z, r, scalars, group_sizes, lr, weight_decay, lr_tensor=None):  # type: ignore[no-untyped-def]
        return torch.empty_like(scalars)

    @torch.library.register_fake("curveball_fused::dots")
    def _(z, r):  # type: ignore[no-untyped-def]
        return z[0].new_empty(3, dtype=torch.float64)
