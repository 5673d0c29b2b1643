"""The typed face of the kernels: one function each, whatever backend runs it.

A backend's kernels are operators `torch.ops.curveball_fused.*`; `reference` says in plain torch what they compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends, reference


@torch.no_grad()
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
    _check_lists(params, z, r)
    if backends.choose(backend, coefficients.device) == "torch":
        return reference.update_(params, z, r, coefficients, lr, weight_decay)
    w_flat, z_flat, r_flat, copies = [], [], [], []
    for w_i, z_i, r_i in zip(params, z, r, strict=True):
        w_k, z_k = w_i, z_i
        if not _same_dense_layout(w_i, z_i):
            w_k, z_k = w_i.contiguous(), z_i.contiguous()
            copies += [(w_i, w_k), (z_i, z_k)]
        w_flat.append(w_k)
        z_flat.append(z_k)
        r_flat.append(r_i if _same_dense_layout(w_k, r_i) else torch.empty_like(w_k, dtype=r_i.dtype).copy_(r_i))
    rate, tensor = (0.0, lr) if isinstance(lr, Tensor) else (lr, None)
    z_dot_z: Tensor = torch.ops.curveball_fused.update_(
        w_flat, z_flat, r_flat, coefficients, rate, weight_decay, tensor
    )
    for original, copy in copies:
        original.copy_(copy)
    torch.autograd.graph.increment_version([*params, *z])  # so that a graph that still needs the old values says so
    return z_dot_z


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
    if backends.choose(backend, z[0].device) == "torch":
        return reference.dots(z, r)
    z_flat = [z_i if _same_dense_layout(z_i, z_i) else z_i.contiguous() for z_i in z]
    r_flat = [
        r_i if _same_dense_layout(z_i, r_i) else torch.empty_like(z_i, dtype=r_i.dtype).copy_(r_i)
        for z_i, r_i in zip(z_flat, r, strict=True)
    ]
    result: Tensor = torch.ops.curveball_fused.dots(z_flat, r_flat)
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
        scalars: float64, the values named by `reference.SCALARS`; not changed.
        loss: 0-dim, the minimised objective.
        products: float64 `[g·Jz, Jz·HJz, g·Jr, Jz·HJr, Jr·HJr]`.
        dots: float64 `[z·z, z·r, r·r]`, or None to take them from the adjoint identities.
        beta, rho: values fixed by the user.

    Returns:
        New scalars. A loss or product that is not finite gives β = ρ = NaN, by which `update_` leaves all as it is,
        and is counted in `skipped_steps`.
    """
    if backends.choose(backend, scalars.device) == "torch":
        return reference.solve(scalars, loss, products, dots, beta, rho, lr)
    rate, tensor = (0.0, lr) if isinstance(lr, Tensor) else (lr, None)
    result: Tensor = torch.ops.curveball_fused.solve(scalars, loss, products, dots, beta, rho, rate, tensor)
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
    if backends.choose(backend, scalars.device) == "torch":
        return reference.adapt_damping(scalars, new_loss, low, high, factor, minimum, maximum)
    result: Tensor = torch.ops.curveball_fused.adapt_damping(scalars, new_loss, low, high, factor, minimum, maximum)
    return result


def _check_lists(first: Sequence[Tensor], *others: Sequence[Tensor]) -> None:
    for other in others:
        if len(other) != len(first):
            raise ValueError(f"the lists must have the same length; got {len(first)} and {len(other)} tensors.")
        for i, (a, b) in enumerate(zip(first, other, strict=True)):
            if a.shape != b.shape:
                raise ValueError(f"tensor {i} has shape {tuple(a.shape)} in one list and {tuple(b.shape)} in another.")


def _same_dense_layout(a: Tensor, b: Tensor) -> bool:
    """Whether both fill their memory without gaps, in the same order, so that a flat walk pairs their elements."""
    if a.is_contiguous():
        return b.is_contiguous()
    # empty_like keeps the strides of a tensor exactly if it is dense and does not overlap itself.
    return a.stride() == b.stride() and a.stride() == torch.empty_like(a, device="meta").stride()


if backends.choose("auto", torch.device("cpu")) == "cpu":

    @torch.library.register_fake("curveball_fused::update_")
    def _(params, z, r, coefficients, lr, weight_decay, lr_tensor=None):  # type: ignore[no-untyped-def]
        return coefficients.new_empty(())

    @torch.library.register_fake("curveball_fused::dots")
    def _(z, r):  # type: ignore[no-untyped-def]
        return z[0].new_empty(3, dtype=torch.float64)

    @torch.library.register_fake("curveball_fused::solve")
    def _(scalars, loss, products, dots, beta, rho, lr, lr_tensor=None):  # type: ignore[no-untyped-def]
        return torch.empty_like(scalars)

    @torch.library.register_fake("curveball_fused::adapt_damping")
    def _(scalars, new_loss, low, high, factor, minimum, maximum):  # type: ignore[no-untyped-def]
        return torch.empty_like(scalars)
