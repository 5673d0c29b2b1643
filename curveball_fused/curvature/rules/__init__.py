"""The tangent map of each function in which models spend their time.

`RULES` for ordinary functions; `IN_PLACE` for those that write to their first argument and return it; `COMPOSITES` for
those that are followed by what they are composed of.
"""

from __future__ import annotations

from . import activations, attention, composites, normalizations, products, structural
from .composites import without_override
from .context import Map, Rule, RuleContext, Tangents, snapshot, tensors

__all__ = [
    "COMPOSITES",
    "IN_PLACE",
    "RULES",
    "Map",
    "Rule",
    "RuleContext",
    "Tangents",
    "snapshot",
    "tensors",
    "without_override",
]

RULES: dict[object, Rule] = (
    products.RULES | activations.RULES | normalizations.RULES | attention.RULES | structural.RULES
)
COMPOSITES = composites.COMPOSITES | attention.COMPOSITES
IN_PLACE: dict[object, Rule] = products.IN_PLACE | activations.IN_PLACE | structural.IN_PLACE
