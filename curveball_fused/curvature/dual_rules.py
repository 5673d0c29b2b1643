"""The rules for dual numbers: the result and its tangent at once, where that takes fewer passes than torch's own way.

torch builds the tangent of these functions from many elementwise calls, each a pass over memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor

from curveball_fused._torch_private import in_functorch_transform

from . import rules
from .rules import Rule, RuleContext


def dual(rule: Rule) -> Callable[..., Any]:
    """Return `rule` as a function of a backend and of arguments any of which may be dual.

    That returns `NotImplemented` for what is left to torch: autocast, which chooses dtypes by the call, transforms of
    torch.func, writing in place, and graphs that the model itself needs.
    """

    def function(backend: str, *args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            return NotImplemented
        if in_functorch_transform() or kwargs.get("inplace"):
            return NotImplemented
        if any(isinstance(a, Tensor) and a.requires_grad for a in (*args, *kwargs.values())):
            return NotImplemented
        slots: dict[int, int | None] = {}
        tangents: list[Tensor | None] = []

        def primal(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            p, t = fwAD.unpack_dual(value)
            if t is not None:
                slots[id(p)] = len(tangents)
                tangents.append(t)
            return p

        primals, named = [primal(a) for a in args], {key: primal(a) for key, a in kwargs.items()}
        with torch.no_grad():
            recorded = rule(RuleContext(slots, backend), *primals, **named) if tangents else NotImplemented
            return recorded if recorded is NotImplemented else fwAD.make_dual(recorded[0], recorded[1](tangents))

    return function


RULES: dict[Any, Callable[..., Any]] = {
    function: dual(rules.RULES[function])
    for function in (
        F.linear, torch.conv1d, torch.conv2d, torch.conv3d, F.embedding, F.batch_norm, F.layer_norm, F.group_norm,
        F.rms_norm, F.relu, F.gelu, F.silu, F.softmax, F.max_pool2d, F.scaled_dot_product_attention, F.embedding_bag,
        torch.cdist, torch.pdist,
    )
}  # fmt: skip
