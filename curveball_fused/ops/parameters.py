"""The typed face of the kernels: one function each, whatever backend runs it.

A backend's kernels are operators `torch.ops.curveball_fused.*`; `reference` says in plain torch what they compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curveball_fused import backends
from curveball_fused.backends.scalars import SCALARS, Z_DOT_Z


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
    """The parameter step in one pass: z ← (ρ-βλ) z - β r;  w ← (1 - lr·weight_decay) w + lr z.

    Args:
        params: w, float16, bfloat16, float32 or float64, of any shapes and strides; written.
        z: state of the same shapes; float64 for float64 parameters, else float32; written.
        r: Jᵀc, of the parameters' shapes and dtypes.
        coefficients: float64, its first elements are β, ρ and λ. Where β or ρ is not finite, w and z stay untouched.
        lr: number or 0-dim tensor.

    Returns:
        z·z of the new z, 0-dim float64.

    Raises:
        ValueError: lengths or shapes differ, or `backend` is unknown.
        RuntimeError: a dtype is not supported, or the named backend cannot run.
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
    """`update_` for all parameter groups at once, from scalars to scalars.

    Args:
        params, z, r: as in `update_`, the groups' tensors one after another.
        scalars: float64, the values named by `backends.scalars.SCALARS`; not changed.
        group_sizes, lr, weight_decay: for each group how many tensors it has, its rate (number or 0-dim tensor) and its
            decay.

    Returns:
        New scalars: z·z is that of the new z, and where the rates differ, the predicted change is that of the mean rate
        Σ lr_g z_g·z_g / z·z.

    Raises:
        ValueError, RuntimeError: as `update_`.
    """
    _check_lists(params, z, r)
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
    """`[z·z, z·r, r·r]` over two lists of tensors in one pass, float64, summed in a fixed order.

    Raises:
        ValueError: lengths or shapes differ, or `backend` is unknown.
        RuntimeError: a dtype is not supported, or the named backend cannot run.
    """
    _check_lists(z, r)
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
    """β and ρ of this step in closed form; see `reference.solve`.

    Args:
        scalars: float64, the values named by `backends.scalars.SCALARS`; not changed.
        loss: 0-dim, the minimized objective.
        products: float64 `[g·Jz, Jz·HJz, g·Jr, Jz·HJr, Jr·HJr]`.
        dots: float64 `[z·z, z·r, r·r]`, or None to take them from the adjoint identities.
        beta, rho: values fixed by the user.

    Returns:
        New scalars. A loss or product that is not finite gives β = ρ = NaN, by which `update_` leaves all as it is,
        and is counted in `skipped_steps`.
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
    """λ by the ratio γ of actual to predicted change (Levenberg-Marquardt's rule); see `reference.adapt_damping`."""
    kernels = backends.kernels(backends.choose(backend, scalars.device))
    result: Tensor = kernels.adapt_damping(scalars, new_loss, low, high, factor, minimum, maximum)
    return result


def _check_lists(first: Sequence[Tensor], *others: Sequence[Tensor]) -> None:
    shapes = [t.shape for t in first]
    for other in others:
        if [t.shape for t in other] == shapes:
            continue
        if len(other) != len(first):
            raise ValueError(f"the lists must have the same length; got {len(first)} and {len(other)} tensors.")
        i = next(i for i, t in enumerate(other) if t.shape != shapes[i])
        raise ValueError(f"tensor {i} has shape {tuple(shapes[i])} in one list and {tuple(other[i].shape)} in another.")


def _rates(lr: Sequence[float | Tensor], device: torch.device) -> tuple[list[float], Tensor | None]:
    """The groups' rates as numbers, and, where one of them is a tensor, all of them as a vector on the device."""
    # Reading a tensor that is on the host already has nobody wait.
    lr = [float(r) if isinstance(r, Tensor) and r.device.type == "cpu" != device.type else r for r in lr]
    if not any(isinstance(rate, Tensor) for rate in lr):
        return [float(rate) for rate in lr], None
    if len(lr) == 1:
        return [0.0], torch.as_tensor(lr[0]).reshape(1)
    filled = [r if isinstance(r, Tensor) else torch.full((), r, dtype=torch.float64, device=device) for r in lr]
    return [0.0] * len(lr), torch.stack([rate.reshape(()).double() for rate in filled])


def _same_dense_layout(a: Tensor, b: Tensor) -> bool:
    """Whether both fill their memory without gaps, in the same order, so that a flat walk pairs their elements."""
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
