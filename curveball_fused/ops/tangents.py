"""The tangent operators: each maps tangents of a function's arguments to the tangent of its result.

One pass over memory each, where torch needs a chain of calls. `backends.reference.tangents` says in plain torch what
they compute. `backend="auto"` takes the best that has a kernel for the device and dtype: Triton on a GPU, the native
library for float32 and float64 on the CPU, else plain torch. A backend that is named runs or raises RuntimeError:
"triton", "cpu" and "torch" stand for these three, and the CUDA library has no tangents.

All tensors lie on one device and have the dtype of x (of q), float16, bfloat16, float32 or float64; arithmetic is in
float64 for float64, else in float32. Nothing here is differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curveball_fused import backends
from curveball_fused.backends.dtypes import compute_dtype

from ._checks import check_like, check_shape, check_strides, check_vectors

ACTIVATIONS = ("gelu", "gelu_tanh", "silu")


@torch.no_grad()
def layer_norm_tangent(
    dx: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None = None,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Return the tangent of a layer norm, y = γ x̂ + β with x̂ = r (x - mean); of an RMS norm, where `mean` is None.

    ẏ = γ r (ẋ - <ẋ> - x̂ <x̂ẋ>) + γ̇ x̂ + β̇, where <·> is the mean over a row; the term <ẋ> is absent for an RMS norm.

    Args:
        dx: ẋ, like x.
        x: `[N, D]`, contiguous.
        mean: mean of each row, `[N]`, in float32 where x has half precision; None for an RMS norm.
        rstd: r, the reciprocal standard deviation of each row, likewise.
        weight: γ, `[D]`, of x's dtype, contiguous; None (default) for ones.
        dweight: γ̇, likewise; None (default) for zeros.
        dbias: β̇, likewise; None (default) for zeros.
        backend: "auto" (default), "triton", "cpu" or "torch", as in the module's text.

    Returns:
        ẏ, `[N, D]`.

    Raises:
        ValueError: a tensor does not fit the others, or `backend` is unknown.

    Example::

        y, mean, rstd = torch.native_layer_norm(x, (x.shape[1],), weight, bias, 1e-5)
        dy = ops.tangents.layer_norm_tangent(dx, x, mean[:, 0], rstd[:, 0], weight, dweight, dbias)
    """
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(f"x must be contiguous [N, D]; it has shape {list(x.shape)} and strides {x.stride()}.")
    check_like(x, dx=dx)
    check_strides(x, dx=dx)
    check_vectors(x, compute_dtype(x.dtype), x.shape[0], mean=mean, rstd=rstd)
    check_vectors(x, x.dtype, x.shape[1], weight=weight, dweight=dweight, dbias=dbias)
    result: Tensor = _kernels(backend, x).layer_norm_tangent(dx, x, mean, rstd, weight, dweight, dbias)
    return result


@torch.no_grad()
def batch_norm_tangent(
    dx: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    *,
    training: bool,
    backend: str = "auto",
) -> Tensor:
    """Return the tangent of a batch norm, y = γ x̂ + β with x̂ = r (x - mean).

    ẏ = γ r (ẋ - <ẋ> - x̂ <x̂ẋ>) + γ̇ x̂ + β̇, where <·> is the mean over all of a channel, if the statistics are those of x
    (`training`); else ẏ = γ r ẋ + γ̇ x̂ + β̇.

    Args:
        dx: ẋ, like x, and laid out as it.
        x: `[N, C, ...]`, contiguous or with the channel last in memory.
        mean: mean of each channel, `[C]`, in float32 where x has half precision.
        rstd: r, the reciprocal standard deviation of each channel, likewise.
        weight: γ, `[C]`, of x's dtype, contiguous; None (default) for ones.
        dweight: γ̇, likewise; None (default) for zeros.
        dbias: β̇, likewise; None (default) for zeros.
        training: whether mean and rstd are the statistics of x, which move with it, or constants.
        backend: "auto" (default), "triton", "cpu" or "torch", as in the module's text.

    Returns:
        ẏ, laid out as x.

    Raises:
        ValueError: a tensor does not fit the others, or `backend` is unknown.

    Example::

        mean, rstd = x.mean((0, 2, 3)), (x.var((0, 2, 3), unbiased=False) + 1e-5).rsqrt()
        dy = ops.tangents.batch_norm_tangent(dx, x, mean, rstd, weight, dweight, dbias, training=True)
    """
    if x.dim() < 2 or not (x.is_contiguous() or x.movedim(1, -1).is_contiguous()):
        layout = f"shape {list(x.shape)} and strides {x.stride()}"
        raise ValueError(f"x must be [N, C, ...], contiguous or channels-last; it has {layout}.")
    check_like(x, dx=dx)
    check_strides(x, dx=dx)
    check_vectors(x, compute_dtype(x.dtype), x.shape[1], mean=mean, rstd=rstd)
    check_vectors(x, x.dtype, x.shape[1], weight=weight, dweight=dweight, dbias=dbias)
    result: Tensor = _kernels(backend, x).batch_norm_tangent(dx, x, mean, rstd, weight, dweight, dbias, training)
    return result


@torch.no_grad()
def attention_tangent(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float,
    backend: str = "auto",
) -> Tensor:
    """Return the tangent of scaled dot-product attention, out = P v with P = softmax(S) and S = scale q kᵀ + mask.

    Ȯ_i = Σ_j P_ij (Ṡ_ij v_j + v̇_j) - (Σ_j P_ij Ṡ_ij) out_i, with Ṡ = scale (q̇ kᵀ + q k̇ᵀ). A row that is masked
    throughout is zero. The kernels go over the keys once and never hold a matrix of scores.

    Args:
        dq: q̇, `[B, H, T, D]`, of any strides but contiguous in the last dimension, as all but the mask.
        dk: k̇, `[B, H, S, D]`.
        dv: v̇, `[B, H, S, E]`.
        q: queries, `[B, H, T, D]`.
        k: keys, `[B, H, S, D]`.
        v: values, `[B, H, S, E]`.
        out: what the attention returned, `[B, H, T, E]`.
        mask: what is added to the scores, `[B, H, T, S]`, any strides, also those of an expanded tensor; None
            (default) for nothing.
        is_causal: whether query i sees only the keys up to i (default: False).
        scale: of the scores, usually 1/√D.
        backend: "auto" (default), "triton", "cpu" or "torch", as in the module's text.

    Returns:
        Ȯ, `[B, H, T, E]`, which lies in memory as `[B, T, H, E]`.

    Raises:
        ValueError: a tensor does not fit the others, or `backend` is unknown.

    Example::

        out = F.scaled_dot_product_attention(q, k, v)
        dout = ops.tangents.attention_tangent(dq, dk, dv, q, k, v, out, scale=q.shape[-1] ** -0.5)
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError("q, k and v must be [B, H, T, D], [B, H, S, D] and [B, H, S, E].")
    (batch, heads, queries, depth), keys, width = q.shape, k.shape[2], v.shape[3]
    shapes = (batch, heads, queries, depth), (batch, heads, keys, depth), (batch, heads, keys, width)
    for name, t, shape in zip(
        ("q", "k", "v", "dq", "dk", "dv", "out"),
        (q, k, v, dq, dk, dv, out),
        (*shapes, *shapes, (batch, heads, queries, width)),
        strict=True,
    ):
        check_shape(q, name, t, shape)
        if t.shape[3] > 1 and t.stride(3) != 1:
            raise ValueError(f"{name} is not contiguous in its last dimension: call .contiguous() on it first.")
    if mask is not None:
        check_shape(q, "mask", mask, (batch, heads, queries, keys))
    result: Tensor = _kernels(backend, q).attention_tangent(dq, dk, dv, q, k, v, out, mask, is_causal, scale)
    return result


@torch.no_grad()
def activation(x: Tensor, name: str, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Return y = f(x) and f'(x) for an activation f, whose tangent is ẏ = f'(x) ẋ.

    float32 results are right to a few units in the last place, those of the derivative near its root to a unit of 1.

    Args:
        x: of any shape, dense in memory.
        name: "gelu", "gelu_tanh" (its approximation) or "silu".
        backend: "auto" (default), "triton", "cpu" or "torch", as in the module's text.

    Returns:
        y and f'(x), both like x.

    Raises:
        ValueError: `name` is not one of these, `x` is not dense, or `backend` is unknown.

    Example::

        y, derivative = ops.tangents.activation(x, "gelu")
        dy = derivative * dx
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"There is no activation {name!r}: choose one of {', '.join(map(repr, ACTIVATIONS))}.")
    if not x.is_contiguous() and torch.empty_like(x).stride() != x.stride():
        raise ValueError("x is not dense in memory (a strided or expanded view): call .contiguous() on it first.")
    y, derivative = _kernels(backend, x).activation(x, name)
    return y, derivative


def _kernels(backend: str, x: Tensor) -> Any:
    """Return what holds the operators that run for a tensor, called by position."""
    return backends.tangent_kernels(backends.choose_tangents(backend, x.device, x.dtype))


if backends.has_operators():

    @torch.library.register_fake("curveball_fused::layer_norm_tangent")
    def _(dx, x, mean, rstd, weight, dweight, dbias):  # type: ignore[no-untyped-def]
        return torch.empty_like(x)

    @torch.library.register_fake("curveball_fused::batch_norm_tangent")
    def _(dx, x, mean, rstd, weight, dweight, dbias, training):  # type: ignore[no-untyped-def]
        return torch.empty_like(x)

    @torch.library.register_fake("curveball_fused::attention_tangent")
    def _(dq, dk, dv, q, k, v, out, mask, is_causal, scale):  # type: ignore[no-untyped-def]
        batch, heads, queries, _ = q.shape
        return q.new_empty((batch, queries, heads, v.shape[3])).transpose(1, 2)

    @torch.library.register_fake("curveball_fused::activation")
    def _(x, name):  # type: ignore[no-untyped-def]
        return torch.empty_like(x), torch.empty_like(x)
