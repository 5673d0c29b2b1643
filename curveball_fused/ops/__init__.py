"""The operators on parameters, on outputs (`losses`) and of tangents (`tangents`), whatever backend runs them."""

from .parameters import adapt_damping, dots, solve, update_, update_groups_

__all__ = ["adapt_damping", "dots", "solve", "update_", "update_groups_"]
