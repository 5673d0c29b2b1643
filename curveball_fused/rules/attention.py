"""Rules for attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Call, Rule, Tangents


def scaled_dot_product_attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """S = s Q Kᵀ + mask, P = softmax(S), O = P V;  Ṡ = s (Q̇ Kᵀ + Q K̇ᵀ), Ṗ = P (Ṡ - <P, Ṡ>), Ȯ = Ṗ V + P V̇.

    P is computed anew by each map: it is larger than all else that the map reads.
    """
    at_q, at_k, at_v = call.at(query), call.at(key), call.at(value)
    if at_q is None or at_k is None or at_v is None or dropout_p > 0 or enable_gqa or call.at(attn_mask) is not None:
        return NotImplemented
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return NotImplemented
    s = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    output = F.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale=scale)
    q, k, v = (call.keep(t) for t in (query, key, value))
    given = None if attn_mask is None else call.keep(attn_mask)

    def tangent_map(tangents: Tangents) -> Tensor:
        dq, dk, dv = tangents[at_q], tangents[at_k], tangents[at_v]
        q3, dq3, k3, dk3, v3, dv3 = (t.reshape(-1, *t.shape[-2:]) for t in (q, dq, k, dk, v, dv))  # type: ignore[union-attr]
        scores = torch.baddbmm(_additive_mask(q, k, given, is_causal), q3, k3.mT, alpha=s)
        # torch's kernels give zero for a row that is masked throughout, which only a given mask can bring about.
        p = torch.softmax(scores, -1) if given is None else torch._safe_softmax(scores, -1)
        d_scores = torch.baddbmm(scores, dq3, k3.mT, beta=0, alpha=s, out=scores).baddbmm_(q3, dk3.mT, alpha=s)
        dp = torch._softmax_backward_data(d_scores, p, -1, p.dtype)
        return torch.bmm(dp, v3).baddbmm_(p, dv3).view(*q.shape[:-1], v.shape[-1])

    return output, tangent_map


def _additive_mask(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """What is added to the scores, broadcast to (batch, rows, columns)."""
    shape = (*q.shape[:-1], k.shape[-2])
    if is_causal:
        mask = torch.full(shape[-2:], -math.inf, dtype=q.dtype, device=q.device).triu_(1)
    elif mask is None:
        mask = q.new_zeros(())
    elif mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
    return mask.expand(shape).reshape(-1, *shape[-2:])


def written_out(
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
    p = torch.softmax(scores, -1) if attn_mask is None else torch._safe_softmax(scores, -1)
    return F.dropout(p, dropout_p) @ value


RULES: dict[Any, Rule] = {F.scaled_dot_product_attention: scaled_dot_product_attention}
COMPOSITES: dict[Any, Callable[..., Tensor]] = {F.scaled_dot_product_attention: written_out}
