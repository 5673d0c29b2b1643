"""Rules for attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curveball_fused import _torch_private
from curveball_fused.ops import tangents as tangent_ops

from .context import Rule, RuleContext, Tangents


def scaled_dot_product_attention(
    ctx: RuleContext,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """O = P V with P = softmax(s Q Kᵀ + mask); `tangent_ops.attention_tangent` has the equation."""
    # P, larger than all else that the map would read, is computed anew, block by block.
    at_q, at_k, at_v = ctx.tangent_index(query), ctx.tangent_index(key), ctx.tangent_index(value)
    if (
        at_q is None
        or at_k is None
        or at_v is None
        or dropout_p > 0
        or enable_gqa
        or ctx.tangent_index(attn_mask) is not None
    ):
        return NotImplemented
    if query.dim() < 3 or not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return NotImplemented
    output = F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale=scale)
    dtype = output.dtype  # which autocast may have chosen
    q, k, v, out = (_heads(ctx.save(t).to(dtype)) for t in (query, key, value, output))
    mask = None if attn_mask is None else _additive(ctx.save(attn_mask), query, key).to(dtype)
    options: dict[str, Any] = dict(
        is_causal=is_causal, scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale
    )
    shape = output.shape

    def tangent_map(tangents: Tangents) -> Tensor:
        dq, dk, dv = (_heads(tangents[place].to(dtype)) for place in (at_q, at_k, at_v))  # type: ignore[union-attr]
        tangent = tangent_ops.attention_tangent(dq, dk, dv, q, k, v, out, mask, backend=ctx.backend, **options)
        return tangent.view(shape)

    return output, tangent_map


def _heads(t: Tensor) -> Tensor:
    """Return `t` as [batch, heads, rows, columns], the last dimension contiguous."""
    t = t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
    return t if t.dim() == 4 else t.unsqueeze(0) if t.dim() == 3 else t.flatten(0, -4)


def _additive(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return what is added to the scores, expanded to [batch, heads, queries, keys]."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -math.inf)
    mask = mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    return mask if mask.dim() == 4 else mask.unsqueeze(0) if mask.dim() == 3 else mask.flatten(0, -4)


def decomposed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by torch functions that have rules: with dropout, and in what other case is left."""
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    s = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query @ key.mT * s
    if is_causal:
        unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores = scores.masked_fill(unseen, -math.inf)
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    # Zero, as torch's kernels give it, for a row that is masked throughout.
    p = torch.softmax(scores, -1) if attn_mask is None else _torch_private.safe_softmax(scores, -1)
    return F.dropout(p, dropout_p) @ value


RULES: dict[Any, Rule] = {F.scaled_dot_product_attention: scaled_dot_product_attention}
COMPOSITES: dict[Any, Callable[..., Tensor]] = {F.scaled_dot_product_attention: decomposed_attention}
