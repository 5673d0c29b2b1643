"""The tangent map of each function in which models spend their time.

`RULES` for ordinary functions; `IN_PLACE` for those that write to their first argument and return it; `COMPOSITES` for
those that are followed by what they are composed of.
"""

from __future__ import annotations

from . import activations, arrangements, attention, composites, normalisations, products
from .call import Call, Map, Rule, Tangents, frozen, tensors
from .composites import without_override

__all__ = [
    "COMPOSITES",
    "IN_PLACE",
    "RULES",
    "Call",
    "Map",
    "Rule",
    "Tangents",
    "frozen",
    "tensors",
    "without_override",
]

RULES: dict[object, Rule] = (
    products.RULES | activations.RULES | normalisations.RULES | attention.RULES | arrangements.RULES
)
COMPOSITES = composites.COMPOSITES | attention.COMPOSITES
IN_PLACE: dict[object, Rule] = products.IN_PLACE | activations.IN_PLACE | arrangements.IN_PLACE
