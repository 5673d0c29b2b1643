"""The operators on lists of parameters and on the scalars of a step.

`backends.reference.parameters` says in plain torch what they compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curveball_fused import backends
from curveball_fused.backends.scalars import SCALARS, Z_DOT_Z

from ._checks import check_lists


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

    The update of Henriques et al. 2019, algorithm 1, with decoupled weight decay.

    Args:
        params: w, float16, bfloat16, float32 or float64, of any shapes and strides; written.
        z: state of the same shapes; float64 for float64 parameters, else float32; written.
        r: Jᵀc, of the parameters' shapes, in the dtypes of w or z.
        coefficients: float64, 1-dim, its first elements are β, ρ and λ. Where β or ρ is not finite, w and z stay
            untouched.
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
    if not 3 <= coefficients.numel() <= len(SCALARS):
        raise ValueError(f"coefficients must hold β, ρ and λ first; it has {coefficients.numel()} elements.")
    scalars = coefficients.new_zeros(len(SCALARS))
    scalars[: coefficients.numel()] = coefficients
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
    """Do `update_` for all parameter groups at once, from scalars to scalars; errors are those of `update_`.

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

    Example::

        scalars = ops.solve(scalars, loss, products)
        scalars = ops.update_groups_(w, z, r, scalars, group_sizes=[2, 1], lr=[1.0, 0.1], weight_decay=[0.0, 0.0])
    """
    check_lists(params, z, r)
    kernels = backends.kernels(backends.choose(backend, scalars.device))
    rates, rate_tensor = _rates(lr, scalars.device)
    w_flat, z_flat, r_flat, copies = [], [], [], []
    for w_i, z_i, r_i in zip(params, z, r, strict=True):
        w_k, z_k = w_i, z_i
        if not _same_dense_layout(w_i, z_i):
            w_k, z_k = w_i.contiguous(), z_i.contiguous()
            copies += [(w_i, w_k), (z_i, z_k)]
        w_flat.append(w_k)
        z_flat.append(z_k)
        r_flat.append(r_i if _same_dense_layout(w_k, r_i) else torch.empty_like(w_k, dtype=r_i.dtype).copy_(r_i))
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
    z_flat = [z_i if _same_dense_layout(z_i, z_i) else z_i.contiguous() for z_i in z]
    r_flat = [
        r_i if _same_dense_layout(z_i, r_i) else torch.empty_like(z_i, dtype=r_i.dtype).copy_(r_i)
        for z_i, r_i in zip(z_flat, r, strict=True)
    ]
    result: Tensor = kernels.dots(z_flat, r_flat)
    return result


def solve(
    scalars: Tensor,
    loss: Tensor,
    products: Tensor,
    dots: Tensor | None = None,
    *,
    beta: float | None = None,
    rho: float | None = None,
    lr: float | Tensor = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Solve for β and ρ of this step: [β, -ρ] = A⁺ b minimizes the quadratic model in the plane of Δ = r + λz and z.

    With the damped Gauss-Newton matrix G = JᵀHJ + λI, A = [[Δ·GΔ, Δ·Gz], [Δ·Gz, z·Gz]] and b = [Jᵀg·Δ, Jᵀg·z]:
    Henriques et al. 2019, equation 18, after Martens and Grosse 2015, section 7. Where the curvature is so negative
    that A⁺ b could climb or leap, the step goes along Δ alone, no further than 1/λ, and is counted in `safe_steps`.

    Args:
        scalars: float64, the values named by `backends.scalars.SCALARS`, of which λ and z·z are read; not changed.
        loss: 0-dim, the minimized objective.
        products: float64 `[g·Jz, Jz·HJz, g·Jr, Jz·HJr, Jr·HJr]`, as the operators in `ops.losses` give them.
        dots: float64 `[z·z, z·r, r·r]`, or None (default) to take them from z·z of the last step and the adjoint
            identities z·r = Jz·c and r·r = Jr·c, with c = HJz + g.
        beta: value to keep for β; None (default) to solve for it.
        rho: value to keep for ρ; None (default) to solve for it.
        lr: number (default: 1) or 0-dim tensor, by which the change of the loss is predicted.
        backend: "auto" (default), "cuda", "triton", "cpu" or "torch"; one that cannot run here raises RuntimeError.

    Returns:
        New scalars: β, ρ, the loss, the model's two terms and the predicted change M = -lr x·b + ½ lr² xᵀA x, with
        x = [β, -ρ]. A loss, product or rate that is not finite gives β = ρ = NaN, by which `update_` leaves all as it
        is, and is counted in `skipped_steps`.

    Example::

        scalars = torch.zeros(len(SCALARS), dtype=torch.float64)
        scalars[LAMBD] = 1.0
        loss, c, products = ops.losses.mse_cotangent(outputs, jz, target)  # r = Jᵀc, jr = Jr
        products = ops.losses.mse_products(outputs, jz, jr, target, products)
        scalars = ops.solve(scalars, loss, products)
    """
    kernels = backends.kernels(backends.choose(backend, scalars.device))
    (rate,), tensor = _rates([lr], scalars.device)
    result: Tensor = kernels.solve(scalars, loss, products, dots, beta, rho, rate, tensor)
    return result


def adapt_damping(
    scalars: Tensor,
    new_loss: Tensor,
    *,
    low: float,
    high: float,
    factor: float,
    minimum: float,
    maximum: float,
    backend: str = "auto",
) -> Tensor:
    """Adapt λ by the ratio γ = (new loss - loss) / M of the actual to the predicted change of the loss.

    The Levenberg-Marquardt rule, as in Martens 2010 and Henriques et al. 2019: λ/factor where γ < low, or γ is not
    finite, or M > 0; λ·factor where γ > high; and then λ within the bounds.

    Args:
        scalars: float64, the values named by `backends.scalars.SCALARS`; not changed.
        new_loss: 0-dim, the loss after the step, on the same batch.
        low: γ below which the model was too bold; 0 < low < high.
        high: γ above which it was too cautious.
        factor: between 0 and 1.
        minimum: lower bound of λ.
        maximum: upper bound of λ.
        backend: "auto" (default), "cuda", "triton", "cpu" or "torch"; one that cannot run here raises RuntimeError.

    Returns:
        New scalars, with λ and γ; as they were where the step was skipped or predicted no change.

    Example::

        rule = dict(low=0.5, high=1.5, factor=0.995, minimum=1e-6, maximum=1e6)
        scalars = ops.adapt_damping(scalars, new_loss, **rule)
    """
    kernels = backends.kernels(backends.choose(backend, scalars.device))
    result: Tensor = kernels.adapt_damping(scalars, new_loss, low, high, factor, minimum, maximum)
    return result


def _rates(lr: Sequence[float | Tensor], device: torch.device) -> tuple[list[float], Tensor | None]:
    """Return the groups' rates as numbers, and, where one is a tensor, all of them as a vector on the device."""
    # Reading a tensor that is on the host already has nobody wait.
    lr = [float(r) if isinstance(r, Tensor) and r.device.type == "cpu" != device.type else r for r in lr]
    if not any(isinstance(rate, Tensor) for rate in lr):
        return [float(rate) for rate in lr], None
    if len(lr) == 1:
        return [0.0], torch.as_tensor(lr[0]).reshape(1)
    filled = [r if isinstance(r, Tensor) else torch.full((), r, dtype=torch.float64, device=device) for r in lr]
    return [0.0] * len(lr), torch.stack([rate.reshape(()).double() for rate in filled])


def _same_dense_layout(a: Tensor, b: Tensor) -> bool:
    """Return whether both fill their memory without gaps, in the same order: a flat walk pairs their elements."""
    if a.is_contiguous():
        return b.is_contiguous()
    # empty_like keeps the strides of a tensor exactly if it is dense and does not overlap itself.
    return a.stride() == b.stride() and a.stride() == torch.empty_like(a, device="meta").stride()


if backends.has_operators():

    @torch.library.register_fake("curveball_fused::update_")
    def _(params, z, r, scalars, group_sizes, lr, weight_decay, lr_tensor=None):  # type: ignore[no-untyped-def]
        return torch.empty_like(scalars)

    @torch.library.register_fake("curveball_fused::dots")
    def _(z, r):  # type: ignore[no-untyped-def]
        return z[0].new_empty(3, dtype=torch.float64)

    @torch.library.register_fake("curveball_fused::solve")
    def _(scalars, loss, products, dots, beta, rho, lr, lr_tensor=None):  # type: ignore[no-untyped-def]
        return torch.empty_like(scalars)

    @torch.library.register_fake("curveball_fused::adapt_damping")
    def _(scalars, new_loss, low, high, factor, minimum, maximum):  # type: ignore[no-untyped-def]
        return torch.empty_like(scalars)
