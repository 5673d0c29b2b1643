"""The tangent of scaled dot-product attention in Triton, without a matrix of scores in memory.

    S_ij = scale q_i.k_j + mask_ij,   P = softmax_j(S),   dS_ij = scale (dq_i.k_j + q_i.dk_j)
    dout_i = Σ_j P_ij (dS_ij v_j + dv_j) - (Σ_j P_ij dS_ij) out_i

A program has a block of queries and walks over blocks of keys once, with a running maximum of S as flash attention
does (Dao et al. 2022): the three sums, of exp(S - maximum) and of its products with dS and with dS v + dv, are kept
relative to it.

Sums are in float32, products of float32 in full precision; all is in float64 for float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curveball_fused.backends.dtypes import compute_dtype

from .reduce import TYPES
from .scalar import as_double


@triton.jit
def _dot(a, b, total):
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def _load(head, stride, rows, count, columns, width, PADDED: tl.constexpr):
    """Load a block of a head, rows [., 1] by columns [1, .]: zeros beyond `count` rows and, if PADDED, `width`."""
    inside = rows < count
    if PADDED:
        inside = inside & (columns < width)
    return tl.load(head + rows * stride + columns, inside, other=0.0)


@triton.jit
def _head(tensor, strides, b, h):
    """Return where head h of sample b begins."""
    return tensor + b * strides[0] + h * strides[1]


@triton.jit(do_not_specialize=["heads", "queries", "keys"])
def attention_kernel(
    dq,  # [batch, heads, queries, D]
    dk,  # [batch, heads, keys, D]
    dv,  # [batch, heads, keys, E]
    q,  # [batch, heads, queries, D]
    k,  # [batch, heads, keys, D]
    v,  # [batch, heads, keys, E]
    out,  # [batch, heads, queries, E]
    mask,  # [batch, heads, queries, keys] or None
    dout,  # [batch, heads, queries, E], written
    dq_strides,
    dk_strides,
    dv_strides,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    mask_strides,
    dout_strides,
    heads,
    queries,
    keys,
    scale: tl.float64,
    D: tl.constexpr,
    E: tl.constexpr,
    ACC: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Write dout for BLOCK_M queries of a head and BLOCK_E columns, by BLOCK_N keys, and BLOCK_D of D, at a time."""
    program, blocks = tl.program_id(0), tl.cdiv(queries, BLOCK_M)
    first = (blocks - 1 - program % blocks) * BLOCK_M  # the last queries, which see the most keys, begin first
    head, column_block = program // blocks // tl.cdiv(E, BLOCK_E), program // blocks % tl.cdiv(E, BLOCK_E)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    dq = _head(dq, dq_strides, b, h)
    dk = _head(dk, dk_strides, b, h)
    dv = _head(dv, dv_strides, b, h)
    q = _head(q, q_strides, b, h)
    k = _head(k, k_strides, b, h)
    v = _head(v, v_strides, b, h)
    out = _head(out, out_strides, b, h)
    dout = _head(dout, dout_strides, b, h)

    i = first.to(tl.int64) + tl.arange(0, BLOCK_M)[:, None]
    lane, column = tl.arange(0, BLOCK_D)[None, :], column_block * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    PADDED_D: tl.constexpr = D % BLOCK_D != 0
    PADDED_E: tl.constexpr = E % BLOCK_E != 0
    q_block = _load(q, q_strides[2], i, queries, lane, D, PADDED_D)
    dq_block = _load(dq, dq_strides[2], i, queries, lane, D, PADDED_D)
    factor = as_double(scale).to(ACC)

    # Of each query the maximum of S, and relative to it Σ P, Σ P dS and Σ P (dS v + dv).
    peak, total, d_total = tl.full((BLOCK_M,), float("-inf"), ACC), tl.zeros((BLOCK_M,), ACC), tl.zeros((BLOCK_M,), ACC)
    result = tl.zeros((BLOCK_M, BLOCK_E), ACC)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, first + BLOCK_M)
    for start in range(0, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N).to(tl.int64)
        rows = j[:, None]
        k_block = tl.trans(_load(k, k_strides[2], rows, keys, lane, D, PADDED_D))
        dk_block = tl.trans(_load(dk, dk_strides[2], rows, keys, lane, D, PADDED_D))
        scores = _dot(q_block, k_block, tl.zeros((BLOCK_M, BLOCK_N), ACC))
        d_scores = _dot(q_block, dk_block, _dot(dq_block, k_block, tl.zeros((BLOCK_M, BLOCK_N), ACC)))
        for begin in range(BLOCK_D, D, BLOCK_D):
            further = begin + lane
            q_more = _load(q, q_strides[2], i, queries, further, D, PADDED_D)
            dq_more = _load(dq, dq_strides[2], i, queries, further, D, PADDED_D)
            k_more = tl.trans(_load(k, k_strides[2], rows, keys, further, D, PADDED_D))
            dk_more = tl.trans(_load(dk, dk_strides[2], rows, keys, further, D, PADDED_D))
            scores = _dot(q_more, k_more, scores)
            d_scores = _dot(q_more, dk_more, _dot(dq_more, k_more, d_scores))
        scores, d_scores = scores * factor, d_scores * factor
        seen = j[None, :] < keys
        if mask is not None:
            pointers = _head(mask, mask_strides, b, h) + i * mask_strides[2] + j[None, :] * mask_strides[3]
            scores += tl.load(pointers, seen & (i < queries), other=0.0).to(ACC)
        if CAUSAL:
            seen = seen & (j[None, :] <= i)
        scores = tl.where(seen, scores, float("-inf"))

        top = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(top == float("-inf"), 0.0, top)  # all masked so far: -inf - -inf would be NaN
        shrink, p = tl.exp(peak - base), tl.exp(scores - base[:, None])
        # Both sums have P dS rounded alike, so that what cancels between them does, as where one key has all of P.
        pd = (p * d_scores).to(v.dtype.element_ty)
        peak, total, d_total = top, total * shrink + tl.sum(p, 1), d_total * shrink + tl.sum(pd.to(ACC), 1)
        v_block = _load(v, v_strides[2], rows, keys, column, E, PADDED_E)
        dv_block = _load(dv, dv_strides[2], rows, keys, column, E, PADDED_E)
        result = _dot(p.to(v_block.dtype), dv_block, result * shrink[:, None])
        result = _dot(pd, v_block, result)

    none = total == 0.0
    inverse = tl.where(none, 0.0, 1.0 / tl.where(none, 1.0, total))
    result -= d_total[:, None] * _load(out, out_strides[2], i, queries, column, E, PADDED_E).to(ACC)
    pointers = dout + i * dout_strides[2] + column
    tl.store(pointers, (result * inverse[:, None]).to(dout.dtype.element_ty), (i < queries) & (column < E))


@torch.no_grad()
def attention_tangent(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """Return dout, as `reference.tangents.attention_tangent` does, in one launch.

    All tensors are of one dtype, contiguous in the last dimension, and of any strides in the others.

    Args:
        dq: tangent of q, `[B, H, T, D]`.
        dk: tangent of k, `[B, H, S, D]`.
        dv: tangent of v, `[B, H, S, E]`.
        q: queries, `[B, H, T, D]`.
        k: keys, `[B, H, S, D]`.
        v: values, `[B, H, S, E]`.
        out: F.scaled_dot_product_attention(q, k, v, mask), `[B, H, T, E]`.
        mask: what is added to the scores, floating-point and expanded to `[B, H, T, S]`, or None.
        is_causal: hide the keys j > i from query i.
        scale: of q kᵀ.

    Returns:
        The tangent of out, `[B, H, T, E]`, in memory `[B, T, H, E]`; zero for a query from which all keys are masked.
    """
    batch, heads, queries, d = q.shape
    dout = q.new_empty((batch, queries, heads, v.shape[3])).transpose(1, 2)
    if dout.numel() == 0:
        return dout
    tensors = (dq, dk, dv, q, k, v, out, mask, dout)
    shape = shape_of(d, v.shape[3], q.element_size())
    column_blocks = triton.cdiv(v.shape[3], shape["BLOCK_E"])
    with torch.cuda.device_of(q):
        attention_kernel[(batch * heads * column_blocks * triton.cdiv(queries, shape["BLOCK_M"]),)](
            *tensors,
            *(None if t is None else t.stride() for t in tensors),
            heads,
            queries,
            k.shape[2],
            scale,
            D=d,
            E=v.shape[3],
            ACC=TYPES[compute_dtype(q.dtype)],
            CAUSAL=is_causal,
            **shape,
            enable_fp_fusion=True,
        )
    return dout


def shape_of(d: int, e: int, bytes: int) -> dict[str, int]:
    """Return sizes of blocks, warps and stages that fit the registers and the shared memory of each GPU, 99 KiB."""
    width_d, width_e = (max(triton.next_power_of_2(width), 16) for width in (d, e))
    if bytes == 2:
        block_d, block_e = width_d if width_d <= 128 else 64, min(width_e, 128)
        warps = 4 if max(block_d, block_e) <= 64 else 8
        return dict(BLOCK_M=64, BLOCK_N=32, BLOCK_D=block_d, BLOCK_E=block_e, num_warps=warps, num_stages=2)
    # Without tensor cores each thread holds its operands for the whole of the dimension that is summed over.
    size, widest = (32, 64) if bytes == 4 else (16, 32)
    return dict(
        BLOCK_M=size, BLOCK_N=size, BLOCK_D=min(width_d, 32), BLOCK_E=min(width_e, widest), num_warps=8, num_stages=2
    )
