"""Rules for matrices of distances, and the same distances of functions that torch can differentiate twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .context import Rule, RuleContext, Tangents, tangent_at

_BY_PRODUCTS, _BY_DIFFERENCES = "use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist"
# Up to this number of rows, torch computes Euclidean distances from differences unless told otherwise.
_FEW = 25


def cdist(ctx: RuleContext, x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = "") -> Any:
    """d = |a - b| for each pair of rows;  ḋ = <∂|a - b|, ȧ - ḃ>, but zero where d is."""
    at_a, at_b, a, b = ctx.tangent_index(x1), ctx.tangent_index(x2), ctx.save(x1), ctx.save(x2)
    by_products = _by_products(x1, x2, p, compute_mode)
    output = torch.cdist(x1, x2, p, *[compute_mode] * bool(compute_mode))
    d = ctx.save(output)

    def tangent_map(tangents: Tangents) -> Tensor:
        da, db = tangent_at(tangents, at_a), tangent_at(tangents, at_b)
        with torch.autocast(d.device.type, enabled=False):  # which leaves distances in float32
            wide_a, wide_b = a.to(d.dtype), b.to(d.dtype)
            da, db = None if da is None else da.to(d.dtype), None if db is None else db.to(d.dtype)
            if by_products:
                return _euclidean(wide_a, wide_b, da, db).div_(d).masked_fill_(d == 0, 0)
            slopes = _slopes(wide_a.unsqueeze(-2) - wide_b.unsqueeze(-3), d.unsqueeze(-1), p)
            moved: Any = 0 if da is None else da.unsqueeze(-2)
            tangent: Tensor = (slopes * (moved if db is None else moved - db.unsqueeze(-3))).sum(-1)
            return tangent

    return output, tangent_map


def _by_products(x1: Tensor, x2: Tensor, p: float, compute_mode: str) -> bool:
    """Return whether torch computes the distances from products of matrices, whose memory is that of the result."""
    many = max(x1.shape[-2], x2.shape[-2]) > _FEW
    return p == 2 and (compute_mode == _BY_PRODUCTS or (many and compute_mode != _BY_DIFFERENCES))


def _euclidean(a: Tensor, b: Tensor, da: Tensor | None, db: Tensor | None) -> Tensor:
    """Return <a - b, ȧ - ḃ> for each pair of rows."""
    by_a: Any = 0 if da is None else (a * da).sum(-1).unsqueeze(-1) - da @ b.mT
    by_b: Any = 0 if db is None else (b * db).sum(-1).unsqueeze(-2) - a @ db.mT
    total: Tensor = by_a + by_b
    return total


def pdist(ctx: RuleContext, input: Tensor, p: float = 2.0) -> Any:
    """d = |a - b| for each two rows;  ḋ as that of `cdist`."""
    at, x, output = ctx.tangent_index(input), ctx.save(input), torch.pdist(input, p)
    d = ctx.save(output)

    def tangent_map(tangents: Tangents) -> Tensor:
        with torch.autocast(d.device.type, enabled=False):
            slopes = _slopes(_differences(x.to(d.dtype)), d.unsqueeze(-1), p)
            return (slopes * _differences(tangents[at].to(d.dtype))).sum(-1)  # type: ignore[index,union-attr]

    return output, tangent_map


def _differences(x: Tensor) -> Tensor:
    """Return the differences of each two rows, in the order of `torch.pdist`."""
    first, second = torch.triu_indices(x.shape[0], x.shape[0], 1, device=x.device)
    return x[first] - x[second]


def _slopes(difference: Tensor, distance: Tensor, p: float) -> Tensor:
    """Return the derivative of |difference|ₚ, as torch's backward pass has it."""
    if p == 0:
        return torch.zeros_like(difference)
    size = difference.abs()
    if p == float("inf"):
        return difference.sign().masked_fill_(size != distance, 0)
    slopes = difference.sign() * (size / distance).pow_(p - 1)
    return slopes.masked_fill_((distance == 0) | (difference == 0), 0)


def cdist_by_differences(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = "") -> Tensor:
    """Return `torch.cdist`, whose backward pass torch can differentiate where it is of products only."""
    if _by_products(x1, x2, p, compute_mode):
        return torch.cdist(x1, x2, p, _BY_PRODUCTS)
    return _norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def pdist_by_differences(input: Tensor, p: float = 2.0) -> Tensor:
    """Return `torch.pdist`."""
    return _norm(_differences(input), p)


def _norm(difference: Tensor, p: float) -> Tensor:
    """Return the norm over the last dimension, whose derivatives are zero where it is zero."""
    zero = (difference == 0).all(-1)
    away_from_zero = difference.masked_fill(zero.unsqueeze(-1), 1)
    norm: Tensor = torch.linalg.vector_norm(away_from_zero, p, dim=-1)
    return norm.masked_fill(zero, 0)


RULES: dict[Any, Rule] = {torch.cdist: cdist, torch.pdist: pdist}
TWICE_DIFFERENTIABLE: dict[Any, Any] = {torch.cdist: cdist_by_differences, torch.pdist: pdist_by_differences}
