"""The metric P in which a step measures lengths: how a parameter's r = Jᵀc becomes the direction u = P⁻¹r."""

from .bases import EARLY_REFRESHES, EARLY_STEPS, gathers, refresh
from .blocks import NAMES, SQUARE_AVERAGE, Block, fresh_state, has_block, multiply_adds, shapes
from .preconditioner import Direction, Preconditioner

__all__ = [
    "EARLY_REFRESHES",
    "EARLY_STEPS",
    "NAMES",
    "SQUARE_AVERAGE",
    "Block",
    "Direction",
    "Preconditioner",
    "fresh_state",
    "gathers",
    "has_block",
    "multiply_adds",
    "refresh",
    "shapes",
]
