"""Torch's control-flow operators as what they are written as: an `if`, a loop.

Called eagerly, `torch.cond` and its like compile themselves. As `torch.compile` is switched off while a model runs,
they would lose the gradient of what their branches read beside their arguments, and no mode would see inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from curveball_fused._torch_private import tree_leaves, tree_map


def _cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Sequence[Any] = ()) -> Any:
    return true_fn(*operands) if pred else false_fn(*operands)


def _while_loop(
    cond_fn: Callable[..., Any], body_fn: Callable[..., Any], carried: Sequence[Any], additional: Sequence[Any] = ()
) -> tuple[Any, ...]:
    result, values = tuple(carried), carried
    while cond_fn(*values, *additional):
        result = body_fn(*values, *additional)
        values = tree_leaves(result)
    return result


def _map(function: Callable[..., Any], xs: Sequence[Tensor], arguments: Sequence[Any] = ()) -> Any:
    return _stacked([function(*rows, *arguments) for rows in zip(*xs, strict=True)])


def _scan(
    combine: Callable[..., Any], init: Sequence[Tensor], xs: Sequence[Tensor], additional: Sequence[Any] = ()
) -> tuple[Any, Any]:
    carry: Any = init
    results = []
    for rows in zip(*xs, strict=True):
        carry, result = combine(*tree_leaves(carry), *rows, *additional)
        results.append(result)
    return carry, _stacked(results)


def _stacked(results: Sequence[Any]) -> Any:
    """Return the results of the rounds of a loop, nested alike, as one along a new first dimension."""
    return tree_map(lambda *leaves: None if leaves[0] is None else torch.stack(leaves), *results)


AS_WRITTEN: dict[Any, Callable[..., Any]] = {
    torch.ops.higher_order.cond: _cond,
    torch.ops.higher_order.map_impl: _map,
    torch.ops.higher_order.scan: _scan,
    torch.ops.higher_order.while_loop: _while_loop,
}
