"""The typed face of the tangent operators: each maps tangents of a function's arguments to the tangent of its result.

One pass over memory each, where torch needs a chain of calls. `reference_tangents` says in plain torch what they
compute. They run natively for float32 and float64 on the CPU, by Triton on a GPU, and in plain torch otherwise, which
is also what `backend="torch"` asks for.

All tensors lie on one device and have the dtype of x (of q), float16, bfloat16, float32 or float64; arithmetic is in
float64 for float64, else in float32. A tensor that does not fit the others raises ValueError, as does an unknown
backend; a named one that cannot run raises RuntimeError. Nothing here is differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curveball_fused import backends

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
    """The tangent of a layer norm, y = γ x̂ + β with x̂ = r (x - mean), or of an RMS norm, where `mean` is None.

    ẏ = γ r (ẋ - <ẋ> - x̂ <x̂ẋ>) + γ̇ x̂ + β̇, where <·> is the mean over a row; the term <ẋ> is absent for an RMS norm.

    Args:
        dx, x: `[N, D]`, contiguous.
        mean, rstd: the statistics of the rows, `[N]`, in float32 where x has half precision.
        weight, dweight, dbias: γ, γ̇, β̇, `[D]`; None stands for γ = 1 and for a zero tangent.

    Returns:
        ẏ, `[N, D]`.
    """
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(f"x must be contiguous [N, D]; it has shape {list(x.shape)} and strides {x.stride()}.")
    _check_like(x, dx=dx)
    _check_vectors(x, _statistics_dtype(x), x.shape[0], mean=mean, rstd=rstd)
    _check_vectors(x, x.dtype, x.shape[1], weight=weight, dweight=dweight, dbias=dbias)
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
    """The tangent of a batch norm, y = γ x̂ + β with x̂ = r (x - mean).

    ẏ = γ r (ẋ - <ẋ> - x̂ <x̂ẋ>) + γ̇ x̂ + β̇, where <·> is the mean over all of a channel, if the statistics are those of x
    (`training`); else ẏ = γ r ẋ + γ̇ x̂ + β̇.

    Args:
        dx, x: `[N, C, ...]`, both contiguous or both with the channel last in memory.
        mean, rstd: the statistics of the channels, `[C]`, in float32 where x has half precision.
        weight, dweight, dbias: γ, γ̇, β̇, `[C]`; None stands for γ = 1 and for a zero tangent.

    Returns:
        ẏ, laid out as x.
    """
    if x.dim() < 2 or not (x.is_contiguous() or x.movedim(1, -1).is_contiguous()):
        layout = f"shape {list(x.shape)} and strides {x.stride()}"
        raise ValueError(f"x must be [N, C, ...], contiguous or channels-last; it has {layout}.")
    _check_like(x, dx=dx)
    _check_vectors(x, _statistics_dtype(x), x.shape[1], mean=mean, rstd=rstd)
    _check_vectors(x, x.dtype, x.shape[1], weight=weight, dweight=dweight, dbias=dbias)
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
    """The tangent of scaled dot-product attention, out = P v with P = softmax(S) and S = scale q kᵀ + mask.

    Ȯ_i = Σ_j P_ij (Ṡ_ij v_j + v̇_j) - (Σ_j P_ij Ṡ_ij) out_i, with Ṡ = scale (q̇ kᵀ + q k̇ᵀ). A row that is masked
    throughout is zero. The kernels go over the keys once and never hold a matrix of scores.

    Args:
        dq, q: `[B, H, T, D]`; dk, k: `[B, H, S, D]`; dv, v: `[B, H, S, E]`; any strides, the last dimension contiguous.
        out: what the attention returned, `[B, H, T, E]`, likewise.
        mask: what is added to the scores, `[B, H, T, S]`, any strides, also those of an expanded tensor.
        is_causal: query i sees the keys up to i.

    Returns:
        Ȯ, `[B, H, T, E]`, which lies in memory as `[B, T, H, E]`.
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
        _check_shape(q, name, t, shape)
        if t.shape[3] > 1 and t.stride(3) != 1:
            raise ValueError(f"{name} is not contiguous in its last dimension: call .contiguous() on it first.")
    if mask is not None:
        _check_shape(q, "mask", mask, (batch, heads, queries, keys))
    result: Tensor = _kernels(backend, q).attention_tangent(dq, dk, dv, q, k, v, out, mask, is_causal, scale)
    return result


@torch.no_grad()
def activation(x: Tensor, name: str, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """y = f(x) and f'(x), each of x's shape, for the function of that name: "gelu", "gelu_tanh" or "silu".

    x may have any shape, but must be dense in memory. float32 results are right to a few units in the last place,
    those of the derivative near its root to a unit of 1.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"There is no activation {name!r}: choose one of {', '.join(map(repr, ACTIVATIONS))}.")
    if not x.is_contiguous() and torch.empty_like(x).stride() != x.stride():
        raise ValueError("x is not dense in memory (a strided or expanded view): call .contiguous() on it first.")
    y, derivative = _kernels(backend, x).activation(x, name)
    return y, derivative


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_like(x: Tensor, **others: Tensor) -> None:
    for name, t in others.items():
        if t.shape != x.shape or t.dtype != x.dtype or t.device != x.device:
            raise ValueError(
                f"{name} is {t.dtype}{list(t.shape)} on {t.device}, x is {x.dtype}{list(x.shape)} on {x.device}: they "
                "must agree."
            )
        if any(n > 1 and a != b for n, a, b in zip(x.shape, x.stride(), t.stride(), strict=True)):
            raise ValueError(f"{name} is laid out differently in memory from x: copy it into a torch.empty_like(x).")


def _check_shape(q: Tensor, name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if t.shape != shape or t.dtype != q.dtype or t.device != q.device:
        wanted = f"{q.dtype}{list(shape)} on {q.device}"
        raise ValueError(f"{name} must be {wanted}, to fit q, k and v; it is {t.dtype}{list(t.shape)} on {t.device}.")


def _check_vectors(x: Tensor, dtype: torch.dtype, size: int, **vectors: Tensor | None) -> None:
    for name, t in vectors.items():
        if t is None or (t.shape == (size,) and t.dtype == dtype and t.device == x.device and t.is_contiguous()):
            continue
        wanted = f"{dtype}[{size}] on {x.device}, contiguous"
        raise ValueError(f"{name} must be {wanted}; it is {t.dtype}{list(t.shape)} on {t.device}.")


def _kernels(backend: str, x: Tensor) -> Any:
    """What holds the operators that run for a tensor, called by position."""
    chosen = backends.choose(backend, x.device)
    if chosen == "cuda":  # which has none of its own
        chosen = "torch" if backends.why_not("triton", x.device) else "triton"
    if chosen == "cpu" and x.dtype not in (torch.float32, torch.float64):
        chosen = "torch"
    return backends.tangent_kernels(chosen)


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
