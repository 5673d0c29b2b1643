"""The rule for sums, means and maxima of rows of a table, and the same of functions that are twice differentiable."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .context import Rule, RuleContext, Tangents, tangent_at


class _Bags(NamedTuple):
    """Which rows are in which bag: `input`, `offsets` and options of `F.embedding_bag`."""

    rows: Tensor
    starts: Tensor
    mode: str
    include_last_offset: bool
    padding_idx: int | None

    def pool(self, weight: Tensor, factors: Tensor | None, mode: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """Return the pooled rows; for maxima, also how many rows each bag has, and which row each element is of."""
        number = ("sum", "mean", "max").index(mode or self.mode)
        options = (False, number, False, factors, self.include_last_offset, self.padding_idx)
        output, _, sizes, rows = torch.embedding_bag(weight, self.rows, self.starts, *options)
        return output, sizes, rows


def _bags(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> _Bags | None:
    """Return the bags of a call of `F.embedding_bag`; None for one that is left to torch."""
    usual = not input.is_floating_point() and not input.is_nested and weight.dim() == 2
    if not usual or max_norm is not None or scale_grad_by_freq or sparse:
        return None
    if per_sample_weights is not None and (mode != "sum" or per_sample_weights.shape != input.shape):
        return None
    if input.dim() == 2 and offsets is None and input.shape[1] > 0:
        starts = torch.arange(0, input.numel(), input.shape[1], dtype=input.dtype, device=input.device)
        return _Bags(input.reshape(-1), starts, mode, False, padding_idx)
    if input.dim() != 1 or offsets is None or offsets.dim() != 1:
        return None
    return _Bags(input, offsets, mode, include_last_offset, padding_idx)


def embedding_bag(ctx: RuleContext, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    """y = a sum or mean of rows of W, with factors s;  ẏ = that of rows of Ẇ, and of W with ṡ; a maximum is a row's."""
    bags, factors = _bags(input, weight, *args, **kwargs), _factors(args, kwargs)
    if bags is None:
        return NotImplemented
    at_w, at_s, w = ctx.tangent_index(weight), ctx.tangent_index(factors), ctx.save(weight)
    s = None if factors is None else ctx.save(factors).reshape(-1)
    ctx.save(input)
    kept = bags._replace(rows=bags.rows.detach(), starts=ctx.save(bags.starts))
    output, sizes, rows = bags.pool(weight, None if factors is None else factors.reshape(-1))

    def tangent_map(tangents: Tangents) -> Tensor:
        dw, ds = tangent_at(tangents, at_w), tangent_at(tangents, at_s)
        if bags.mode == "max":
            return _rows(dw, rows, sizes)  # type: ignore[arg-type]
        by_w = None if dw is None else kept.pool(dw, s)[0]
        by_s = None if ds is None else kept.pool(w, ds.reshape(-1))[0]
        return by_s if by_w is None else by_w if by_s is None else by_w + by_s  # type: ignore[return-value]

    return output, tangent_map


def _factors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return `per_sample_weights`."""
    return kwargs.get("per_sample_weights", args[6] if len(args) > 6 else None)


def _rows(weight: Tensor, rows: Tensor, sizes: Tensor) -> Tensor:
    """Return the elements of the table at which each bag has its maximum; zero for an empty bag."""
    return weight.gather(0, rows).masked_fill((sizes == 0).unsqueeze(-1), 0)


def embedding_bag_by_rows(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return `F.embedding_bag`, by `F.embedding`."""
    bags, factors = _bags(input, weight, *args, **kwargs), _factors(args, kwargs)
    if bags is None:
        return F.embedding_bag(input, weight, *args, **kwargs)
    if bags.mode == "max":
        with torch.no_grad():
            _, sizes, rows = bags.pool(weight, None)
        return _rows(weight, rows, sizes)
    index, starts = bags.rows, bags.starts[:-1] if bags.include_last_offset else bags.starts
    bag = torch.bucketize(torch.arange(len(index), device=index.device), starts, right=True) - 1
    counted = torch.ones_like(index, dtype=weight.dtype)
    if bags.padding_idx is not None:
        counted = (index != bags.padding_idx % weight.shape[0]).to(weight.dtype)
    factor = counted if factors is None else counted * factors.reshape(-1)
    sums = weight.new_zeros(len(starts), weight.shape[1]).index_add(0, bag, weight[index] * factor.unsqueeze(-1))
    if bags.mode == "sum":
        return sums
    sizes = weight.new_zeros(len(starts)).index_add(0, bag, counted)
    return sums / sizes.clamp(min=1).unsqueeze(-1)


RULES: dict[Any, Rule] = {F.embedding_bag: embedding_bag}
TWICE_DIFFERENTIABLE: dict[Any, Any] = {F.embedding_bag: embedding_bag_by_rows}
