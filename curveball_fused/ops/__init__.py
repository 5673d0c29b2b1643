"""The operators: on parameters (here), on a model's outputs (`losses`), on tangents (`tangents`).

Each is one function that takes the name of a backend, `backend="auto"` for the best that runs where the tensors are.
"""

from . import losses, tangents
from .parameters import adapt_damping, dots, solve, update_, update_groups_

__all__ = ["adapt_damping", "dots", "losses", "solve", "tangents", "update_", "update_groups_"]
