"""The tangent map of each function in which models spend their time.

`RULES` for ordinary functions; `IN_PLACE` for those that write to their first argument and return it; `COMPOSITES` for
those that are followed by what they are composed of; `TWICE_DIFFERENTIABLE` for those whose backward pass torch cannot
differentiate: the same of functions for which it can.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import (
    activations,
    attention,
    composites,
    distances,
    embedding_bags,
    normalizations,
    products,
    recurrent,
    structural,
)
from .composites import without_override
from .context import Map, Rule, RuleContext, Tangents, snapshot, tensors

__all__ = [
    "COMPOSITES",
    "IN_PLACE",
    "RULES",
    "TWICE_DIFFERENTIABLE",
    "Map",
    "Rule",
    "RuleContext",
    "Tangents",
    "snapshot",
    "tensors",
    "without_override",
]

RULES: dict[object, Rule] = (
    products.RULES
    | activations.RULES
    | normalizations.RULES
    | attention.RULES
    | structural.RULES
    | distances.RULES
    | embedding_bags.RULES
    | recurrent.RULES
)
COMPOSITES = composites.COMPOSITES | attention.COMPOSITES
IN_PLACE: dict[object, Rule] = products.IN_PLACE | activations.IN_PLACE | structural.IN_PLACE
TWICE_DIFFERENTIABLE: dict[object, Callable[..., Tensor]] = (
    activations.TWICE_DIFFERENTIABLE | distances.TWICE_DIFFERENTIABLE | embedding_bags.TWICE_DIFFERENTIABLE
)
