"""The tangent maps of a call that has no rule: by torch's forward mode, or by the call's backward pass.

Jᵀu of one call is linear in u, so its derivative with respect to u, pulled back from ẋ, is Jẋ. That takes longer than
forward mode, but for one call only; and it is the transpose of the backward pass whatever that computes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from curveball_fused._torch_private import dual_level

from .arguments import map_nested
from .rules import Map, RuleContext, Tangents, snapshot
from .torch_modes import Decompose, ForwardModeUnsupported, first_line, transposes_disagree

# How a call is followed.
DUAL_NUMBERS, DOUBLE_BACKWARD = "dual numbers", "double backward"

# What to use in the place of functions that torch cannot differentiate twice, by their names.
REPLACEMENTS = {
    "ctc_loss": "the sums over alignments written with `torch.logaddexp`",
    "embedding_bag": "`F.embedding` and `mean`, `sum` or `amax`",
    "linear_cross_entropy": "`F.linear` and `F.cross_entropy`",
    "multi_margin_loss": "`F.relu(margin + x - x.gather(1, y[:, None]))`, summed over the other classes",
    "multilabel_margin_loss": "`F.relu(1 + x[:, None] - x[:, :, None])`, summed over pairs of labels",
    "segment_reduce": "`torch.index_add` or `torch.scatter_reduce`",
    "triangular_solve": "`torch.linalg.solve_triangular`",
}


class CallMaps:
    """ẏ = ∂f ẋ for one call of f, which runs again in each product.

    Attributes:
        followed_by: by dual numbers, until they turn out not to do.
    """

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], ctx: RuleContext) -> None:
        self._func = func
        self._slots: dict[int, int] = {}  # of the kept tensors that have a tangent, by their identities
        self._kept: dict[int, Tensor] = {}  # by their slots

        def keep(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return snapshot(value)
            kept, slot = ctx.save(value), ctx.tangent_index(value)
            if slot is not None:
                self._slots[id(kept)] = slot
                self._kept[slot] = kept
            return kept

        self._args, self._kwargs = map_nested(keep, args), map_nested(keep, kwargs)
        self._lacks = ""  # why dual numbers did not do
        self.followed_by = DOUBLE_BACKWARD if transposes_disagree(func, args, kwargs) else DUAL_NUMBERS

    def map_of(self, index: int | None) -> Map:
        """Return the map of the result, or of one of several."""
        return partial(self._tangent, index)

    def try_maps(self, result: Any) -> None:
        """Compute the tangents of a result once, so that `followed_by` is final; raise where there is no way to."""
        zeros: Any = {slot: torch.zeros_like(kept) for slot, kept in self._kept.items()}
        several = not isinstance(result, Tensor)
        for index, one in enumerate(result if several else (result,)):
            if isinstance(one, Tensor) and one.requires_grad:
                self._tangent(index if several else None, zeros)

    def _tangent(self, index: int | None, tangents: Tangents) -> Tensor:
        if self.followed_by == DUAL_NUMBERS:
            try:
                tangent = self._by_dual_numbers(index, tangents)
            except torch.OutOfMemoryError:
                raise
            except (NotImplementedError, RuntimeError) as error:
                self._lacks = first_line(error)
            else:
                if tangent is not None:
                    return tangent
                # The result requires a gradient, so that a tangent that does not come is lost, unless it is zero.
                self._lacks = "torch's forward mode loses its tangent"
            self.followed_by = DOUBLE_BACKWARD
        try:
            return self._by_double_backward(index, tangents)
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError) as error:
            raise ForwardModeUnsupported((self._lacks or first_line(error)) + self._way_out()) from error

    def _way_out(self) -> str:
        name = str(getattr(self._func, "__name__", ""))
        found = [instead for known, instead in REPLACEMENTS.items() if known in name]
        return f" (use {found[0]} instead)" if found else ""

    def _by_dual_numbers(self, index: int | None, tangents: Tangents) -> Tensor | None:
        with dual_level(), Decompose(every_call=True):
            result = self._call({key: tangents[slot] for key, slot in self._slots.items()}, fwAD.make_dual)
            tangent: Tensor | None = fwAD.unpack_dual(result if index is None else result[index]).tangent
            return tangent

    def _by_double_backward(self, index: int | None, tangents: Tangents) -> Tensor:
        leaves, directions = [], []

        def leaf(kept: Tensor, tangent: Tensor) -> Tensor:
            leaves.append(kept.detach().requires_grad_())
            directions.append(tangent)
            return leaves[-1]

        with torch.enable_grad(), Decompose(every_call=True):
            result = self._call({key: tangents[slot] for key, slot in self._slots.items()}, leaf)
            result = result if index is None else result[index]
            if result.layout != torch.strided:
                raise ForwardModeUnsupported("its result is sparse")
            cotangent = torch.zeros_like(result, requires_grad=True)
            gradients = torch.autograd.grad(result, leaves, cotangent, create_graph=True, allow_unused=True)
            pairs = [(g, t) for g, t in zip(gradients, directions, strict=True) if g is not None]
            # Where a gradient has no graph, torch would go on with those that have one.
            if not pairs or not all(g.requires_grad and g.layout == torch.strided for g, _ in pairs):
                raise ForwardModeUnsupported("its backward pass cannot be differentiated")
            (tangent,) = torch.autograd.grad([g for g, _ in pairs], cotangent, [t for _, t in pairs])
            return tangent

    def _call(self, tangents: dict[int, Tensor | None], pair: Any) -> Any:
        """Call the function with `pair(kept, tangent)` for each kept tensor that has a tangent."""

        def paired(value: Any) -> Any:
            return pair(value, tangents[id(value)]) if id(value) in tangents and isinstance(value, Tensor) else value

        return self._func(*map_nested(paired, self._args), **map_nested(paired, self._kwargs))
